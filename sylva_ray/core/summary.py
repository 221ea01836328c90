"""``summary.json``: the results of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from sylva_ray.core.records import Artefact, Compute, GameRecord, omitted_if_none


class Spread(Artefact):
    """How a quantity spreads over the clients of a fleet. Accuracies are fractions in [0, 1]."""

    mean: float
    """Mean over clients."""
    std: float = math.nan
    """Standard deviation over clients (population)."""
    min: float = math.nan
    """The lowest client's value."""
    p10: float = math.nan
    """10th percentile."""
    worst_decile: float
    """Mean of the lowest tenth of the clients, at least one of them."""
    median: float = math.nan
    """50th percentile."""
    max: float = math.nan
    """The highest client's value."""
    per_client: list[float] = Field([])
    """All K values, also those of clients that count in no statistic."""

    @classmethod
    def from_values(cls, values: Sequence[float], left_out: Sequence[int] = ()) -> Spread:
        """Summarise one value per client.

        Args:
            values: ``[K]``.
            left_out: clients that are listed but count in no statistic (Byzantine ones).
        """
        v = np.sort(np.delete(np.asarray(values, float), list(left_out)))
        lowest = v[: max(1, len(v) // 10)]
        return cls(
            mean=float(v.mean()),
            std=float(v.std()),
            min=float(v[0]),
            p10=float(np.percentile(v, 10)),
            worst_decile=float(lowest.mean()),
            median=float(np.median(v)),
            max=float(v[-1]),
            per_client=[float(value) for value in values],
        )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, raw: Any) -> Any:
        """Compute the statistics where a file holds the values alone."""
        if isinstance(raw, dict) and "worst_decile" not in raw and raw.get("per_client"):
            return cls.from_values(raw["per_client"]).to_json()
        return raw


class StageAccuracies(Artefact):
    """Accuracies of the fleet after a part of the run."""

    benign_accuracy: Spread
    """On unchanged test images."""
    benign_balanced_accuracy: Spread
    """Class-balanced, on unchanged test images."""
    robust_accuracy: dict[str, Spread] = Field({})
    """``{attack: spread}`` on attacked test images."""
    robust_balanced_accuracy: dict[str, Spread] = Field({})
    """``{attack: spread}``, class-balanced."""


class ClientSummary(Artefact):
    """The data of one client, and whether it collapsed or is Byzantine."""

    client: int = -1
    """Its number."""
    train: int = 0
    """Training images."""
    selection: int = 0
    """Validation images that choose layers."""
    guard: int = 0
    """Validation images that decide how much of a refinement is kept."""
    test: int = 0
    """Test images."""
    majority_share: float = math.nan
    """Accuracy of always answering its most frequent training class."""
    collapsed: bool | None = None
    """Whether it is no better than that under attack, or answers a single class."""
    byzantine: bool = False
    """Whether it uploads malicious updates."""


class Communication(Artefact):
    """Bytes sent. A declared size is the size of the arrays; a payload is the measured size of the encoded file."""

    upload_bytes_per_client_round: int | float
    """Declared upload of a client in a round of phase 1 (mean over clients)."""
    upload_payload_bytes_per_client_round: int = 0
    """Measured upload of a client in a round of phase 1 (mean over clients and rounds)."""
    download_payload_bytes_per_client_round: int = 0
    """Measured download of a client in a round of phase 1."""
    download_bytes_per_client_round: int | float = 0
    """Declared download of a client in a round of phase 1."""
    total_bytes: int
    """Declared bytes of the whole run, up and down, both phases. With `training.clients_per_round` a round counts the
    answers to its participants; that other clients need the new model for later stages or at the end is not counted."""
    full_model_bytes: int = 0
    """Size of the whole model in float32."""
    full_model_ratio: float | None = None
    """``full_model_bytes`` / ``upload_bytes_per_client_round``; null if nothing is uploaded."""
    compression: str = "none"
    """``compression.kind``."""
    rounds: int = 0
    """Rounds of phase 1."""


class RunSeconds(Artefact):
    """The seconds of a run by activity."""

    total: float
    """Wall time."""
    setup: float = 0.0
    """Wall time of loading data and model."""
    train: float = 0.0
    """Training, summed over workers."""
    attack: float = 0.0
    """Attacks during training and phase 2, summed over workers."""
    mixture: float = 0.0
    """Trying mixtures of adapters and heads, with attacks, summed over workers."""
    game: float = 0.0
    """The layer game, summed over workers."""
    evaluate: float = 0.0
    """Evaluation, summed over workers."""
    aggregate: float = 0.0
    """Aggregation and neighbourhoods, by the coordinator."""
    other: float = 0.0
    """What a method's own code measures under other names, summed over workers."""
    idle: float = 0.0
    """Wall time of workers without any of that, summed over workers: they waited, sent and received, or merged."""


class CheckResult(Artefact):
    """The result of a check of the robust accuracy (docs/checks.md)."""

    name: str
    """``S1`` to ``S14``."""
    passed: bool
    """Whether it passed."""
    value: float = math.nan
    """The number that is checked."""
    meaning: str = ""
    """What it means, in one sentence."""


class ByzantineRecord(Artefact):
    """The clients that attacked the aggregation; all spreads are then over the others."""

    attack: str
    """``byzantine.attack``."""
    attackers: list[int] = Field([])
    """Client numbers."""


class Hardware(Artefact):
    """The machine and the workers of a run, and when it ended."""

    machine: str
    """Processor architecture."""
    cpus: int | None = None
    """Logical processors."""
    actors: int | None = None
    """Workers."""
    threads_per_actor: int = 1
    """Torch threads of each."""
    device: str | None = None
    """``training.device``."""
    gpus: Annotated[list[str] | None, omitted_if_none()] = None
    """GPUs of all stages, each with its driver and CUDA, on which the bits of a result depend; absent on CPUs."""
    host: str | None = None
    """Name of the machine of the coordinator."""
    finished: str | None = None
    """When the run ended, ISO 8601 in UTC."""


class Summary(Artefact):
    """``summary.json``, written at the end of a run."""

    description: ClassVar[str] = "a summary of a finished run"

    name: str = ""
    """Name of the experiment."""
    algorithm: str
    """Name of the method."""
    dataset: str
    """``dataset.name``."""
    backbone: str | None = None
    """``backbone.name``."""
    num_clients: int
    """K, the number of clients."""
    num_classes: int | None = None
    """Classes of the data set."""
    seed: int
    """Seed of the experiment."""
    rounds: int | None = None
    """Rounds of phase 1."""
    class_names: list[str] = Field([])
    """Names of the classes."""
    label_matrix: list[list[int]] | None = None
    """Training images per client and class, ``[K][num_classes]``."""
    clients: list[ClientSummary] = Field([])
    """One entry per client."""
    test_images: int | None = None
    """Distinct test images of the honest clients, who may share some; absent in earlier versions."""
    initial: StageAccuracies | None = None
    """Before the defence: pre-trained backbone with a benignly fitted personal head."""
    phase1: StageAccuracies | None = None
    """After phase 1."""
    final: StageAccuracies
    """At the end; equals ``phase1`` where a method has no second phase."""
    majority: Spread
    """Accuracy of always answering a client's most frequent training class."""
    communication: Communication
    """Bytes sent."""
    layer_game: GameRecord | None = None
    """What the layer game decided; null where a method plays none."""
    seconds: RunSeconds
    """Seconds by activity."""
    peak_memory_bytes_per_actor: int = 0
    """High-water mark of the largest worker process."""
    peak_gpu_memory_bytes_per_actor: Annotated[int | None, omitted_if_none()] = None
    """The most that the tensors of a worker used of its GPU; absent on CPUs."""
    checks: list[CheckResult] = Field([])
    """Checks of the final robust accuracy; empty where ``evaluation.checks`` is off."""
    warnings: list[str] = Field([])
    """Notices about the data set, failed checks, missed deadlines, clients whose training diverged, refused uploads,
    changed inputs, budgets of training and evaluation that differ, records that MLflow did not receive, and observers
    that failed."""
    threat_model: dict[str, str] = Field({})
    """``norm``, ``training``, ``evaluation``, ``knowledge``, ``precision``, perhaps ``byzantine``, in words."""
    byzantine: ByzantineRecord | None = None
    """Byzantine clients; null where there are none."""
    versions: dict[str, str] = Field({})
    """Versions of this package and of what it computes with; ``commit`` of a checkout, with ``+`` if it was changed."""
    hardware: Hardware | None = None
    """Machine and workers."""
    compute: Compute | None = None
    """Precisions and attention kernels."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, raw: Any) -> Any:
        """Take ``phase1`` for ``final`` in files that leave the latter empty."""
        if isinstance(raw, dict) and raw.get("final") is None and raw.get("phase1") is not None:
            return raw | {"final": raw["phase1"]}
        return raw

    @property
    def has_later_phase(self) -> bool:
        """Whether a phase follows phase 1, so that ``final`` is not its end (but may be equal to it)."""
        return self.layer_game is not None or self.final != self.phase1

    def other_warnings(self) -> list[str]:
        """Return the warnings that do not repeat a check."""
        checks = tuple(f"check {check.name} " for check in self.checks)
        return [text for text in self.warnings if not (checks and text.startswith(checks))]
