"""Run the ledger: every method on the same clients, with the same number of local epochs and the same search.

    python benchmarks/methods/run.py --search            # hyperparameters, on held-out images  -> search.json
    python benchmarks/methods/run.py                     # every (method, seed) that is missing  -> results/*.json
    python benchmarks/methods/run.py --scale smoke --out runs/smoke --results runs/smoke/results
    python benchmarks/methods/table.py                   # README.md and ledger.png from results/

A method's configuration is shared.yaml, then its own file, then what the search chose, then the scale.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import AlgorithmSection
from sylva_ray.config.schema import merged, read_yaml, set_dotted
from sylva_ray.core.sections import Section
from sylva_ray.core.summary import Summary
from sylva_ray.core.yaml import to_yaml
from sylva_ray.storage.run_folder import RunFolder

HERE = Path(__file__).parent
RESULTS, SEARCH = HERE / "results", HERE / "search.json"
LR = "training.lr"
LEFT_OUT = ("label_matrix", "class_names", "peak_memory_bytes_per_actor", "threat_model")
"""Keys of summary.json that are the same in every row, or large."""


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


def load_search() -> dict[str, SearchResult]:
    """Return what the search has found so far, ``{method: result}``."""
    found = json.loads(SEARCH.read_text()) if SEARCH.exists() else {}
    return {method: SearchResult.model_validate(result) for method, result in found.items()}


def nested(dotted: Settings) -> Settings:
    """Turn ``{"training.lr": 1}`` into ``{"training": {"lr": 1}}``."""
    result: Settings = {}
    for key, value in dotted.items():
        set_dotted(result, key, value)
    return result


def methods() -> dict[str, MethodFile]:
    """Read the files of all methods, ``{method: file}``."""
    return {path.stem: MethodFile.model_validate(read_yaml(path)) for path in sorted((HERE / "methods").glob("*.yaml"))}


def configuration(method: str, chosen: Settings, scale: str | None, seed: int) -> Settings:
    """Return the experiment of one method and seed.

    Its rounds are as many as make ``epochs`` local epochs, including those after the last round.
    """
    overlay = read_yaml(HERE / "scales" / f"{scale}.yaml") if scale else {}
    base = merged({"name": method, "seed": seed}, read_yaml(HERE / "shared.yaml"), methods()[method].config)
    config = merged(base, nested(chosen), overlay)
    parameters = create_algorithm(AlgorithmSection(**config["algorithm"])).parameters
    epochs, local_epochs = config.pop("epochs"), config["training"].get("local_epochs", 1)
    config["training"]["rounds"] = max(1, (epochs - parameters.final_local_epochs) // local_epochs)
    return config


def run(config: Settings, folder: Path) -> Summary:
    """Return the summary of an earlier run, or make a new one, whose output is written to ``folder``.log."""
    path, log_path = (folder.parent / f"{folder.name}.{ending}" for ending in ("yaml", "log"))
    if path.exists() and read_yaml(path) != config:
        raise SystemExit(f"{path} holds another configuration; remove {folder} and it, or choose another --out")
    run_folder = RunFolder(folder)
    if not run_folder.summary_file.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(config))
        command = [sys.executable, "-m", "sylva_ray.cli", "run", str(path), "--out", str(folder), "--quiet"]
        resume = ["--resume"] if run_folder.config_file.exists() else []
        with open(log_path, "w") as log:
            done = subprocess.run([*command, *resume], stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise SystemExit(f"{folder.name} failed: {log_path.read_text()[-500:]}")
    summary = run_folder.load_summary()
    assert summary is not None
    return summary


def trajectory(folder: Path) -> list[dict[str, object]]:
    """Return what bytes-to-target needs of a run's records."""
    keys = ("round", "stage", "upload_bytes", "download_bytes", "evaluation")
    records = [record.to_json() for record in RunFolder(folder).load_records()]
    return [{key: record[key] for key in keys} for record in records]


