"""The Optuna search for points with seeds, without trials: what it suggests, and that it resumes exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sylva_ray.core.errors import RunError, UserError
from sylva_ray.sweeps.events import AttemptEvent, Outcome
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.space import Space
from tests.sweeps.toys import space_of

pytest.importorskip("ray")
pytest.importorskip("optuna")

from sylva_ray.sweeps.optuna_search import PointSearch, open_search

OBJECTIVES = [{"metric": "benign_accuracy"}, {"metric": "robust_accuracy"}]


def play(search: PointSearch, outcome: Callable[[dict[str, Any]], dict[str, float]]) -> list[dict[str, Any]]:
    """Answer every suggestion at once, and return them."""
    given: list[dict[str, Any]] = []
    while True:
        trial_id = f"t{len(given)}"
        suggested = search.suggest(trial_id)
        if suggested == "FINISHED":
            return given
        given.append(suggested["trial"])
        search.on_trial_complete(trial_id, {"finished": True} | outcome(suggested["trial"]))


def test_optuna_is_told_of_a_point_once_all_its_seeds_are_done(tmp_path: Path) -> None:
    """The study gets the mean of the seeds."""
    parameters = {"training.lr": {"loguniform": [0.001, 0.1]}, "lora.rank": {"choice": [1, 2, 4]}}
    space = space_of(tmp_path, parameters=parameters, seeds=[0, 1], search={"kind": "optuna", "num_points": 6})
    search = PointSearch(space)
    given = play(search, lambda trial: {"robust_accuracy": trial["seed"] / 2})
    assert [trial["seed"] for trial in given] == [0, 1] * 6
    assert all(a["values"] == b["values"] for a, b in zip(given[::2], given[1::2], strict=True))
    assert [trial.value for trial in search.study.trials] == [0.25] * 6


def test_optuna_finds_the_front_of_two_objectives(tmp_path: Path) -> None:
    """Benign falls and robust rises with epsilon; a bad learning rate costs both, so the front is at good ones."""
    parameters = {"attack.epsilon": {"uniform": [0.0, 0.1]}, "training.lr": {"uniform": [0.0, 1.0]}}
    space = space_of(
        tmp_path, parameters=parameters, objectives=OBJECTIVES, search={"kind": "optuna", "num_points": 60, "seed": 1}
    )
    search = PointSearch(space)

    def outcome(trial: dict[str, Any]) -> dict[str, float]:
        epsilon, loss = trial["values"]["attack.epsilon"], (trial["values"]["training.lr"] - 0.3) ** 2
        return {"benign_accuracy": 1 - 5 * epsilon - loss, "robust_accuracy": 5 * epsilon - loss}

    given = play(search, outcome)
    told = [tuple(outcome(trial).values()) for trial in given]
    front = {a for a in told if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in told)}
    assert {tuple(trial.values) for trial in search.study.best_trials} == front
    late = [abs(trial["values"]["training.lr"] - 0.3) for trial in given[30:]]
    early = [abs(trial["values"]["training.lr"] - 0.3) for trial in given[:10]]
    assert sum(late) / len(late) < sum(early) / len(early), "it learned nothing"


def test_optuna_does_not_run_a_point_twice_and_stops_when_there_is_no_other(tmp_path: Path) -> None:
    """Two points exist, and nine are wanted."""
    space = space_of(tmp_path, parameters={"lora.rank": {"choice": [1, 2]}}, search={"kind": "optuna", "num_points": 9})
    given = play(PointSearch(space), lambda trial: {"robust_accuracy": trial["values"]["lora.rank"] / 2})
    assert sorted(trial["values"]["lora.rank"] for trial in given) == [1, 2]


MIXED = {"training.lr": {"uniform": [0.0, 1.0]}, "lora.rank": {"choice": [1, 2, 4]}}


@pytest.mark.parametrize("objectives", [OBJECTIVES[:1], OBJECTIVES])
@pytest.mark.parametrize("num_before", [3, 24, 25, 31])
def test_a_resumed_search_suggests_what_the_uninterrupted_one_does(
    num_before: int, objectives: list[dict[str, str]], tmp_path: Path
) -> None:
    """Among the first random points, after them, and between the two seeds of a point; two trials run at once."""
    search = {"kind": "optuna", "num_points": 20, "seed": 5}
    space = space_of(tmp_path, parameters=MIXED, objectives=objectives, seeds=[0, 1], search=search)

    def outcome(trial: dict[str, Any]) -> dict[str, Any]:
        loss, gain = (trial["values"]["training.lr"] - 0.3) ** 2, trial["values"]["lora.rank"] / 8
        return {"finished": trial["values"]["lora.rank"] < 4, "benign_accuracy": 1 - loss, "robust_accuracy": gain}

    def answers(search: PointSearch, running: dict[str, dict[str, Any]], limit: int) -> list[dict[str, Any]]:
        given: list[dict[str, Any]] = []
        while len(given) < limit and (suggested := search.suggest(f"t{len(given)}-{limit}")) != "FINISHED":
            given.append(suggested["trial"])
            running[f"t{len(given) - 1}-{limit}"] = suggested["trial"]
            if len(running) == 2:
                oldest = next(iter(running))
                search.on_trial_complete(oldest, outcome(running.pop(oldest)))
        return given

    whole = answers(PointSearch(space), {}, 99)
    first, second = PointSearch(space), PointSearch(space)
    running: dict[str, dict[str, Any]] = {}
    begun = answers(first, running, num_before)
    first.save(str(tmp_path / "state"))
    first.suggest("later")  # the study goes on; what is saved does not change
    second.restore(str(tmp_path / "state"))
    assert begun + answers(second, running, 99) == whole
    assert len(whole) == 40


def test_a_search_that_grows_goes_on_where_it_ended(tmp_path: Path) -> None:
    """Its first points stay, and TPE knows their results."""

    def outcome(trial: dict[str, Any]) -> dict[str, Any]:
        return {"robust_accuracy": -((trial["values"]["training.lr"] - 0.3) ** 2)}

    def space_with(num_points: int) -> Space:
        search = {"kind": "optuna", "num_points": num_points, "seed": 5}
        return space_of(tmp_path, parameters=MIXED, seeds=[0, 1], search=search)

    folder = SweepFolder(tmp_path / "sweep")
    folder.tune.mkdir(parents=True)
    whole = play(PointSearch(space_with(12)), outcome)
    first = PointSearch(space_with(5))
    assert play(first, outcome) == whole[:10]
    first.save(str(folder.tune / "searcher-state-1.json"))
    for trial in first.trials:
        folder.trial(trial.key).path.mkdir(parents=True)
        folder.trial(trial.key).summary_file.write_text("{}")
    grown = open_search(space_with(12), folder)
    assert grown.num_left == 14
    assert [trial.values for trial in grown.trials] == [trial["values"] for trial in whole[:10]]
    assert play(grown, outcome) == whole[10:]
    assert [(trial.values, trial.seed) for trial in grown.trials] == [(t["values"], t["seed"]) for t in whole]
    assert open_search(space_with(5), folder).num_left == 0


def test_a_trial_whose_result_is_not_known_comes_first_again(tmp_path: Path) -> None:
    """The driver was killed while it ran: another point in its place would be one too many."""
    space = space_of(tmp_path, parameters=MIXED, seeds=[0, 1], search={"kind": "optuna", "num_points": 3})
    folder = SweepFolder(tmp_path / "sweep")
    folder.tune.mkdir(parents=True)
    search = PointSearch(space)
    first = search.suggest("a")["trial"]
    search.save(str(folder.tune / "searcher-state-1.json"))
    resumed = open_search(space, folder)
    assert resumed.num_left == 6
    assert resumed.suggest("b")["trial"] == first
    assert {trial.seed for trial in resumed.trials} == {0, 1}


def test_the_state_of_a_search_is_json(tmp_path: Path) -> None:
    """Also with values that are lists or mappings."""
    methods = [{"name": "sylva"}, {"name": "lorica"}]
    space = space_of(
        tmp_path, parameters={"algorithm": {"choice": methods}}, search={"kind": "optuna", "num_points": 2}
    )
    search = PointSearch(space)
    first = search.suggest("a")["trial"]
    search.save(str(tmp_path / "state"))
    assert json.loads((tmp_path / "state").read_text())["running"] == {"a": first}
    resumed = PointSearch(space)
    resumed.restore(str(tmp_path / "state"))
    resumed.on_trial_complete("a", {"finished": True, "robust_accuracy": 0.5})
    assert [trial.value for trial in resumed.study.trials] == [0.5]
    assert resumed.suggest("b")["trial"]["values"] != first["values"]


def test_a_damaged_state_is_one_clear_line(tmp_path: Path) -> None:
    """The driver was killed while Tune copied the file."""
    search = PointSearch(space_of(tmp_path, parameters=MIXED, search={"kind": "optuna", "num_points": 2}))
    search.save(str(tmp_path / "state"))
    (tmp_path / "state").write_text((tmp_path / "state").read_text()[:100])
    with pytest.raises(RunError, match="damaged"):
        search.restore(str(tmp_path / "state"))


def test_a_search_that_an_older_version_saved_is_refused(tmp_path: Path) -> None:
    """It is a pickle, which is not read."""
    space = space_of(tmp_path / "s", parameters=MIXED, search={"kind": "optuna", "num_points": 2})
    folder = SweepFolder(tmp_path / "sweep")
    folder.claim(space, resume=False)
    folder.tune.mkdir()
    (folder.tune / "searcher-state-2026-01-01_00-00-00.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match="an older version saved as a pickle") as caught:
        folder.check(space, resume=True)
    assert len(str(caught.value).splitlines()) == 1
    (folder.tune / "searcher-state-2026-01-02_00-00-00.json").write_text("{}")
    folder.check(space, resume=True)


def test_a_trial_that_was_killed_is_tried_again_and_a_pruned_or_refused_one_is_not(tmp_path: Path) -> None:
    """A killed attempt leaves no line about its end."""
    ends: list[Outcome | None] = [None, "pruned", "refused", "died"]
    search = {"kind": "optuna", "num_points": len(ends)}
    space = space_of(tmp_path, parameters={"training.lr": {"uniform": [0.0, 1.0]}}, search=search)
    folder, before = SweepFolder(tmp_path / "sweep"), PointSearch(space)
    for path in (folder.tune, folder.attempts):
        path.mkdir(parents=True)
    for number in range(len(ends)):
        before.suggest(f"t{number}")
        before.on_trial_complete(f"t{number}", error=True)
    before.save(str(folder.tune / "searcher-state-0.json"))
    for trial, end in zip(before.trials, ends, strict=True):
        folder.add_event(trial.key, AttemptEvent(began=1.0, process=1))
        if end is not None:
            folder.add_event(trial.key, AttemptEvent(began=1.0, ended=2.0, outcome=end))
    after = open_search(space, folder)
    again = [after.suggest(f"again{number}")["trial"]["values"] for number in range(after.num_left)]
    assert again == [trial.values for trial, end in zip(before.trials, ends, strict=True) if end in (None, "died")]


def test_a_trial_that_died_before_its_first_line_is_tried_again(tmp_path: Path) -> None:
    search = {"kind": "optuna", "num_points": 1}
    space = space_of(tmp_path, parameters={"training.lr": {"uniform": [0.0, 1.0]}}, search=search)
    folder, before = SweepFolder(tmp_path / "sweep"), PointSearch(space)
    folder.tune.mkdir(parents=True)
    suggested = before.suggest("t")
    before.on_trial_complete("t", error=True)
    before.save(str(folder.tune / "searcher-state-0.json"))
    after = open_search(space, folder)
    assert after.num_left == 1
    assert after.suggest("again") == suggested


def test_a_result_that_a_repeated_trial_brings_reaches_the_study(tmp_path: Path) -> None:
    """Optuna does not change a trial that has failed: the point becomes another one of the study."""
    space = space_of(
        tmp_path,
        parameters={"training.lr": {"uniform": [0.0, 1.0]}},
        search={"kind": "optuna", "num_points": 1},
        seeds=[0, 1],
    )
    folder, before = SweepFolder(tmp_path / "sweep"), PointSearch(space)
    folder.tune.mkdir(parents=True)
    before.suggest("a")
    before.suggest("b")
    before.on_trial_complete("b", error=True)
    before.on_trial_complete("a", {"finished": True, "robust_accuracy": 0.4})
    before.save(str(folder.tune / "searcher-state-0.json"))
    assert [trial.state.name for trial in before.study.trials] == ["FAIL"]
    (folder.trial(before.trials[0].key).path).mkdir(parents=True)
    folder.trial(before.trials[0].key).summary_file.write_text("{}")
    after = open_search(space, folder)
    again = after.suggest("again")["trial"]
    assert (again["seed"], after.num_left) == (1, 0)
    after.on_trial_complete("again", {"finished": True, "robust_accuracy": 0.6})
    told = [(trial.state.name, trial.values) for trial in after.study.trials]
    assert told == [("FAIL", None), ("COMPLETE", [0.5])]
    assert [trial.seed for trial in after.trials] == [0, 1]


def test_a_trial_whose_folder_is_gone_is_repeated_and_the_study_keeps_what_it_knows(tmp_path: Path) -> None:
    space = space_of(
        tmp_path, parameters={"training.lr": {"uniform": [0.0, 1.0]}}, search={"kind": "optuna", "num_points": 1}
    )
    folder, before = SweepFolder(tmp_path / "sweep"), PointSearch(space)
    folder.tune.mkdir(parents=True)
    before.suggest("a")
    before.on_trial_complete("a", {"finished": True, "robust_accuracy": 0.4})
    before.save(str(folder.tune / "searcher-state-0.json"))
    after = open_search(space, folder)
    assert after.num_left == 1
    after.suggest("again")
    after.on_trial_complete("again", {"finished": True, "robust_accuracy": 0.4})
    assert [(trial.state.name, trial.values) for trial in after.study.trials] == [("COMPLETE", [0.4])]


def test_the_results_of_an_older_version_have_no_seeds(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        parameters={"training.lr": {"uniform": [0.0, 1.0]}},
        search={"kind": "optuna", "num_points": 1},
        seeds=[0, 1],
    )
    search = PointSearch(space)
    search.suggest("a")
    state = json.loads(search.to_json())
    (point,) = state["points"].values()
    point["results"] = [[0.2]]
    (tmp_path / "state.json").write_text(json.dumps(state))
    search.restore(str(tmp_path / "state.json"))
    search.on_trial_complete("a", {"finished": True, "robust_accuracy": 0.6})
    assert search.study.trials[0].values == [pytest.approx(0.4)]


def test_a_failed_trial_of_an_older_version_is_repeated_and_its_result_reaches_the_study(tmp_path: Path) -> None:
    space = space_of(
        tmp_path, parameters={"training.lr": {"uniform": [0.0, 1.0]}}, search={"kind": "optuna", "num_points": 1}
    )
    folder, search = SweepFolder(tmp_path / "sweep"), PointSearch(space)
    folder.tune.mkdir(parents=True)
    search.suggest("a")
    search.on_trial_complete("a", error=True)
    state = json.loads(search.to_json())
    (point,) = state["points"].values()
    point["results"] = [None]
    (folder.tune / "searcher-state-0.json").write_text(json.dumps(state))
    after = open_search(space, folder)
    after.suggest("again")
    after.on_trial_complete("again", {"finished": True, "robust_accuracy": 0.6})
    assert [(trial.state.name, trial.values) for trial in after.study.trials] == [("FAIL", None), ("COMPLETE", [0.6])]
