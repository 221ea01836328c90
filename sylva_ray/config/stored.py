"""The configuration that a run folder holds: of this version or an older one, with every ``auto`` resolved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import RawConfig, build, read_overridden
from sylva_ray.config.training import Windows

RUN_CONFIG = "config.yaml"
"""File name of the resolved configuration in a run folder."""

DEFAULTS_OF_0_1: dict[str, RawConfig] = {
    "training": {"attention": {"float32": "fused", "bfloat16": "fused"}, "windows": Windows().model_dump()},
    "evaluation": {"precision": "float32"},
    "partition": {"leftovers": "first"},  # 0.2, too
}
"""Settings that run folders of version 0.1 do not contain, with the values of that version."""

PARAMETERS_OF_0_1: RawConfig = {"mixture": {"enabled": False}}
"""Parameters of the method that version 0.1 did not have, likewise."""


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read the configuration of a run folder of this version or an older one and apply ``KEY=VALUE`` overrides.

    Raises:
        UserError: see `sylva_ray.config.experiment.load_config`.
    """
    raw = read_overridden(run_dir / RUN_CONFIG, overrides)
    training, method = raw.get("training"), raw.get("algorithm")
    is_of_0_1 = isinstance(training, dict) and "attention" not in training  # later versions write it
    if is_of_0_1 and isinstance(method, dict):
        raw["algorithm"] = PARAMETERS_OF_0_1 | method
    for section, values in DEFAULTS_OF_0_1.items():
        if isinstance(raw.get(section), dict):
            raw[section] = values | raw[section]
    return build(ExperimentConfig, raw)


Choices = Sequence[tuple[str, str]]

MEASURED: Choices = (("training", "precision"), ("training", "attention"), ("evaluation", "precision"))
"""Settings whose ``auto`` is resolved by a measurement."""

CHOICES: Choices = (("training", "device"), ("training", "cohort_size"), ("training", "windows"), *MEASURED)
"""Settings whose ``auto`` is resolved and that affect the results."""


def with_choices_of(config: ExperimentConfig, resolved: ExperimentConfig, keys: Choices = CHOICES) -> ExperimentConfig:
    """Replace every ``auto`` among ``keys`` by the value in the configuration ``resolved``."""
    for section, key in keys:
        if getattr(getattr(config, section), key) == "auto":
            chosen = getattr(getattr(resolved, section), key)
            config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: chosen})})
    return config
