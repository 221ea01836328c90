"""Points from trials: means over seeds, what is chosen, the Pareto front; the report shows it all."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import JsonValue
from rich.console import Console

from sylva_ray.config.schema import build
from sylva_ray.core.records import ClientAccuracies, StageRecord
from sylva_ray.sweeps.events import AttemptEvent
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.metrics import busy_seconds, step_metrics
from sylva_ray.sweeps.points import Trial
from sylva_ray.sweeps.report import render
from sylva_ray.sweeps.results import Sweep, TrialResult, collect_results, front_of, markdown, union_length
from sylva_ray.sweeps.space import Objective, Parameter, Space
from sylva_ray.sweeps.terminal import SweepLog, sweep_table
from tests.conftest import TINY


def make_space(*metrics: str, seeds: tuple[int, ...] = (0, 1), **keys: Any) -> Space:
    """Return a space of three ranks with the given metrics as objectives."""
    ranks = build(Parameter, {"grid": [2, 4, 8]})
    objectives = [{"metric": metric, "mode": "min" if metric == "total_bytes" else "max"} for metric in metrics]
    raw = {
        "name": "toy",
        "experiment": TINY,
        "parameters": {"lora.rank": ranks},
        "seeds": seeds,
        "objectives": objectives,
    }
    return build(Space, raw | keys)


def result(
    rank: int, seed: int, benign: float, robust: float, state: str = "finished", workers: int = 1, **more: Any
) -> TrialResult:
    """Return the result of one trial."""
    trial = Trial({"lora.rank": rank}, seed)
    metrics = {"benign_accuracy": benign, "robust_accuracy": robust, "total_bytes": 1000.0 * rank, "seconds": 5.0}
    spans = [(100.0 * seed, 100.0 * seed + 10)]
    return TrialResult(trial.key, trial.point, trial.values, seed, state, metrics, [], 2, spans, workers, 5.0, **more)


def sweep_of(space: Space, trials: list[TrialResult]) -> Sweep:
    """Return the results of a sweep."""
    return Sweep.from_trials(space, trials, Path("toy"))


def chosen(sweep: Sweep) -> list[Any]:
    """Return the ranks of the chosen points."""
    ranks: list[Any] = [point.values["lora.rank"] for point in sweep.chosen]
    return sorted(ranks)


def test_a_point_is_the_mean_of_its_seeds_and_the_best_mean_is_chosen() -> None:
    """The point with the best single trial is not the best."""
    trials = [result(2, 0, 0.9, 0.5), result(2, 1, 0.9, 0.7), result(4, 0, 0.9, 0.9), result(4, 1, 0.9, 0.1)]
    sweep = sweep_of(make_space("robust_accuracy"), trials)
    best = sweep.points[0]
    assert (best.values["lora.rank"], best.chosen) == (2, True)
    assert best.metrics["robust_accuracy"].mean == pytest.approx(0.6)
    assert best.metrics["robust_accuracy"].std == pytest.approx(np.std([0.5, 0.7], ddof=1))
    assert chosen(sweep) == [2]


def test_of_points_with_equal_objectives_the_one_with_the_higher_benign_accuracy_is_the_best() -> None:
    trials = [result(2, 0, 0.7, 0.5), result(4, 0, 0.9, 0.5), result(8, 0, 0.8, 0.5)]
    trials += [result(rank, 1, trials[i].metrics["benign_accuracy"], 0.5) for i, rank in enumerate((2, 4, 8))]
    sweep = sweep_of(make_space("robust_accuracy"), trials)
    assert [point.values["lora.rank"] for point in sweep.points] == [4, 8, 2]
    assert chosen(sweep) == [4]


def test_a_point_that_lacks_a_seed_is_not_chosen_and_comes_last() -> None:
    """A pruned trial has no result, whatever it had reached."""
    trials = [result(2, 0, 0.9, 0.2), result(2, 1, 0.9, 0.2)]
    trials += [
        result(4, 0, 0.9, 0.9),
        result(4, 1, 0.9, 0.9, state="pruned"),
        result(8, 0, 0, 0, state="failed", error="boom"),
    ]
    sweep = sweep_of(make_space("robust_accuracy"), trials)
    assert chosen(sweep) == [2]
    assert [point.complete for point in sweep.points] == [True, False, False]
    assert [trial.error for trial in sweep.failed] == ["boom"]


def test_the_front_is_what_brute_force_says() -> None:
    """On random points with ties, and with one objective that is minimised."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, (30, 2)) / 6
    space = make_space("benign_accuracy", "robust_accuracy", seeds=(0,))
    trials = [result(rank, 0, float(benign), float(robust)) for rank, (benign, robust) in enumerate(values, 1)]
    dominated = {i + 1 for i, a in enumerate(values) if any((b >= a).all() and (b > a).any() for b in values)}
    sweep = sweep_of(space, trials)
    assert chosen(sweep) == sorted(set(range(1, 31)) - dominated)
    lower_is_better = front_of(sweep.points, (Objective(metric="total_bytes", mode="min"),))
    assert [point.values["lora.rank"] for point in lower_is_better] == [1]


