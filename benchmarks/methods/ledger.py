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

Settings = dict[str, Any]
"""A part of an experiment, as in YAML: nested sections, or dotted keys."""


class SearchSpace(Section):
    """What the search tries for a method: learning rates, then a variant at the better one, then its other designs."""

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
    """What the search found for a method: the changes of the best candidate, and all candidates."""

    chosen: Settings
    candidates: tuple[Candidate, ...]


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
        return found[source].chosen if source in found else {}

    def _yaml(self, kind: str) -> list[Path]:
        return sorted((self.folder / kind).glob("*.yaml"))


def nested(dotted: Settings) -> Settings:
    """Turn ``{"training.lr": 1}`` into ``{"training": {"lr": 1}}``."""
    result: Settings = {}
    for key, value in dotted.items():
        set_dotted(result, key, value)
    return result


def run_name(method: str, regime: str, seed: int) -> str:
    """Return the name of a run's folder, and of the folder of its result: ``REGIME/METHOD-SEED``."""
    return f"{regime}/{method}-{seed}" if regime else f"{method}-{seed}"
