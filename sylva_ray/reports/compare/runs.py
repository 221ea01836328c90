"""What a comparison reads of ``summary.json``, and of what may stand beside it."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

from pydantic import model_validator

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build, flatten
from sylva_ray.core.errors import UserError
from sylva_ray.core.summary import Spread, StageAccuracies, Summary
from sylva_ray.core.types import AttackSpec
from sylva_ray.reports.attack_titles import specs_from_config

BENIGN = "benign"
FLEET_KEYS = ("dataset.name", "dataset.max_train", "dataset.max_test", "dataset.test_pool", "partition.")
"""Config keys in which comparable runs agree."""

IGNORED_KEYS = (
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


class Run(Summary):
    """A finished run: its summary, and what stands beside it."""

    method: str | None = None
    """Name of the run's row in place of ``algorithm``."""
    config: dict[str, Any] | None = None
    """The run's ``config.yaml`` as a mapping; None where it is not known."""
    source: str = ""
    """Where the summary was read, for messages."""

    @model_validator(mode="before")
    @classmethod
    def _name_algorithm(cls, raw: Any) -> Any:
        """Take the method's name where no algorithm is named."""
        return {"algorithm": raw["method"]} | raw if isinstance(raw, dict) and raw.get("method") else raw

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
            return flatten(self.config)

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
        return {key: v for key, v in flat.items() if not key.startswith((*IGNORED_KEYS, *FLEET_KEYS))} | known

    def partition_fingerprint(self) -> str | None:
        """Return a short hash of which client holds how many images of which class; None where that is not known."""
        if self.label_matrix is None:
            return None
        return hashlib.sha256(json.dumps(self.label_matrix).encode()).hexdigest()[:12]

    def attack_specs(self) -> dict[str, AttackSpec]:
        """Return what each attack is, by label, as far as the config says."""
        return {spec.label: spec for spec in specs_from_config(self.config)}

    def has_same_result(self, other: Run) -> bool:
        return (self.final, self.phase1) == (other.final, other.phase1)


def stage_spread(stage: StageAccuracies, condition: str, kind: str) -> Spread | None:
    """Return a spread of a stage.

    Args:
        stage: of a run.
        condition: ``benign`` or an attack's label.
        kind: ``accuracy`` or ``balanced_accuracy``.

    Returns:
        The spread; None where the condition was not measured.
    """
    if condition == BENIGN:
        return stage.benign_accuracy if kind == "accuracy" else stage.benign_balanced_accuracy
    return (stage.robust_accuracy if kind == "accuracy" else stage.robust_balanced_accuracy).get(condition)