def test_utilisation_counts_the_time_in_which_trials_ran() -> None:
    """Time without a trial does not count."""
    assert union_length([(0, 10), (5, 12), (100, 101)]) == 13
    trials = [result(2, seed, 0.5, 0.5, workers=2) for seed in (0, 1)]  # 10 s each, 5 of them busy, far apart
    assert sweep_of(make_space("robust_accuracy"), trials).busy_share == pytest.approx(10 / (2 * 20))
    beside = [result(2, 0, 0.5, 0.5, workers=2), result(4, 0, 0.5, 0.5, workers=5)]
    assert sweep_of(make_space("robust_accuracy"), beside).workers == 2 + 5


def record(step: int, evaluation: dict[str, ClientAccuracies] | None) -> StageRecord:
    """Return the record of a step."""
    return StageRecord(
        step=step,
        stage="phase1",
        round=step,
        participants=[0, 1, 2],
        evaluation=evaluation,
        upload_bytes=10,
        download_bytes=5,
        seconds={"train": 1.0, "attack": 2.0, "aggregate": 9.0, "wall": 4.0},
    )


def test_metrics_keep_the_newest_values_and_leave_attackers_out() -> None:
    """The second step is not evaluated."""
    space = make_space("robust_accuracy")
    config = space.config({"lora.rank": 2}, 0)
    label = config.evaluation.specs[0].label

    def table(*accuracies: float) -> ClientAccuracies:
        return ClientAccuracies(accuracy=list(accuracies), balanced_accuracy=list(accuracies))

    records = [record(0, {"benign": table(0.2, 0.4, 0.6), label: table(0.0, 0.1, 0.2)}), record(1, None)]
    found = step_metrics(records, config)
    assert found["benign_accuracy"] == pytest.approx(0.4)
    assert found["robust_accuracy"] == pytest.approx(0.1)
    assert found["robust_accuracy.worst_decile"] == 0.0
    assert (found["total_bytes"], found["seconds"]) == (30, 8)
    assert busy_seconds(records) == 6
    liars = config.model_copy(update={"byzantine": config.byzantine.model_copy(update={"fraction": 0.34})})
    from sylva_ray.transport.byzantine import byzantine_clients

    honest = [c for c in range(3) if c not in byzantine_clients(liars)]
    assert step_metrics(records, liars)["benign_accuracy"] == pytest.approx(
        np.mean([(0.2, 0.4, 0.6)[c] for c in honest])
    )


@pytest.mark.parametrize("metrics", [("robust_accuracy",), ("benign_accuracy", "robust_accuracy")])
def test_the_report_is_one_page_with_every_point_and_plot(metrics: tuple[str, ...]) -> None:
    """It links to nothing, and texts are escaped."""
    trials = [result(rank, seed, 0.9 - rank / 40, rank / 10) for rank in (2, 4, 8) for seed in (0, 1)]
    trials[0] = result(2, 0, 0.9, 0.2, checks=("S14",))
    trials.append(result(16, 0, 0.1, 0.1, state="failed", error="<b>CUDA</b> out of memory"))
    sweep = sweep_of(make_space(*metrics), trials)
    page = render(sweep)
    assert all(point.name in page for point in sweep.points)
    assert page.count("<svg") == 8  # each twice: wide, and for phones
    assert "<title>rank=4: robust accuracy 40.0 %</title>" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "&lt;b&gt;CUDA" in page
    assert "S14" in page
    assert ("Best:" in page) == (len(metrics) == 1)
    assert len(metrics) == 1 or "A point is dominated if" in page
    text = markdown(sweep)
    assert all(f"`{point.name}`" in text for point in sweep.points)


