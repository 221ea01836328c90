"""What a comparison reads of ``summary.json``, and of what may stand beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import AttackSpec
from sylva_ray.metrics.accuracy import spread
from sylva_ray.reports.attack_titles import specs_of_config

BENIGN = "benign"
FLEET_KEYS = ("dataset.name", "dataset.max_train", "dataset.max_test", "dataset.test_pool", "partition.")
"""Config keys in which comparable runs agree."""

NO_SETTINGS = (
    "seed",
    "name",
    "algorithm.name",
    "cluster.",
    "tracking.",
    "dataset.root",
    "training.device",
    "training.cohort_size",
    "training.attention",
    "evaluation.every",
    "evaluation.max_samples",
    "evaluation.checks",
    "byzantine.fraction",
    "byzantine.attack",
)
"""Config keys that tell no two experiments apart: labels, places, and where or how often the work is done. Of Byzantine
clients the summary tells."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Spread(_Part):
    mean: float
    worst_decile: float
    per_client: list[float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_clients(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "worst_decile" not in raw and raw.get("per_client"):
            return spread(raw["per_client"])
        return raw


class Accuracies(_Part):
    benign_accuracy: Spread
    benign_balanced_accuracy: Spread
    robust_accuracy: dict[str, Spread] = {}
    robust_balanced_accuracy: dict[str, Spread] = {}

    def get(self, condition: str, kind: str) -> Spread | None:
        if condition == BENIGN:
            return self.benign_accuracy if kind == "accuracy" else self.benign_balanced_accuracy
        return (self.robust_accuracy if kind == "accuracy" else self.robust_balanced_accuracy).get(condition)


class Communication(_Part):
    upload_bytes_per_client_round: float
    total_bytes: float
    full_model_ratio: float | None = None


class Seconds(_Part):
    total: float


class Check(_Part):
    name: str
    passed: bool
    meaning: str = ""


class Client(_Part):
    collapsed: bool | None = None
    byzantine: bool = False


class Byzantine(_Part):
    attack: str
    attackers: list[int] = []


class Run(_Part):
    """The part of ``summary.json`` that a comparison reads, and what may stand beside it."""

    algorithm: str
    method: str | None = None
    name: str = ""
    seed: int
    dataset: str
    backbone: str | None = None
    num_clients: int
    num_classes: int | None = None
    rounds: int | None = None
    label_matrix: list[list[float]] | None = None
    clients: list[Client] = []
    phase1: Accuracies | None = None
    final: Accuracies
    majority: Spread
    communication: Communication
    layer_game: dict[str, Any] | None = None
    byzantine: Byzantine | None = None
    seconds: Seconds
    checks: list[Check] = []
    warnings: list[str] = []
    config: dict[str, Any] | None = None
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            raw = {"algorithm": raw.get("method")} | raw if raw.get("method") else raw
            raw = raw | {"final": raw.get("final") or raw.get("phase1")}
        return raw

    @property
    def label(self) -> str:
        return self.method or self.algorithm

    @property
    def num_honest(self) -> int:
        """Clients that count in the accuracies."""
        return self.num_clients - sum(client.byzantine for client in self.clients)

    @property
    def attacks(self) -> tuple[str, ...]:
        return tuple(self.final.robust_accuracy)

    @cached_property
    def flat_config(self) -> dict[str, str]:
        """The config with today's defaults where it is silent; as it stands if today's schema refuses it."""
        if self.config is None:
            return {}
        try:
            return build(ExperimentConfig, self.config).flat()
        except UserError:
            return dict(_flatten(self.config))

    def fleet(self) -> dict[str, str]:
        """What comparable runs share, as far as it is known."""
        kind, _, place = self.dataset.partition(":")
        known = {key: text for key, text in self.flat_config.items() if key.startswith(FLEET_KEYS)}
        known |= {"dataset.name": f"{kind}:{place.rstrip('/').rpartition('/')[2]}" if place else kind}
        known["partition.num_clients"] = str(self.num_clients)
        return known | ({"num_classes": str(self.num_classes)} if self.num_classes else {})

    def settings(self) -> dict[str, str]:
        """What runs of one row share beside the fleet; by the config if there is one, else by the experiment's name."""
        known = {"attacks": "+".join(self.attacks), "byzantine": "none"}
        if self.byzantine is not None:
            known["byzantine"] = f"{self.byzantine.attack} by {len(self.byzantine.attackers)}"
        known |= {"training.rounds": str(self.rounds)} if self.rounds is not None else {}
        known |= {"backbone.name": self.backbone} if self.backbone else {}
        if self.config is None:
            return known if self.method else known | {"name": self.name}
        flat = self.flat_config
        return {key: v for key, v in flat.items() if not key.startswith((*NO_SETTINGS, *FLEET_KEYS))} | known

    def partition_fingerprint(self) -> str | None:
        """Return a short hash of which client holds how many images of which class; None where that is not known."""
        if self.label_matrix is None:
            return None
        return hashlib.sha256(json.dumps(self.label_matrix).encode()).hexdigest()[:12]

    def attack_specs(self) -> dict[str, AttackSpec]:
        """Return what each attack is, by label, as far as the config says."""
        return {spec.label: spec for spec in specs_of_config(self.config)}

    def same_result(self, other: Run) -> bool:
        return (self.final, self.phase1) == (other.final, other.phase1)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value) if isinstance(value, list) else str(value)


def parse(summary: Any, source: str) -> Run:
    """Check one summary.

    Raises:
        UserError: names the source and what is missing or wrong in it.
    """
    try:
        return Run.model_validate(summary)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        what = f"{where}: {problem['msg'].lower()}" if where else "a JSON object is needed"
        raise UserError("summary", source, f"is no summary of a finished run ({what}); see docs/summary.md") from None
