"""A finished run as a comparison sees it: its summary and, if available, its configuration."""

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
"""Config keys, or beginnings of keys, that must agree for runs to be comparable."""

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
    "training.windows",
    "evaluation.every",
    "evaluation.clients",
    "evaluation.initial",
    "evaluation.max_samples",
    "evaluation.checks",
    "byzantine.fraction",
    "byzantine.attack",
)
"""Config keys, or beginnings of keys, that do not distinguish experiments: names, places, and where or how often
something is computed. The kind and number of Byzantine clients are taken from the summary instead."""


class Run(Summary):
    """The summary of a finished run, with its configuration and its source."""

    method: str | None = None
    """Name of the run's row in place of ``algorithm``."""
    config: dict[str, Any] | None = None
    """The run's ``config.yaml`` as a mapping; None if it is not available."""
    source: str = ""
    """Where the summary was read from, for messages."""

    @model_validator(mode="before")
    @classmethod
    def _name_algorithm(cls, raw: Any) -> Any:
        """Use the method's name where the summary names no algorithm."""
        return {"algorithm": raw["method"]} | raw if isinstance(raw, dict) and raw.get("method") else raw

    @property
    def label(self) -> str:
        """Name of the method in the comparison."""
        return self.method or self.algorithm

    @property
    def num_honest(self) -> int:
        """Number of clients that count in the accuracies."""
        return self.num_clients - sum(client.byzantine for client in self.clients)

    @property
    def attacks(self) -> tuple[str, ...]:
        """Labels of the evaluation's attacks."""
        return tuple(self.final.robust_accuracy)

    @cached_property
    def flat_config(self) -> dict[str, str]:
        """The configuration by dotted keys, with defaults for missing keys; unchanged if it is not valid any more."""
        if self.config is None:
            return {}
        try:
            return build(ExperimentConfig, self.config).flat()
        except UserError:
            return flatten(self.config)

    def fleet(self) -> dict[str, str]:
        """Return the settings that must agree for runs to be comparable, as far as they are available."""
        kind, _, place = self.dataset.partition(":")
        values = {key: text for key, text in self.flat_config.items() if key.startswith(FLEET_KEYS)}
        values["dataset.name"] = f"{kind}:{place.rstrip('/').rpartition('/')[2]}" if place else kind
        values["partition.num_clients"] = str(self.num_clients)
        return values | ({"num_classes": str(self.num_classes)} if self.num_classes else {})

    def settings(self) -> dict[str, str]:
        """Return the settings that the runs of one row share besides those of `fleet`.

        Without a configuration, the name of the experiment stands for the settings that the summary does not hold.
        """
        values = {"attacks": "+".join(self.attacks), "byzantine": "none"}
        if self.byzantine is not None:
            values["byzantine"] = f"{self.byzantine.attack} by {len(self.byzantine.attackers)}"
        values |= {"training.rounds": str(self.rounds)} if self.rounds is not None else {}
        values |= {"backbone.name": self.backbone} if self.backbone else {}
        if self.config is None:
            return values if self.method else values | {"name": self.name}
        flat = self.flat_config
        return {key: v for key, v in flat.items() if not key.startswith((*IGNORED_KEYS, *FLEET_KEYS))} | values

    def partition_fingerprint(self) -> str | None:
        """Return a short hash of the number of images per client and class; None if the numbers are not available."""
        if self.label_matrix is None:
            return None
        return hashlib.sha256(json.dumps(self.label_matrix).encode()).hexdigest()[:12]

    def attack_specs(self) -> dict[str, AttackSpec]:
        """Return the evaluation's attacks by label; empty without a valid configuration."""
        return {spec.label: spec for spec in specs_from_config(self.config)}

    def has_same_result(self, other: Run) -> bool:
        """Return whether two runs have the same accuracies after phase 1 and at the end."""
        return (self.final, self.phase1) == (other.final, other.phase1)


def stage_spread(stage: StageAccuracies, condition: str, kind: str) -> Spread | None:
    """Return the spread of an accuracy over the clients.

    Args:
        stage: accuracies after a phase of a run.
        condition: ``benign`` or the label of an attack.
        kind: ``accuracy`` or ``balanced_accuracy``.

    Returns:
        The spread; None if the condition was not measured.
    """
    if condition == BENIGN:
        return stage.benign_accuracy if kind == "accuracy" else stage.benign_balanced_accuracy
    return (stage.robust_accuracy if kind == "accuracy" else stage.robust_balanced_accuracy).get(condition)