def test_an_unfinished_sweep_has_a_report_too() -> None:
    """Without a finished trial there is no best point."""
    trials = [result(2, 0, 0, 0, state="failed", error="boom"), result(4, 0, 0.5, 0.5, state="pruned")]
    page = render(sweep_of(make_space("robust_accuracy"), trials))
    assert "nothing to choose from" in page


def test_the_result_of_a_sweep_is_one_json_object() -> None:
    trials = [result(rank, seed, 0.9, rank / 10) for rank in (2, 4, 8) for seed in (0, 1)]
    written: list[str] = []
    SweepLog(written.append, "json").tell_result(sweep_of(make_space("robust_accuracy"), trials), Path("toy"))
    event = json.loads(written[0])
    assert event["chosen"][0]["values"] == {"lora.rank": 8}
    assert event["chosen"][0]["metrics"]["robust_accuracy"]["mean"] == pytest.approx(0.8)
    assert event["trials"] == {"finished": 6}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_of_a_sweep_cuts_no_value(width: int) -> None:
    """A point with one of two seeds says so."""
    names: dict[str, JsonValue] = {
        "lora.rank": 8,
        "attack.epsilon": "4/255",
        "partition.num_clients": 12,
        "algorithm.name": "fedavg_at_ft",
    }
    parameters = {key: build(Parameter, {"grid": [value]}) for key, value in names.items()}
    space = make_space("robust_accuracy", parameters=parameters)
    states = ("finished", "failed")
    trials = [
        replace(result(8, seed, 0.912, 0.345, state), values=names, point="p") for seed, state in enumerate(states)
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(sweep_table(console, sweep_of(space, trials)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "1 of 2" in text
    assert "34.5" in text
    folded = "".join(text.split())
    assert all(value in folded for value in ("4/255", "12", "fedavg_at_ft"))


def test_a_cost_that_is_an_objective_is_in_every_table() -> None:
    trials = [result(rank, seed, 0.9, rank / 10) for rank in (2, 4) for seed in (0, 1)]
    console = Console(width=50, record=True, file=io.StringIO())
    console.print(sweep_table(console, sweep_of(make_space("robust_accuracy", "total_bytes"), trials)))
    assert "bytes" in console.export_text()


def test_the_report_names_every_attack_that_points_are_measured_under() -> None:
    """The point with the weakest attack looks best."""
    attacks = [[{"epsilon": "1/255", "steps": 1}], [{"epsilon": "8/255", "steps": 20}]]
    space = make_space("robust_accuracy", seeds=(0,))
    for key, values in (
        ("evaluation.attacks", attacks),
        ("evaluation", [TINY["evaluation"] | {"attacks": attack} for attack in attacks]),
    ):
        swept = space.model_copy(update={"parameters": {key: Parameter(grid=tuple(values))}})
        trials = [
            replace(result(2, 0, 0.5, 0.4), key=f"t{n}", point=f"p{n}", values={key: value})
            for n, value in enumerate(values)
        ]
        page = render(sweep_of(swept, trials))
        assert "which points differ in: PGD-1 at epsilon 1/255; PGD-20 at epsilon 8/255" in page
        assert "answer different questions" in page
    page = render(sweep_of(space, [result(2, 0, 0.5, 0.4)]))
    assert "Robust accuracy is under PGD" in page
    assert "answer different questions" not in page


def test_a_trial_that_only_vanished_has_failed_and_was_not_pruned(tmp_path: Path) -> None:
    space = make_space("robust_accuracy", seeds=(0,))
    folder = SweepFolder(tmp_path / "sweep")
    folder.claim(space, resume=False)
    trials = [Trial({"lora.rank": rank}, 0) for rank in (2, 4, 8)]
    folder.add_event(trials[0].key, AttemptEvent(began=1.0, ended=2.0, outcome="pruned"))
    folder.add_event(trials[1].key, AttemptEvent(began=1.0, ended=2.0, outcome="died", error="OSError: full"))
    sweep = collect_results(folder, space, trials, {})
    assert [(trial.state, trial.error) for trial in sweep.trials] == [
        ("pruned", ""),
        ("failed", "OSError: full"),
        ("failed", "its process ended before it could say why"),
    ]
