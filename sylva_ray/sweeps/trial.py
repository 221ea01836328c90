"""One trial of a sweep: an experiment whose coordinator is this very process, inside the placement group that Tune reserved.

    Tune ── values, seed ──► trial = coordinator (bundle 0) ── tasks ──► client actors (bundles 1, 2, ...)
      ◄── metrics per step ───       └── SWEEP/trials/POINT-sSEED: an ordinary run folder

The run folder is the checkpoint. A trial that is tried again, or restored with the sweep, reports what the folder knows and
goes on from its last step; one that has finished only reports. With ``cluster.pool=in_process`` the process does the clients'
work as well.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune

from sylva_ray.config.experiment import CONFIG, ExperimentConfig, load_config
from sylva_ray.core.errors import UserError
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.ray.driver import pool_for
from sylva_ray.federation.loop import Record
from sylva_ray.preparation.experiment import prepare
from sylva_ray.preparation.resolve import trial_actors
from sylva_ray.provisioning.launcher_file import Resources
from sylva_ray.provisioning.placement import ROUNDING
from sylva_ray.storage.jsonl import read_records
from sylva_ray.storage.run_files import read_summary
from sylva_ray.storage.run_folder import RECORDS, claim_run_folder
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.metrics import step_metrics
from sylva_ray.sweeps.points import Trial
from sylva_ray.sweeps.space import Space
from sylva_ray.sweeps.tracking import trial_config

HOME_SHARE = 0.001
"""What a coordinator takes of its node's own resource, which is 1."""

MOST_TRIALS = 1000
"""At once, by that share."""

GOODBYE_S = 60
"""How long a process that is to be used again waits for a pruned trial to put its things away."""


def trial_bundles(config: ExperimentConfig, home: str) -> list[dict[str, float]]:
    """What a trial reserves: the coordinator's bundle, then one per client actor.

    The first is tied to the node ``home`` (a resource such as ``node:10.0.0.1``), where the sweep's folder is; the
    coordinator waits most of the time and takes no CPU. In process there is one bundle, which does all the work."""
    section = config.cluster
    worker = {"CPU": section.cpus_per_actor, "GPU": section.gpus_per_actor}
    here = {home: HOME_SHARE}
    if section.pool == "in_process":
        return [here | worker]
    return [here, *([worker] * trial_actors(config))]


def trials_that_fit(bundles: Sequence[Resources], nodes: Sequence[Resources], most: int = MOST_TRIALS) -> int:
    """How many trials the empty nodes hold at once, up to ``most``: bundles, the largest first, onto the first node with room."""
    free = [_Room(node) for node in nodes]
    ordered = sorted(bundles, key=lambda bundle: (-bundle.get("GPU", 0.0), -bundle.get("CPU", 0.0)))
    trials = 0
    while trials < most and all(any(room.take(bundle) for room in free) for bundle in ordered):
        trials += 1
    return trials


class _Room:
    """What is free on a node. GPUs one by one: Ray puts a share of one on a single GPU, and whole ones on empty GPUs."""

    def __init__(self, node: Resources) -> None:
        self.gpus = [1.0] * int(node.get("GPU", 0.0))
        self.rest = {name: amount for name, amount in node.items() if name != "GPU"}

    def take(self, bundle: Resources) -> bool:
        """Reserve a bundle, if there is room."""
        wanted = bundle.get("GPU", 0.0)
        share = min(1.0, wanted)
        chosen = [i for i, free in enumerate(self.gpus) if free + ROUNDING >= share][: math.ceil(wanted)]
        rest = {name: amount for name, amount in bundle.items() if name != "GPU"}
        if len(chosen) < math.ceil(wanted) or any(self.rest.get(n, 0.0) + ROUNDING < a for n, a in rest.items()):
            return False
        for i in chosen:
            self.gpus[i] -= share
        self.rest |= {name: self.rest.get(name, 0.0) - amount for name, amount in rest.items()}
        return True


def run_trial(
    given: Mapping[str, Any],
    sweep: str,
    space: Space,
    tracking: Mapping[str, Any],
    working_dir: str,
    environment: Mapping[str, str],
) -> None:
    """The function that Tune runs.

    Args:
        given: ``{"trial": {"values": ..., "seed": ...}}``.
        tracking: changes of the experiment's section of that name; without credentials that the user keeps elsewhere.
        environment: the driver's settings for the tracker.
    """
    os.chdir(working_dir)
    os.environ.update(environment)
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(GOODBYE_S))
    trial, folder = Trial(**given["trial"]), SweepFolder(Path(sweep))
    began, outcome, error = time.time(), "died", ""
    folder.note(trial.key, began=began, process=os.getpid(), node=ray.get_runtime_context().get_node_id())
    try:
        config = trial_config(space, trial, tracking, load_config(folder.compute))
        _run(
            config,
            folder.trial(trial.key),
            lambda **news: folder.note(trial.key, began=began, alive=time.time(), **news),
        )
        outcome = "finished"
    except SystemExit:  # Tune's way to end a trial from within `report`
        outcome = "pruned"
        raise
    except UserError as problem:  # it would be the same the next time: no reason to try again
        outcome, error = "refused", str(problem)
    except BaseException as problem:
        error = f"{type(problem).__name__}: {problem}"
        raise
    finally:
        folder.note(trial.key, began=began, ended=time.time(), outcome=outcome, error=error)


def _run(config: ExperimentConfig, run_dir: Path, note: Callable[..., None]) -> None:
    """1 report what is known, 2 go on with the experiment and report every step; ``note`` takes news for the history."""
    records: list[Record] = read_records(run_dir / RECORDS)
    for known in range(1, len(records) + 1):
        _report(records[:known], config)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "record":
            records.append(event["record"])
            note(step=event["record"]["step"])
            _report(records, config)

    if read_summary(run_dir) is None:
        prepared = prepare(config, run_dir)
        claim_run_folder(run_dir, prepared.config, resume=(run_dir / CONFIG).exists())
        with pool_for(prepared, on_lost=lambda where: note(lost=where)) as pool:
            run_experiment(prepared, run_dir, pool, on_event)
    _report(records, config, finished=True)


def _report(records: list[Record], config: ExperimentConfig, finished: bool = False) -> None:
    """Tell Tune; a trial that it prunes does not come back from here."""
    last = records[-1]
    place = {"step": last["step"], "stage": last["stage"], "round": last["round"], "finished": finished}
    tune.report(place | step_metrics(records, config))
