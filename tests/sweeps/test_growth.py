"""A sweep that grows runs what is missing, under the names that its trials have."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sylva_ray.core.errors import UserError
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.growth import grown_space
from sylva_ray.sweeps.points import check_space, planned_trials
from sylva_ray.sweeps.space import Space
from tests.preparation.test_inputs import draw_images, interrupt
from tests.sweeps.toys import SMALL, ignore, run_sweep, space_of

RANDOM: dict[str, Any] = {
    "search": {"kind": "random", "num_points": 3},
    "parameters": {"training.lr": {"loguniform": [0.001, 0.1]}},
}
OPTUNA: dict[str, Any] = {
    "search": {"kind": "optuna", "num_points": 3},
    "parameters": {"training.lr": {"uniform": [0.001, 0.1]}},
}
ASHA: dict[str, Any] = {"scheduler": {"kind": "asha"}}


def grown(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> Space:
    return grown_space(space_of(folder, **before), space_of(folder, **now), "SWEEP")


def keys(space: Space) -> list[str]:
    return [trial.key for trial in planned_trials(space)]


def test_more_values_and_seeds_keep_the_names_of_the_trials_there_are(tmp_path: Path) -> None:
    before = space_of(tmp_path, seeds=[3])
    after = grown(tmp_path, {"seeds": [3]}, {"seeds": [0, 3], "parameters": {"lora.rank": {"grid": [4, 2, 1]}}})
    assert after.parameters["lora.rank"].values == (1, 2, 4)
    assert after.seeds == (3, 0)
    assert set(keys(before)) < set(keys(after))
    assert len(keys(after)) == 6


@pytest.mark.parametrize(
    ("key", "spellings"),
    [
        ("attack.epsilon", ["4/255", 4 / 255]),
        ("algorithm", [{"name": "fedit_at"}, {"name": "fedit_at", "beta": 6}]),
        ("lora.alpha", [16, 16.0]),
    ],
)
def test_two_spellings_are_one_point(key: str, spellings: list[Any], tmp_path: Path) -> None:
    """Experiments are compared as they are built: with defaults, as numbers."""
    first, second = ({"parameters": {key: {"grid": [value]}}} for value in spellings)
    after = grown(tmp_path, first, second)
    assert after.parameters[key].values == (spellings[0],)


def test_a_point_that_is_spelled_twice_in_one_space_is_refused(tmp_path: Path) -> None:
    methods = [{"name": "fedit_at"}, {"name": "fedit_at", "heads": "global"}]
    space = space_of(tmp_path, parameters={"algorithm": {"grid": [methods[0], methods[1]]}})
    with pytest.raises(UserError) as caught:
        check_space(space)
    assert caught.value.key == "parameters.algorithm"
    assert "makes the same experiment as {'name': 'fedit_at'}" in str(caught.value)


def test_a_random_search_keeps_its_points(tmp_path: Path) -> None:
    more = RANDOM | {"search": {"kind": "random", "num_points": 5}}
    assert keys(grown(tmp_path, RANDOM, more))[:3] == keys(space_of(tmp_path, **RANDOM))


def test_successive_halving_may_grow(tmp_path: Path) -> None:
    more = {"parameters": {"lora.rank": {"grid": [1, 2, 4]}}}
    assert grown(tmp_path, ASHA, ASHA | more).parameters["lora.rank"].values == (1, 2, 4)


def test_how_trials_share_the_cluster_may_always_change(tmp_path: Path) -> None:
    assert grown(tmp_path, ASHA, ASHA | {"trials": {"at_once": 1}}).trials.at_once == 1


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ({}, {"parameters": {"lora.rank": {"grid": [1]}}}, "parameters.lora.rank differs"),
        ({}, {"parameters": {"training.lr": {"grid": [1]}}}, "parameters differs"),
        ({}, {"objectives": [{"metric": "benign_accuracy"}]}, "objectives differs"),
        ({}, {"name": "other"}, "name differs"),
        ({}, {"experiment": SMALL | {"partition": SMALL["partition"] | {"alpha": 2.0}}}, "partition.alpha: 0.5 there"),
        ({"seeds": [0, 1]}, {"seeds": [0]}, "seeds differs"),
        (RANDOM, RANDOM | {"search": {"kind": "random", "num_points": 2}}, "search.num_points differs"),
        (RANDOM, RANDOM | {"search": {"kind": "random", "num_points": 3, "seed": 1}}, "search differs"),
        (RANDOM, RANDOM | {"parameters": {"training.lr": {"loguniform": [0.001, 0.2]}}}, "parameters.training.lr"),
        (OPTUNA, OPTUNA | {"seeds": [0, 1]}, "only search.num_points can grow"),
    ],
)
def test_what_would_change_finished_trials_is_refused(
    before: dict[str, Any], now: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        grown(tmp_path, before, now)
    assert says in str(caught.value)


def test_the_folder_keeps_the_grown_space(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    folder.claim(space_of(tmp_path), resume=False)
    folder.claim(space_of(tmp_path, seeds=[0, 1]), resume=True)
    assert folder.load().seeds == (0, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("before", [{}, OPTUNA], ids=["grid", "optuna"])
def test_a_real_sweep_grows_and_what_was_finished_stays(before: dict[str, Any], tmp_path: Path) -> None:
    """A grid by a seed and a value, a search by two points; then nothing is left to do."""
    experiment = SMALL | {"training": SMALL["training"] | {"rounds": 1}}
    more: dict[str, Any] = {"seeds": [0, 1], "parameters": {"lora.rank": {"grid": [3, 2, 1]}}}
    now = before | {"search": before["search"] | {"num_points": 5}} if before else more
    root = tmp_path / "sweep"
    first = run_sweep(space_of(tmp_path / "a", experiment, **before), root, resume=False, on_event=ignore)
    summaries = {trial.key: (root / "trials" / trial.key / "summary.json").read_bytes() for trial in first.trials}
    second = run_sweep(space_of(tmp_path / "b", experiment, **now), root, resume=True, on_event=ignore)
    assert [trial.state for trial in second.trials] == ["finished"] * (5 if before else 6)
    assert set(summaries) < {trial.key for trial in second.trials}
    for key, content in summaries.items():
        assert (root / "trials" / key / "summary.json").read_bytes() == content
    third = run_sweep(SweepFolder(root).load(), root, resume=True, on_event=ignore)
    assert [trial.key for trial in third.trials] == [trial.key for trial in second.trials]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_sweep_on_changed_images_is_refused_or_says_so(tmp_path: Path) -> None:
    """One trial is interrupted, and another has not begun: neither goes on with other images than the rest had."""
    draw_images(tmp_path / "images", 30)
    data = {"name": f"imagefolder:{tmp_path}/images"}
    partition = {"num_clients": 2, "kind": "iid", "min_samples": 8, "test_samples": 4}
    sections = {"dataset": data, "partition": partition, "training": SMALL["training"] | {"rounds": 1}}
    space = space_of(tmp_path / "a", SMALL | sections, parameters={"lora.rank": {"grid": [1, 2, 3]}})
    root = tmp_path / "sweep"
    finished, begun, new = (trial.key for trial in run_sweep(space, root, resume=False, on_event=ignore).trials)
    folder = SweepFolder(root)
    interrupt(folder.trial(begun))
    shutil.rmtree(folder.trial(new).path)
    before = folder.trial(finished).summary_file.read_bytes()
    draw_images(tmp_path / "images", 9, seed=1)

    states = {trial.key: trial for trial in run_sweep(space, root, resume=True, on_event=ignore).trials}
    assert [states[key].state for key in (finished, begun, new)] == ["finished", "refused", "refused"]
    for key in (begun, new):
        assert "are not those of the run; restore them, or add --allow-changed" in states[key].error
        assert "\n" not in states[key].error
    assert not folder.trial(new).config_file.exists()

    last = run_sweep(space, root, resume=True, on_event=ignore, allow_changed=True)
    assert [trial.state for trial in last.trials] == ["finished"] * 3
    for key in (begun, new):
        summary = folder.trial(key).load_summary()
        assert summary is not None
        assert any("are not those" in text or "the training images" in text for text in summary.warnings)
    assert folder.trial(finished).summary_file.read_bytes() == before


def test_where_trials_run_and_are_tracked_is_that_of_the_present_space(tmp_path: Path) -> None:
    before = space_of(tmp_path)
    sections = {"cluster": {"pool": "ray"}, "tracking": {"enabled": False}}
    asked = before.model_copy(update={"experiment": before.experiment | sections | {"lora": {"rank": 4}}})
    same = before.model_copy(update={"experiment": before.experiment | {"lora": {"rank": 4}}})
    after = grown_space(same, asked, "SWEEP")
    assert {name: after.experiment[name] for name in sections} == sections
    without = {name: section for name, section in before.experiment.items() if name not in sections}
    dropped = grown_space(asked, same.model_copy(update={"experiment": without | {"lora": {"rank": 4}}}), "SWEEP")
    assert not sections.keys() & dropped.experiment.keys()
