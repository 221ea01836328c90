"""The files of a ledger: what is run, what the search found, and the results.

::

    shared.yaml              what all runs share
    regimes/REGIME.yaml      what a regime changes, e.g. the skew of the labels; a ledger may have no regimes
    methods/METHOD.yaml      what a method changes, its number of seeds, and what the search tries for it
    scales/SCALE.yaml        changes for the search, or for another machine
    search.json              the hyperparameters that the search found, on held-out images
    results/REGIME/METHOD-SEED/result.json              the configuration, and the summary of the run
    results/REGIME/METHOD-SEED/predictions.safetensors  of every test image, for paired comparisons
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import AlgorithmSection
from sylva_ray.config.schema import merged, read_yaml, set_dotted
from sylva_ray.core.sections import Section

HERE = Path(__file__).parent
RESULT = "result.json"
LR = "training.lr"

Settings = dict[str, Any]
"""A part of an experiment, as in YAML: nested sections, or dotted keys."""


class SearchSpace(Section):
    """What the search tries for a method: learning rates, then a variant at the better one, then its other designs.

    A variant that several methods have is taken by all of them or by none, by the mean of what they gain: the gain of a
    single method is within the error of its score.
    """

    lr: tuple[float, ...]
    variant: Settings | None = None
    designs: tuple[Settings, ...] = ()


class MethodFile(Section):
    """A file in methods/. ``search_as`` names the method whose chosen hyperparameters this one takes."""

    seeds: int
    search: SearchSpace | None = None
    search_as: str | None = None
    config: Settings


class Candidate(Section):
    """What the search tried once, and the class-balanced accuracies that it reached; ``score`` is their sum."""

    changes: Settings
    benign_balanced: float
    robust_balanced: float
    score: float


class SearchResult(Section):
    """What the search found for a method: all candidates, and, where it is fixed, what was chosen of them."""

    candidates: tuple[Candidate, ...]
    chosen: Settings | None = None

    @property
    def rate(self) -> Candidate:
        """The best of those that differ in the learning rate only."""
        return best(candidate for candidate in self.candidates if list(candidate.changes) == [LR])

    def with_variant(self, variant: Settings | None) -> Candidate | None:
        """Return the best learning rate with a variant; None if that was not tried."""
        changes = self.rate.changes | (variant or {})
        return next((candidate for candidate in self.candidates if variant and candidate.changes == changes), None)


@dataclass(frozen=True)
class Ledger:
    """A ledger in a folder."""

    folder: Path = HERE

    @cached_property
    def methods(self) -> dict[str, MethodFile]:
        """The files of all methods, ``{method: file}``."""
        return {path.stem: MethodFile.model_validate(read_yaml(path)) for path in self._yaml("methods")}

    @cached_property
    def regimes(self) -> list[str]:
        """The names of the regimes; one empty name if the ledger has none."""
        return [path.stem for path in self._yaml("regimes")] or [""]

    @cached_property
    def scales(self) -> list[str]:
        """The names of the scales."""
        return [path.stem for path in self._yaml("scales")]

    def configuration(self, method: str, regime: str, chosen: Settings, scale: str | None, seed: int) -> Settings:
        """Return the experiment of one method, regime and seed.

        It is shared.yaml, changed by the regime, by the method's own file, by what the search chose (dotted keys), and
        by the scale, in this order. Its rounds are as many as make ``epochs`` local epochs, including those after the
        last round.
        """
        layers = [("regimes", regime), ("scales", scale)]
        at_regime, at_scale = (read_yaml(self.folder / kind / f"{name}.yaml") if name else {} for kind, name in layers)
        shared = merged({"name": method, "seed": seed}, read_yaml(self.folder / "shared.yaml"), at_regime)
        config = merged(shared, self.methods[method].config, nested(chosen), at_scale)
        parameters = create_algorithm(AlgorithmSection(**config["algorithm"])).parameters
        epochs, local_epochs = config.pop("epochs"), config["training"].get("local_epochs", 1)
        config["training"]["rounds"] = max(1, (epochs - parameters.final_local_epochs) // local_epochs)
        return config

    # -- what the search found ------------------------------------------------------------------------------------

    @property
    def search_file(self) -> Path:
        """The file of `searched`."""
        return self.folder / "search.json"

    def searched(self) -> dict[str, SearchResult]:
        """Return what the search has found so far, ``{method: result}``."""
        found = json.loads(self.search_file.read_text()) if self.search_file.exists() else {}
        return {method: SearchResult.model_validate(result) for method, result in found.items()}

    def write_searched(self, found: dict[str, SearchResult]) -> None:
        """Write what the search has found."""
        results = {method: result.model_dump(mode="json") for method, result in sorted(found.items())}
        self.search_file.write_text(json.dumps(results, indent=1) + "\n")

    def chosen(self, method: str) -> Settings:
        """Return the hyperparameters that the search chose for a method; nothing for one that was not searched."""
        found = self.searched()
        source = self.methods[method].search_as or method
        if source not in found:
            return {}
        space, result = self.methods[source].search, found[source]
        if result.chosen is not None:
            return result.chosen
        if space is None:
            return {}
        variant = result.with_variant(space.variant)
        changed = variant is not None and self.variant_gain(space.variant or {}) > 0
        designs = [candidate for candidate in result.candidates if candidate.changes in space.designs]
        return best([variant if variant is not None and changed else result.rate, *designs]).changes

    def variant_gain(self, variant: Settings) -> float:
        """Return the mean gain of score that a variant brings, over the methods that have it and were searched."""
        results = {method: result for method, result in self.searched().items() if method in self.methods}
        spaces = {method: self.methods[method].search for method in results}
        pairs = [
            (tried, result.rate)
            for method, result in results.items()
            if (space := spaces[method]) is not None
            and space.variant == variant
            and (tried := result.with_variant(variant)) is not None
        ]
        return sum(tried.score - rate.score for tried, rate in pairs) / len(pairs)

    def _yaml(self, kind: str) -> list[Path]:
        return sorted((self.folder / kind).glob("*.yaml"))


def best(candidates: Iterable[Candidate]) -> Candidate:
    """Return the candidate of the highest score."""
    return max(candidates, key=lambda candidate: candidate.score)


def nested(dotted: Settings) -> Settings:
    """Turn ``{"training.lr": 1}`` into ``{"training": {"lr": 1}}``."""
    result: Settings = {}
    for key, value in dotted.items():
        set_dotted(result, key, value)
    return result


def run_name(method: str, regime: str, seed: int) -> str:
    """Return the name of a run's folder, and of the folder of its result: ``REGIME/METHOD-SEED``."""
    return f"{regime}/{method}-{seed}" if regime else f"{method}-{seed}"
