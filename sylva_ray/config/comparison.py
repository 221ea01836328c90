"""Which settings a result depends on, and whether two experiments agree in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import RawConfig, flatten
from sylva_ray.config.stored import with_choices_of
from sylva_ray.core.text import with_fractions

FREE_SECTIONS = ("cluster", "tracking")
"""Sections without effect on results, but for ``cluster.threads_per_actor``, which decides about the last bits."""


def result_settings(config: ExperimentConfig) -> RawConfig:
    """Return the settings that results depend on, as plain values: all but `FREE_SECTIONS`, and the threads."""
    settings: RawConfig = json.loads(config.model_dump_json(exclude=set(FREE_SECTIONS)))
    return settings | {"cluster": {"threads_per_actor": config.cluster.threads_per_actor}}


OPTIONAL_PARTS = ("algorithm.mixture", "algorithm.phase2")
"""Parts of a method that are off without ``enabled``."""

OFF = {None, str(False)}
"""Values of ``enabled`` with which a part is off; None: the version did not have it."""


class Difference(NamedTuple):
    """A setting that two experiments have with different values.

    Attributes:
        key: dotted.
        before: its value in the first, as text.
        now: its value in the second.
    """

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} there, {self.now} now"


def difference(stored: ExperimentConfig, config: ExperimentConfig) -> Difference | None:
    """Compare two experiments.

    Args:
        stored: of a run folder; an ``auto`` in it accepts any choice.
        config: the other one.

    Returns:
        The first key of `result_settings` that differs; None where there is none.
    """
    return next(_differences(result_settings(with_choices_of(stored, config)), result_settings(config)), None)


def changes(stored: ExperimentConfig, config: ExperimentConfig) -> list[str]:
    """Return what makes one experiment of another, settings without effect on results included.

    Args:
        stored: of a run folder.
        config: the other one; its ``auto`` is no change.

    Returns:
        Overrides ``KEY=VALUE``.
    """
    before, now = with_choices_of(stored, config).model_dump(mode="json"), config.model_dump(mode="json")
    return [f"{found.key}={found.now}" for found in _differences(before, now) if found.now not in ("auto", NOT_SET)]


NOT_SET = "not set"
"""In place of a value that a configuration does not have."""


def _differences(stored: RawConfig, config: RawConfig) -> Iterator[Difference]:
    """Yield the settings that differ, by their keys in alphabetical order."""
    before, now = flatten(stored), flatten(config)
    off = tuple(
        f"{part}." for part in OPTIONAL_PARTS if {before.get(f"{part}.enabled"), now.get(f"{part}.enabled")} <= OFF
    )
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(off) and not (key in before and key in now):
            continue  # one of the two is of a version without this setting, which has no effect there
        if before.get(key) != now.get(key):
            yield Difference(key, *(_shown(key, values.get(key, NOT_SET)) for values in (before, now)))


def _shown(key: str, text: str) -> str:
    """Return a flattened value as a configuration has it."""
    words = {"None": "null", "True": "true", "False": "false"}
    return words.get(text) or with_fractions(f"{key}={text}").removeprefix(f"{key}=")