def search(names: Sequence[str], out: Path, pool: ThreadPoolExecutor) -> None:
    """Choose hyperparameters by one rule for all methods: see `SearchSpace`."""
    found = load_search()
    spaces = {method: space for method in names if (space := methods()[method].search) is not None}
    tried: dict[str, list[Candidate]] = {method: [] for method in spaces}

    def best(method: str) -> Settings:
        return max(tried[method], key=lambda candidate: candidate.score).changes

    def attempt(candidates: Sequence[tuple[str, Settings]]) -> None:
        jobs = [(method, pool.submit(candidate, method, changes, out)) for method, changes in candidates]
        for method, job in jobs:
            tried[method].append(job.result())

    attempt([(method, {LR: lr}) for method, space in spaces.items() for lr in space.lr])
    attempt([(method, best(method) | space.variant) for method, space in spaces.items() if space.variant is not None])
    attempt([(method, design) for method, space in spaces.items() for design in space.designs])
    for method in spaces:
        found[method] = SearchResult(chosen=best(method), candidates=tuple(tried[method]))
        print(f"{method}: {found[method].chosen}", flush=True)
    results = {method: result.model_dump(mode="json") for method, result in sorted(found.items())}
    SEARCH.write_text(json.dumps(results, indent=1) + "\n")


def candidate(method: str, changes: Settings, out: Path) -> Candidate:
    """Try some changes: half the rounds on another seed, scored by accuracies on images held out of training."""
    config = configuration(method, changes, "search", seed=100)
    label = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
    final = run(config, out / f"search-{method}-{label}").final
    benign = final.benign_balanced_accuracy.mean
    robust = next(iter(final.robust_balanced_accuracy.values())).mean
    return Candidate(changes=changes, benign_balanced=benign, robust_balanced=robust, score=benign + robust)


def ledger(
    jobs: Sequence[tuple[str, int]], scale: str | None, out: Path, results: Path, pool: ThreadPoolExecutor
) -> None:
    """Run what has no result yet, and write one JSON file per method and seed."""
    if scale != "smoke" and not SEARCH.exists():
        raise SystemExit(f"no {SEARCH.name} yet; first: {sys.executable} {Path(__file__).name} --search")
    searched = load_search()
    results.mkdir(parents=True, exist_ok=True)

    def one(method: str, seed: int) -> str:
        path = results / f"{method}-{seed}.json"
        if not path.exists():
            source = methods()[method].search_as or method
            config = configuration(method, searched[source].chosen if source in searched else {}, scale, seed)
            summary = run(config, out / f"{method}-{seed}")
            row: Settings = {"method": method, "seed": seed, "scale": scale or "cpu", "config": config}
            row |= {key: value for key, value in summary.to_json().items() if key not in LEFT_OUT}
            row["records"] = trajectory(out / f"{method}-{seed}")
            path.write_text(json.dumps(row) + "\n")
        final = json.loads(path.read_text())["final"]
        robust = next(iter(final["robust_accuracy"].values()))["mean"]
        return f"{method} {seed}: benign {100 * final['benign_accuracy']['mean']:.1f} robust {100 * robust:.1f}"

    for future in [pool.submit(one, method, seed) for method, seed in jobs]:
        print(future.result(), flush=True)


def main() -> None:
    """Search, or fill in the ledger."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="choose hyperparameters")
    parser.add_argument("--method", action="append", help="only this one (may be given again)")
    parser.add_argument("--scale", choices=sorted(path.stem for path in (HERE / "scales").glob("*.yaml")))
    parser.add_argument("--seeds", type=int, help="seeds per method (default: what its file says)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/ledger"), help="run folders and logs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    unknown = set(arguments.method or ()) - set(methods())
    if unknown:
        parser.error(f"no such method: {', '.join(sorted(unknown))}; known: {', '.join(methods())}")
    names = arguments.method or list(methods())
    with ThreadPoolExecutor(arguments.workers) as pool:
        if arguments.search:
            search(names, arguments.out, pool)
            return
        seeds = {
            name: arguments.seeds or (1 if arguments.scale == "smoke" else methods()[name].seeds) for name in names
        }
        order = sorted((-seeds[name], seed, name) for name in names for seed in range(seeds[name]))
        ledger([(name, seed) for _, seed, name in order], arguments.scale, arguments.out, arguments.results, pool)


if __name__ == "__main__":
    main()
