"""Every script of benchmarks/, examples/ and scripts/ starts, and runs once where that can be made small.

The scripts in scripts/ run in full in `tests/execution/test_without_a_cloud.py`, the example in
`tests/test_examples.py`.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from sylva_ray.metrics.predictions import write_predictions
from sylva_ray.storage.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "examples", "scripts")
SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

SMALL = [
    *("dataset.name=digits", "dataset.max_train=150", "dataset.max_test=60", "partition.num_clients=3"),
    *("partition.min_samples=20", "partition.test_samples=10", "training.augment=none", "attack.steps=1"),
]
"""Changes of configs/cifar10.yaml that need no download and a few seconds."""


def run(script: str | Path, *arguments: object) -> str:
    """The output of a script that ends well, in a process of its own with one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script in this process, as most of a short start is the import of torch; returns its output."""

    def call(script: str, *arguments: object) -> str:
        path = ROOT / script
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(path.parent))
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_explains_itself(
    script: str, run_here: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str((ROOT / script).parent))  # where Python looks when a script is started
    text = (ROOT / script).read_text()
    if "from flwr" in text and find_spec("flwr") is None:
        pytest.skip("Flower is not installed: benchmarks/peers/peers.py makes an environment for it")
    if "__main__" in text:
        with pytest.raises(SystemExit) as end:
            run_here(script, "--help")
        assert not end.value.code
        assert "usage:" in capsys.readouterr().out
    else:  # imported by others
        assert runpy.run_path(str(ROOT / script))["__doc__"]


@pytest.mark.slow
def test_kernels(run_here: Callable[..., str]) -> None:
    lines = run_here("benchmarks/kernels.py", "--backbone", "vit_micro", "--attack-steps", 1).splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [
        [f"{precision},", step] for precision in ("float32", "bfloat16") for step in ("even", "ragged")
    ]
    assert all(int(line.split()[2]) > 100 and line.split()[3] == "0" for line in lines)


def test_train_round(run_here: Callable[..., str]) -> None:
    line = run_here("benchmarks/train_round.py", "--clients", 3, "--images", 100)
    assert " 1 cohorts, " in line
    assert float(line.split()[0]) > 0


@pytest.mark.slow
def test_step(run_here: Callable[..., str]) -> None:
    lines = run_here("benchmarks/step.py", "--images", 4, "--repeats", 1).splitlines()
    assert [line.split()[:2] for line in lines[3:7]] == [
        [precision, attention] for precision in ("float32", "bfloat16") for attention in ("fused", "plain")
    ]


def test_merging(run_here: Callable[..., str]) -> None:
    rows = run_here("benchmarks/merging.py", "--clients", 4, "--repeats", 1).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| moved", "4"], ["| groups", "4"], ["| unrelated", "4"]]


def test_guard(run_here: Callable[..., str]) -> None:
    """The draws have fixed seeds; of 40 fleets, 30 more or less keep a true gain, and some of the overfitted ones."""
    rows = run_here("benchmarks/guard.py", "--fleets", 40).splitlines()[2:]
    cells = {row.split("|")[1].strip(): row.split("|")[4] for row in rows}
    kept, false = (
        {name: float(cell.replace("(", "").split("%")[part]) for name, cell in cells.items()} for part in (0, 1)
    )
    assert len(kept) == 6
    assert kept["overfit: benign -2, robust 0"] < 15
    assert kept["harm: benign +2, robust -10"] < 55
    assert false["harm: benign +2, robust -10"] < 20  # a quarter of the way costs less than the tolerance
    assert kept["gain: benign +3, robust 0"] > 50


def test_the_claim_of_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Better on every image in both accuracies: dominates always. In one of them, or the same: never."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    differences = runpy.run_path(str(ROOT / "benchmarks" / "methods" / "claim.py"))["differences"]
    rng = np.random.default_rng(0)
    labels = [[rng.integers(0, 3, 40) for _ in range(4)] for _ in range(2)]
    ours = [[np.stack([y == y, y == 9]) for y in seed] for seed in labels]  # all right, and none under attack
    better = [[np.stack([y == y, y == 1]) for y in seed] for seed in labels]
    worse = [[np.stack([y == 1, y == 1]) for y in seed] for seed in labels]
    found = differences({"ours": ours, "same": ours, "gains": better, "mixed": worse}, labels, "ours", rng, 50)
    for statistic in ("mean", "worst decile"):
        same, gains, mixed = (found[name][statistic] for name in ("same", "gains", "mixed"))
        assert (same.benign, same.dominates, same.is_ahead) == ((0, 0, 0), 0, False)
        assert (gains.benign, gains.robust[0], gains.is_ahead) == ((0, 0, 0), pytest.approx(1 / 3), True)
        assert (mixed.benign[0], mixed.is_ahead, mixed.dominates) == (pytest.approx(-2 / 3), False, 0)


def test_images_with_equal_shares_are_weighed_by_the_clients_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    weighted = runpy.run_path(str(ROOT / "benchmarks" / "methods" / "own_shares.py"))["weighted_accuracies"]
    labels = [np.array([0, 0, 2, 2]), np.array([1, 1])]
    correct = [np.array([True, True, True, False]), np.array([True, False])]
    counts = np.array([[30, 5, 10], [7, 1, 0]])  # a class without a test image does not count
    np.testing.assert_allclose(weighted(correct, labels, counts), [(30 + 10 / 2) / 40, 1 / 2])
    np.testing.assert_allclose(weighted(correct, labels, counts >= 8), [(1 + 1 / 2) / 2])  # the other has none so large


def test_a_seed_of_the_ledger_counts_once_all_methods_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    names = runpy.run_path(str(ROOT / "benchmarks" / "methods" / "table.py"))
    results = ROOT / "benchmarks" / "methods" / "second" / "results" / "robust-0.3"
    for name in ("sylva-0", "sylva-1", "sylva-2", "per_lora-1", "per_lora-2"):
        shutil.copytree(results / name, tmp_path / "results" / "regime" / name)
    assert {row.seeds for row in names["load_rows"](names["Ledger"](tmp_path), "regime")} == {(1, 2)}


def test_the_overview_names_who_is_better_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    names = runpy.run_path(str(ROOT / "benchmarks" / "methods" / "overview.py"))
    better = names["_better"]
    accuracies = {"a": (0.6, 0.3), "b": (0.6, 0.31), "c": (0.7, 0.29), "d": (0.6, 0.3), "e": (0.7, 0.4)}
    assert better(accuracies, "a") == "`e`, `b`"  # c is worse in one, d equal in both
    assert better(accuracies, "e") == "nobody"
    many = {"a": (0.1, 0.1)} | {str(k): (0.2 + k / 100, 0.2) for k in range(5)}
    assert better(many, "a") == "`4`, `3`, `2`, 2 more"
    unfinished = names["overview_line"]("title", ROOT, "none", [], "a", "b")
    assert unfinished.count("|") == names["HEADER"].splitlines()[0].count("|")


def test_equal_bytes_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of twice the rounds uploads as much a round as Sylva does, and more in all."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    names = runpy.run_path(str(ROOT / "benchmarks" / "methods" / "table.py"))
    rows = names["load_rows"](names["Ledger"](), "robust-0.3-eps4")
    named = {row.name: row for row in rows}
    longer, sylva = named["fedavg_at_ft_lora_12"], named["sylva"]
    assert longer.upload_bytes.mean <= sylva.upload_bytes.mean
    assert longer.name not in names["equal_bytes"](rows)
    assert "mean: sylva" in names["equal_bytes"](rows)


@pytest.mark.parametrize("script", ["game", "refinement"])
def test_an_epsilon_that_is_none_is_refused_in_one_line(script: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "methods" / f"{script}.py"), "--epsilon", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("must be a number or a fraction such as 4/255")


def test_the_layer_game_keeps_other_results_from_the_same_end_of_phase_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    with_rows = runpy.run_path(str(ROOT / "benchmarks" / "methods" / "game.py"))["with_rows"]

    def row(ranking: str, seed: int, epsilon: str = "4/255", before: float = 0.5) -> dict[str, object]:
        setting = {"ranking": ranking, "seed": seed, "alpha": 0.3, "epsilon": epsilon}
        return setting | {"before_benign_accuracy": before}

    earlier = [row(name, seed) for name in ("shapley", "random") for seed in (0, 1)]
    earlier.append(row("random", 0, "2/255", before=0.6))
    new = row("random", 0) | {"new": True}
    found = with_rows(earlier, [new])
    assert new in found
    assert len(found) == len(earlier)
    assert all(old in found for old in earlier if old != row("random", 0))
    with pytest.raises(SystemExit, match=r"rankings of seed 1 .* one end of phase 1"):
        with_rows(earlier, [row("greedy", 1, before=0.7)])
    samples = [{"alpha": 0.3, "epsilon": "4/255", "seed": seed} for seed in (0, 0, 1)]
    assert [s["seed"] for s in with_rows(samples, [samples[-1], samples[-1]])] == [0, 0, 1, 1]
    skewed = row("random", 0, before=0.7) | {"alpha": 0.1}  # another partition has another end of phase 1
    assert len(with_rows(earlier, [skewed])) == len(earlier) + 1


def test_the_standard_error_of_weighed_images_is_that_of_repeated_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    names = runpy.run_path(str(ROOT / "benchmarks" / "methods" / "own_shares.py"))
    rng, y, counts = np.random.default_rng(0), np.repeat([0, 1, 2], 100), np.array([[60, 30, 10]])
    draws = [rng.random(300) < np.array([0.9, 0.5, 0.3])[y] for _ in range(2000)]
    accuracies = [names["weighted_accuracies"]([draw], [y], counts)[0] for draw in draws]
    errors = [names["standard_errors"]([draw], [y], counts)[0] for draw in draws]
    assert np.mean(errors) == pytest.approx(np.std(accuracies), rel=0.05)


def test_a_constant_answer_is_neither_better_nor_worse_than_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    verdicts = runpy.run_path(str(ROOT / "benchmarks" / "methods" / "own_shares.py"))["_verdicts"]
    labels = [np.repeat([0, 1], 50)] * 3
    answers = [np.zeros(100, int), labels[0], 1 - labels[0]]  # constant, all right, all wrong
    write_predictions(RunFolder(tmp_path), [{"pgd": answer} for answer in answers], labels)
    (tmp_path / "result.json").write_text(json.dumps({"label_matrix": [[70, 30]] * 3}))
    assert verdicts(tmp_path, "pgd") == [1, 1, 1]


def test_a_variant_of_the_ledger_is_taken_by_all_that_share_it_or_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "methods"))
    ledger = runpy.run_path(str(ROOT / "benchmarks" / "methods" / "ledger.py"))["Ledger"]
    assert ledger(ROOT / "benchmarks" / "methods" / "small").chosen("fedavg_at")  # a frozen search
    variant = {"algorithm.class_balance": 0.9}

    def found(rate: float, balanced: float) -> dict[str, object]:
        pairs: list[tuple[dict[str, float], float]] = [
            ({"training.lr": 0.1}, rate),
            ({"training.lr": 0.2}, 0.0),
            ({"training.lr": 0.1} | variant, balanced),
        ]
        rows = [{"changes": c, "benign_balanced": 0, "robust_balanced": 0, "score": score} for c, score in pairs]
        return {"candidates": rows}

    (tmp_path / "methods").mkdir()
    for name in "ab":
        text = {"seeds": 1, "search": {"lr": [0.1, 0.2], "variant": variant}, "config": {}}
        (tmp_path / "methods" / f"{name}.yaml").write_text(json.dumps(text))
    for loss_of_b, chosen in ((0.1, {"training.lr": 0.1} | variant), (0.5, {"training.lr": 0.1})):
        searched = {"a": found(0.5, 0.8), "b": found(0.6, 0.6 - loss_of_b)}  # a gains 0.3
        (tmp_path / "search.json").write_text(json.dumps(searched))
        assert [ledger(tmp_path).chosen(name) for name in "ab"] == [chosen, chosen]


@pytest.mark.slow
def test_chaos(tmp_path: Path) -> None:
    lines = run("scripts/chaos.py", "--faults", 2, "--only", "kill,torn", "--folder", tmp_path / "runs").splitlines()
    assert [line.split()[0] for line in lines] == ["survived", "survived", "2"]


@pytest.mark.slow
def test_sizing() -> None:
    assert run("benchmarks/sizing.py", "--cohorts", 1).splitlines()[-1].startswith("| 1 | ")


@pytest.mark.slow
def test_cifar10_table_and_the_throughput_of_attacks_on_one_of_its_runs(tmp_path: Path) -> None:
    fast = ["cluster.pool=in_process", "tracking.enabled=false", "training.rounds=1", "algorithm.phase2.enabled=false"]
    attacks = "evaluation.attacks=[{name: pgd, epsilon: 4/255, steps: 2}]"
    table = run("benchmarks/cifar10_table.py", *SMALL, *fast, attacks, "--out", tmp_path).splitlines()[-7:]
    first_cells = [line.split(" | ")[0].removeprefix("| ") for line in table[2:]]
    assert first_cells == ["majority", "undefended", "per_lora", "sylva, phase 1", "sylva, phase 2"]
    options = ["--images", 2, "--rounds", 1, "--clients", 2, "--only", "pgd20"]
    throughput = run("benchmarks/evaluation_throughput.py", tmp_path / "sylva", *options).splitlines()
    assert throughput[-2].startswith("| `pgd20-eps4` | ")


@pytest.mark.slow
def test_evaluation_precision() -> None:
    rows = run("benchmarks/evaluation_precision.py", *SMALL, "--seeds", 0, "--rounds", 1).splitlines()[1:]
    assert len(rows) == 5
    assert all(0 <= float(row.split()[2]) <= 100 for row in rows)


@pytest.mark.slow
def test_sweep_tracking() -> None:
    assert "whole run" in run("benchmarks/sweep_tracking.py", "--trials", 2, "--pairs", 1)


@pytest.mark.slow
def test_round_overhead() -> None:
    assert "ratio" in run("benchmarks/round_overhead.py", "--rounds", 2)


@pytest.mark.slow
def test_startup() -> None:
    assert "whole command" in run("benchmarks/startup.py", "--actors", 1)


@pytest.mark.slow
def test_the_layer_game_in_the_ledger(tmp_path: Path) -> None:
    options = [
        "--scale",
        "smoke",
        "--seeds",
        0,
        "--ranking",
        "random",
        "--out",
        tmp_path,
        "--result",
        tmp_path / "game",
    ]
    assert "| both | " in run("benchmarks/methods/game.py", *options)
    found = json.loads((tmp_path / "game").read_text())
    assert {row["pairs"] for row in found["sampling"]} == {2, 8, 32}
    assert all(row["largest_error"] < 0.5 for row in found["sampling"] if row["pairs"] == 32)
    assert len(found["surrogate"]) == 4


@pytest.mark.slow
def test_losses_of_the_refinement(tmp_path: Path) -> None:
    lines = run("benchmarks/methods/refinement.py", "--scale", "smoke", "--seeds", 0, "--out", tmp_path).splitlines()
    assert len(lines) == 2 + 1 + 9 * 2
    assert lines[2].startswith("| after phase 1 |")


@pytest.mark.slow
def test_one_method_of_the_ledger(tmp_path: Path) -> None:
    options = ["--scale", "smoke", "--method", "undefended", "--regime", "robust-0.3", "--seeds", 1, "--workers", 1]
    assert "robust-0.3/undefended-0: benign" in run(
        "benchmarks/methods/run.py", *options, "--out", tmp_path, "--results", tmp_path / "results"
    )
    assert (tmp_path / "results" / "robust-0.3" / "undefended-0" / "result.json").is_file()


@pytest.mark.slow
def test_the_page_of_the_ledger_is_what_its_results_say(tmp_path: Path) -> None:
    """A copy, since the script writes beside itself."""
    folder = shutil.copytree(ROOT / "benchmarks" / "methods", tmp_path / "methods")
    (folder / "README.md").unlink()
    run(folder / "table.py")
    assert (folder / "README.md").read_text() == (ROOT / "benchmarks" / "methods" / "README.md").read_text()
