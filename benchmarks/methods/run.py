"""Run the ledger: every method on the same clients, with the same number of local epochs and the same search.

    python benchmarks/methods/run.py --search            # hyperparameters, on held-out images  -> search.json
    python benchmarks/methods/run.py                     # every run that is missing            -> results/
    python benchmarks/methods/run.py --scale smoke --out runs/smoke --results runs/smoke/results
    python benchmarks/methods/run.py --ledger benchmarks/methods/ablation  # one design at a time
    python benchmarks/methods/table.py                   # README.md and its figures from results/

An interrupted run goes on where it stopped when the command is given again. ledger.py describes the files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ledger import HERE, LR, RESULT, Candidate, Ledger, SearchResult, Settings, best, run_name

from sylva_ray.config.schema import read_yaml
from sylva_ray.core.summary import Summary
from sylva_ray.core.yaml import to_yaml
from sylva_ray.storage.run_folder import RunFolder

LEFT_OUT = ("class_names", "peak_memory_bytes_per_actor", "threat_model")
"""Keys of summary.json that are the same in every row, or large."""


class Job(NamedTuple):
    """A run of the ledger."""

    method: str
    regime: str
    seed: int


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


def search(ledger: Ledger, names: Sequence[str], regime: str, out: Path, pool: ThreadPoolExecutor) -> None:
    """Choose hyperparameters by one rule for all methods: see `ledger.SearchSpace`."""
    found = ledger.searched()
    spaces = {method: space for method in names if (space := ledger.methods[method].search) is not None}
    tried: dict[str, list[Candidate]] = {method: [] for method in spaces}

    def attempt(candidates: Sequence[tuple[str, Settings]]) -> None:
        jobs = [
            (method, pool.submit(candidate, ledger, method, regime, changes, out)) for method, changes in candidates
        ]
        for method, job in jobs:
            tried[method].append(job.result())

    attempt([(method, {LR: lr}) for method, space in spaces.items() for lr in space.lr])
    rates = {method: best(tried[method]).changes for method in spaces}
    attempt([(method, rates[method] | space.variant) for method, space in spaces.items() if space.variant is not None])
    attempt([(method, design) for method, space in spaces.items() for design in space.designs])
    ledger.write_searched(found | {method: SearchResult(candidates=tuple(tried[method])) for method in spaces})
    for method in ledger.searched():  # all of them: methods that share a variant take it together
        print(f"{method}: {ledger.chosen(method)}", flush=True)


def candidate(ledger: Ledger, method: str, regime: str, changes: Settings, out: Path) -> Candidate:
    """Try some changes: fewer epochs on another seed, scored by accuracies on images held out of training."""
    config = ledger.configuration(method, regime, changes, "search", seed=100)
    label = "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
    final = run(config, out / f"search-{method}-{label}").final
    benign = final.benign_balanced_accuracy.mean
    robust = next(iter(final.robust_balanced_accuracy.values())).mean
    return Candidate(changes=changes, benign_balanced=benign, robust_balanced=robust, score=benign + robust)


def fill(
    ledger: Ledger, jobs: Sequence[Job], scale: str | None, out: Path, results: Path, pool: ThreadPoolExecutor
) -> None:
    """Run what has no result yet, and write one folder per run: its summary, and every prediction."""
    has_search = any(ledger.methods[job.method].search for job in jobs)
    if scale != "smoke" and has_search and not ledger.search_file.exists():
        raise SystemExit(f"no {ledger.search_file} yet; first: {sys.executable} {Path(__file__).name} --search")

    def one(job: Job) -> str:
        name = run_name(*job)
        path = results / name / RESULT
        config = ledger.configuration(job.method, job.regime, ledger.chosen(job.method), scale, job.seed)
        if path.exists() and json.loads(path.read_text())["config"] != config:
            raise SystemExit(f"{path} is of another configuration; remove its folder")
        if not path.exists():
            summary = run(config, out / name)
            row: Settings = {"method": job.method, "seed": job.seed, "scale": scale or "cpu", "config": config}
            row |= {key: value for key, value in summary.to_json().items() if key not in LEFT_OUT}
            row["dataset"] = config["dataset"]["name"]  # the summary has its absolute path
            row["hardware"] = {key: value for key, value in (row["hardware"] or {}).items() if key != "host"}
            row["records"] = trajectory(out / name)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(RunFolder(out / name).predictions_file, path.parent)
            path.write_text(json.dumps(row) + "\n")
        final = json.loads(path.read_text())["final"]
        robust = next(iter(final["robust_accuracy"].values()))["mean"]
        return f"{name}: benign {100 * final['benign_accuracy']['mean']:.1f} robust {100 * robust:.1f}"

    for future in [pool.submit(one, job) for job in jobs]:
        print(future.result(), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line, and check its names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", type=lambda text: Ledger(Path(text)), default=Ledger(HERE), help="its folder")
    parser.add_argument("--search", action="store_true", help="choose hyperparameters, in one regime")
    parser.add_argument("--method", action="append", help="only this one (may be given again)")
    parser.add_argument("--regime", action="append", help="likewise; the search has one of its own")
    parser.add_argument("--scale", help="changes for another machine, or smoke")
    parser.add_argument("--seeds", type=int, help="seeds per method (default: what its file says)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/ledger"), help="run folders and logs")
    parser.add_argument("--results", type=Path, help="default: results/ of the ledger")
    arguments = parser.parse_args()
    ledger: Ledger = arguments.ledger
    arguments.method = arguments.method or list(ledger.methods)
    arguments.regime = arguments.regime or ledger.regimes
    arguments.results = arguments.results or ledger.folder / "results"
    scales = [arguments.scale] if arguments.scale else []
    for what, given, known in [
        ("method", arguments.method, list(ledger.methods)),
        ("regime", arguments.regime, ledger.regimes),
        ("scale", scales, ledger.scales),
    ]:
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"no such {what}: {', '.join(unknown)}; {ledger.folder} has: {', '.join(known)}")
    return arguments


def main() -> None:
    """Search, or fill in the ledger."""
    arguments = parse_arguments()
    ledger, names, scale = arguments.ledger, arguments.method, arguments.scale
    with ThreadPoolExecutor(arguments.workers) as pool:
        if arguments.search:
            search(ledger, names, arguments.regime[0], arguments.out, pool)
            return
        seeds = {name: arguments.seeds or (1 if scale == "smoke" else ledger.methods[name].seeds) for name in names}
        jobs = [Job(name, regime, seed) for name in names for regime in arguments.regime for seed in range(seeds[name])]
        jobs.sort(key=lambda job: (arguments.regime.index(job.regime), -seeds[job.method], job.seed, job.method))
        fill(ledger, jobs, scale, arguments.out, arguments.results, pool)


if __name__ == "__main__":
    main()
