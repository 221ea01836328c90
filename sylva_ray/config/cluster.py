"""The section ``cluster``: on what an experiment runs, and what is done about actors that fail."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sylva_ray.core.bounds import MAX_COUNT
from sylva_ray.core.locations import StoredPath
from sylva_ray.core.sections import Count, Seconds, Section, Size


class ClusterSection(Section):
    """Execution. Results do not depend on this section, but for rounds with a deadline (`round_deadline_s`).

    Their last bits depend on `threads_per_actor`, and may on `num_actors=per_client`, `memory_per_actor` and
    `gpus_per_actor`.
    """

    pool: Literal["ray", "in_process"] = Field(
        "ray", description="ray: actors on a Ray cluster; in_process: one process, no Ray"
    )
    address: str | None = Field(None, description="None: start Ray on this machine; else host:port, or `auto`")
    launcher: StoredPath | None = Field(
        None,
        description="cluster.yaml of the autoscaler; None: the one of this head node, if any",
    )
    allow_unauthenticated: bool = Field(
        False, description="accept RAY_AUTH_MODE=disabled: whoever reaches Ray's ports can run code"
    )
    num_actors: Count | Literal["auto", "per_client"] = Field(
        "auto", description="auto: as many as fit the cluster and have work; per_client: one for each client"
    )
    cpus_per_actor: float = Field(1.0, gt=0, le=MAX_COUNT, description="CPUs that Ray reserves for each actor")
    gpus_per_actor: float = Field(
        0.0,
        ge=0,
        le=MAX_COUNT,
        description="share of a GPU that Ray reserves for each actor, e.g. 0.25; actors with none compute on the CPU",
    )
    threads_per_actor: Count = Field(1, description="threads of PyTorch in each actor")
    memory_per_actor: Size | Literal["auto"] = Field(
        "auto",
        description="what an actor may use, e.g. 8 GB: of its GPU's memory, or of its node's; auto: its share of it, "
        "of a card with 22 GiB if only other machines have GPUs",
    )
    round_deadline_s: Seconds | None = Field(
        None, description="how long a round waits for clients; what those that miss it trained is lost. None: for all"
    )
    max_task_retries: int = Field(
        3,
        ge=0,
        description="how often a cohort is run again after its actor failed; from 2 on, the last time with smaller "
        "windows if the process ended without giving a reason, as for lack of memory",
    )
    connect_timeout_s: Seconds = Field(20.0, description="how long to wait for the Ray cluster at cluster.address")
    startup_timeout_s: Seconds = Field(
        900.0, description="how long to wait for the first actor; a cloud node takes minutes to start"
    )
    hang_timeout_s: Seconds = Field(
        120.0, description="how long an actor may give no sign of life before it is replaced"
    )
    max_exported: int = Field(
        1000, ge=0, description="fleets up to this size have their adapters exported at the end; else: sylva-ray export"
    )
    keep_checkpoints: Count = Field(
        3,
        description="how many stay: the newest, and others in case that it is damaged; that of the last round, "
        "from which a run gets more rounds, stays besides",
    )
    task_deadline_s: Seconds | None = Field(
        None,
        description="how long a task may take before its actor is replaced; None: 30 times the slowest of its kind, "
        "at least 10 minutes, and an hour at most without a pass through the model",
    )
