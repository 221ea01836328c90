"""What a space allows, which points it has, and that wrong ones are refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sylva_ray.cli import app
from sylva_ray.core.errors import UserError
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.points import check_space, planned_trials, point_id, prepare_points
from sylva_ray.sweeps.space import Space, load_space
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
GRID = {"lora.rank": {"grid": [2, 4]}, "attack.epsilon": {"grid": ["2/255", "8/255"]}}


def write(folder: Path, **keys: Any) -> Path:
    """Write a space over the tiny experiment."""
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "experiment": TINY, "parameters": GRID} | keys, sort_keys=False))
    return path


def space_of(folder: Path, *overrides: str, **keys: Any) -> Space:
    """Load a space over the tiny experiment."""
    return load_space(write(folder, **keys), overrides)


def test_a_grid_is_every_combination_with_every_seed(tmp_path: Path) -> None:
    """Seeds are innermost."""
    trials = planned_trials(space_of(tmp_path, seeds=[0, 3]))
    found = [(t.values["lora.rank"], t.values["attack.epsilon"], t.seed) for t in trials]
    assert found == [(r, e, s) for r in (2, 4) for e in ("2/255", "8/255") for s in (0, 3)]
    assert len({trial.key for trial in trials}) == 8
    assert len({trial.point for trial in trials}) == 4


def test_a_trials_experiment_is_the_base_with_its_values(tmp_path: Path) -> None:
    """An override changes all trials."""
    space = space_of(tmp_path, "training.rounds=5")
    config = space.config({"lora.rank": 4, "attack.epsilon": "8/255"}, seed=7)
    assert (config.lora.rank, config.attack.epsilon, config.seed, config.training.rounds) == (4, 8 / 255, 7, 5)
    assert config.partition.num_clients == TINY["partition"]["num_clients"]


def test_a_base_is_read_beside_the_space_and_changed_key_by_key(tmp_path: Path) -> None:
    """Keys that the changes do not name keep the base's values."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TINY))
    space = space_of(tmp_path, base="base.yaml", experiment={"training": {"lr": 0.5}})
    config = space.config({}, 0)
    assert config.training.lr == 0.5
    assert config.training.batch_size == TINY["training"]["batch_size"]


def test_a_section_can_be_swept_as_a_whole(tmp_path: Path) -> None:
    """Its values are mappings."""
    methods = [{"name": "per_lora"}, {"name": "fedit_at"}]
    space = space_of(tmp_path, parameters={"algorithm": {"grid": methods}})
    assert [space.config(t.values, 0).algorithm.name for t in planned_trials(space)] == ["per_lora", "fedit_at"]


def test_random_points_stay_inside_and_more_of_them_keep_the_first(tmp_path: Path) -> None:
    """All four kinds of parameters."""
    ranges = {
        "training.lr": {"loguniform": [0.001, 0.1]},
        "attack.epsilon": {"uniform": ["1/255", "8/255"]},
        "training.local_epochs": {"randint": [1, 3]},
        "lora.rank": {"choice": [2, 4]},
    }

    def points(number: int) -> list[dict[str, Any]]:
        space = space_of(tmp_path, parameters=ranges, search={"kind": "random", "num_points": number})
        return [dict(trial.values) for trial in planned_trials(space)]

    few, many = points(10), points(40)
    assert many[:10] == few
    assert len({point_id(values) for values in many}) == 40
    assert all(0.001 <= v["training.lr"] <= 0.1 and 1 / 255 <= v["attack.epsilon"] <= 8 / 255 for v in many)
    assert {v["training.local_epochs"] for v in many} == {1, 2, 3}
    assert {v["lora.rank"] for v in many} == {2, 4}


def test_a_small_space_has_no_more_points_than_it_has(tmp_path: Path) -> None:
    """Random search does not repeat a point."""
    ranks = {"lora.rank": {"choice": [2, 4]}}
    space = space_of(tmp_path, parameters=ranks, search={"kind": "random", "num_points": 9})
    drawn: list[Any] = [trial.values["lora.rank"] for trial in planned_trials(space)]
    assert sorted(drawn) == [2, 4]


def test_what_the_base_lacks_the_parameters_may_give(tmp_path: Path) -> None:
    """The base alone is not run: it may lack an attack, have too few rounds or a rank of 0."""
    base = {**TINY, "evaluation": {"attacks": [], "every": 1}, "lora": {"rank": 0}}
    attack = {"epsilon": "4/255", "steps": 1}
    parameters = {
        "evaluation.attacks": {"grid": [[attack], [attack | {"steps": 2}]]},
        "training.rounds": {"grid": [9]},
        "lora.rank": {"grid": [2]},
    }
    space = space_of(tmp_path, experiment=base, parameters=parameters, scheduler={"kind": "asha", "grace_rounds": 2})
    check_space(space)
    assert space.cluster.address is None


def test_the_resolved_space_says_the_same(tmp_path: Path) -> None:
    """It needs no base."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(TINY))
    space = space_of(tmp_path, base="base.yaml", experiment={}, seeds=[1])
    again = tmp_path / "elsewhere"
    again.mkdir()
    (again / "space.yaml").write_text(space.to_yaml())
    assert load_space(again / "space.yaml") == space


@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_space_is_made_of_experiments(path: Path) -> None:
    """Each is checked and prepared as before a sweep."""
    space = load_space(path)
    assert space.name == path.stem
    check_space(space)
    prepare_points(space)


def test_the_smoke_space_has_four_trials_and_the_grid_eighteen() -> None:
    """As their comments say."""
    assert len(planned_trials(load_space(ROOT / "tune_spaces" / "smoke.yaml"))) >= 4
    assert len(planned_trials(load_space(ROOT / "tune_spaces" / "grid.yaml"))) == 3 * 2 * 3


def lr(**how: Any) -> dict[str, Any]:
    """Return keys of a random search over the learning rate."""
    return {"parameters": {"training.lr": how}, "search": {"kind": "random", "num_points": 3}}


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], list[str]]] = {
    "key not in the schema": ({"parameters": {"lora.rnk": {"grid": [2]}}}, (), ["lora.rnk", "did you mean 'rank'"]),
    "section not in the schema": ({"parameters": {"lorra.rank": {"grid": [2]}}}, (), ["lorra", "did you mean 'lora'"]),
    "key of no method": ({"parameters": {"algorithm.adaptrs": {"grid": [1]}}}, (), ["algorithm.adaptrs", "adapters"]),
    "key of the space misspelt": ({"seads": [1]}, (), ["seads", "did you mean 'seeds'"]),
    "empty list": ({"parameters": {"lora.rank": {"grid": []}}}, (), ["parameters.lora.rank.grid", "empty"]),
    "empty range": (lr(uniform=[0.1, 0.1]), (), ["parameters.training.lr.uniform", "[0.1, 0.1]", "empty"]),
    "range upside down": (lr(loguniform=[0.1, 0.01]), (), ["parameters.training.lr.loguniform", "low below high"]),
    "logarithm of nothing": (lr(loguniform=[0, 0.1]), (), ["parameters.training.lr", "above 0"]),
    "two kinds": (lr(uniform=[0.1, 0.2], choice=[1]), (), ["parameters.training.lr", "exactly one"]),
    "unknown kind": (lr(normal=[0, 1]), (), ["parameters.training.lr.normal", "unknown key", "loguniform"]),
    "value listed twice": ({"parameters": {"lora.rank": {"grid": [2, 2]}}}, (), ["lora.rank.grid", "twice"]),
    "value listed twice in two spellings": (
        {"parameters": {"attack.epsilon": {"grid": ["4/255", 4 / 255]}}},
        (),
        ["attack.epsilon.grid", "twice"],
    ),
    "a date, which is a text": (
        {},
        ("parameters.lora.rank={grid: [2024-01-01]}",),
        ["lora.rank", "'2024-01-01'", "integer"],
    ),
    "range without an end": (lr(uniform=[0.1, float("inf")]), (), ["parameters.training.lr.uniform", "finite"]),
    "real numbers for a whole one": (
        {"parameters": {"lora.rank": {"uniform": [1, 8]}}, "search": {"kind": "optuna", "num_points": 3}},
        (),
        ["lora.rank", "1.0", "integer"],
    ),
    "a section and a key of it": (
        {"parameters": {"lora.rank": {"grid": [2, 8]}, "lora": {"grid": [{"rank": 3}]}}},
        (),
        ["parameters.lora", "holds lora.rank", "sweep one"],
    ),
    "value out of range": (
        {"parameters": {"attack.epsilon": {"grid": [8]}}},
        (),
        ["attack.epsilon", "8", "at most|less"],
    ),
    "end of a range": (
        {"parameters": {"attack.epsilon": {"uniform": [0.1, 2]}}, "search": {"kind": "random", "num_points": 1}},
        (),
        ["attack.epsilon", "2.0", "must be at most 1"],
    ),
    "keys that do not go together": (
        {"parameters": {"training.clients_per_round": {"grid": [2, 3]}, "partition.num_clients": {"grid": [3, 2]}}},
        (),
        ["training.clients_per_round", "= 3: must be at most partition.num_clients, 2"],
    ),
    "rank above the layer": (
        {"parameters": {"lora.rank": {"grid": [2, 500]}}},
        (),
        ["lora.rank", "500", "at most 192"],
    ),
    "more clients than samples": (
        {"parameters": {"partition.num_clients": {"grid": [3, 100]}}},
        (),
        ["partition.num_clients", "100", "150"],
    ),
    "seed as a parameter": ({"parameters": {"seed": {"grid": [0, 1]}}}, (), ["parameters.seed", "seeds"]),
    "cluster as a parameter": (
        {"parameters": {"cluster.num_actors": {"grid": [1, 2]}}},
        (),
        ["parameters.cluster.num_actors", "changes no result"],
    ),
    "range in a grid": ({"parameters": {"lora.rank": {"randint": [1, 8]}}}, (), ["parameters.lora.rank", "grid"]),
    "grid in Optuna": ({"search": {"kind": "optuna", "num_points": 3}}, (), ["parameters.lora.rank", "choice"]),
    "how many points": (
        {"parameters": {"lora.rank": {"choice": [2]}}, "search": {"kind": "random"}},
        (),
        ["num_points"],
    ),
    "unknown metric": ({"objectives": [{"metric": "robust"}]}, (), ["objectives.0.metric", "robust_accuracy"]),
    "robust without an attack": ({}, ("evaluation.attacks=[]",), ["objectives.metric", "evaluation.attacks"]),
    "pruning by two metrics": (
        {
            "scheduler": {"kind": "asha"},
            "objectives": [{"metric": "robust_accuracy"}, {"metric": "benign_accuracy"}],
        },
        (),
        ["scheduler.kind", "asha", "one metric"],
    ),
    "pruning unseen": ({"scheduler": {"kind": "asha"}}, (), ["evaluation.every", "0", "must be 1"]),
    "pruning too late": (
        {"scheduler": {"kind": "asha", "grace_rounds": 9}},
        ("evaluation.every=1",),
        ["scheduler.grace_rounds", "9", "training.rounds"],
    ),
    "pruning at the last round": (
        {"scheduler": {"kind": "asha", "grace_rounds": 2}},
        ("evaluation.every=1", "training.rounds=2"),
        ["scheduler.grace_rounds = 2", "must be below training.rounds, which is 2"],
    ),
    "pruning of single seeds": (
        {"scheduler": {"kind": "asha"}, "seeds": [0, 1]},
        (),
        ["scheduler.kind", "asha", "single trials", "give one"],
    ),
    "pruning of trials of unequal length": (
        {"parameters": {"training.rounds": {"grid": [9, 6]}}, "scheduler": {"kind": "asha"}},
        ("evaluation.every=1",),
        ["training.rounds = 6", "differs between points", "9", "fifo"],
    ),
    "pruning of unequal length in whole sections": (
        {"parameters": {"training": {"grid": [{"rounds": 3}, {"rounds": 4}]}}, "scheduler": {"kind": "asha"}},
        ("evaluation.every=1",),
        ["training.rounds = 4", "differs between points"],
    ),
    "settings of pruning without it": (
        {"scheduler": {"grace_rounds": 2}},
        (),
        ["scheduler.grace_rounds = 2", "no effect", "scheduler.kind=fifo"],
    ),
    "the seed of a grid": ({"search": {"seed": 3}}, (), ["search.seed = 3", "no effect on a grid"]),
    "a seed of the experiment": ({}, ("seed=5",), ["seed = 5", "no effect", "seeds=[0]"]),
    "a seed of the experiment, by its whole key": ({}, ("experiment.seed=5",), ["seed = 5", "seeds=[0]"]),
    "a seed among the changes of a base": (
        {"base": str(ROOT / "configs/digits.yaml"), "experiment": {"seed": 9}},
        (),
        ["seed = 9", "no effect", "seeds=[0]"],
    ),
    "a name of the experiment": ({}, ("experiment.name=foo",), ["name = 'foo'", "no effect", "name="]),
    "two points of one name": (
        {"parameters": {"training.batch_size": {"grid": [85664, 105568]}}},
        (),
        ["batch_size=105568", "b4629ec1", "batch_size=85664"],
    ),
    "override of a swept key": ({}, ("lora.rank=3",), ["lora.rank", "swept", "parameters.lora.rank"]),
    "override of a section with a swept key": ({}, ("lora={rank: 3}",), ["lora.rank", "3", "swept"]),
    "swept key among the changes of a base": (
        {"base": str(ROOT / "configs/digits.yaml"), "experiment": {"lora": {"rank": 4}}},
        (),
        ["lora.rank", "4", "swept"],
    ),
    "override of the experiment's swept key": ({}, ("experiment.lora.rank=3",), ["lora.rank", "3", "swept"]),
    "override inside a swept section": (
        {"parameters": {"algorithm": {"grid": [{"name": "per_lora"}]}}},
        ("algorithm.name=fedit_at",),
        ["algorithm.name", "swept", "parameters.algorithm"],
    ),
    "no attack at one of the points": (
        {"parameters": {"evaluation.attacks": {"grid": [[{"epsilon": "4/255", "steps": 1}], []]}}},
        (),
        ["objectives.metric", "evaluation.attacks is empty"],
    ),
    "several at once, but not how many": ({}, ("trials.at_once=true",), ["trials.at_once", "true"]),
    "no seeds": ({"seeds": []}, (), ["seeds", "one or more"]),
    "no parameters on the command line": ({}, ("parameters=null",), ["parameters", "at least one key"]),
    "parameters that are none": ({}, ("parameters=1",), ["parameters = 1", "must be a mapping"]),
    "override without value": ({}, ("training.lr",), ["training.lr", "KEY=VALUE"]),
    "no parameters": ({"parameters": {}}, (), ["parameters"]),
    "no such base": ({"base": "nowhere.yaml"}, (), ["base", "nowhere.yaml", "no such file"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line_and_exit_code_2(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names key, value and fix, and nothing is written."""
    keys, overrides, says = CASES[case]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["tune", str(write(tmp_path, **keys)), *overrides])
    err = result.stderr
    assert result.exit_code == 2
    assert len(err.strip().splitlines()) == 1, err
    for part in says:
        assert any(option in err for option in part.split("|")), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space.yaml"], "something was written"


def test_a_folder_that_is_not_free(tmp_path: Path) -> None:
    """It may hold the same sweep, another one, or something else."""
    from sylva_ray.sweeps.folder import SweepFolder

    space = space_of(tmp_path)
    folder = SweepFolder(tmp_path / "sweep")
    with pytest.raises(UserError, match="holds no sweep to resume"):
        folder.claim(space, resume=True)
    folder.claim(space, resume=False)
    with pytest.raises(UserError, match="add --resume"):
        folder.claim(space, resume=False)
    folder.claim(space, resume=True)
    with pytest.raises(UserError, match=r"another space \(seeds differs"):
        folder.claim(space_of(tmp_path, seeds=[5]), resume=True)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty and holds no sweep"):
        SweepFolder(occupied).claim(space, resume=False)


def test_costs_are_minimised_unless_somebody_says_otherwise(tmp_path: Path) -> None:
    """The point that costs more bytes would be the only one on the front."""
    objectives = [{"metric": "robust_accuracy"}, {"metric": "total_bytes"}, {"metric": "seconds", "mode": "max"}]
    assert [o.mode for o in space_of(tmp_path, objectives=objectives).objectives] == ["max", "min", "max"]


def test_pruning_can_be_switched_off_and_its_settings_left(tmp_path: Path) -> None:
    """As docs/sweeps.md says: the best points of a pruned search are tried again with more seeds."""
    space_of(tmp_path, scheduler={"kind": "asha", "grace_rounds": 2})
    space = load_space(tmp_path / "space.yaml", ["scheduler.kind=fifo", "seeds=[0, 1, 2]"])
    assert (space.scheduler.kind, space.scheduler.grace_rounds, space.seeds) == ("fifo", 2, (0, 1, 2))


@pytest.mark.parametrize(
    "had",
    [
        {"scheduler": {"kind": "asha"}, "seeds": [0, 1]},
        {"scheduler": {"kind": "fifo", "grace_rounds": 2}},
        {"search": {"kind": "grid", "seed": 3}},
    ],
)
def test_a_sweep_of_an_older_version_goes_on_with_what_a_new_one_must_not_have(
    had: dict[str, Any], tmp_path: Path
) -> None:
    raw = yaml.safe_load(space_of(tmp_path).to_yaml()) | had
    folder = SweepFolder(tmp_path / "sweep")
    folder.root.mkdir()
    folder.space.write_text(yaml.safe_dump(raw))
    folder.trials.mkdir()
    assert folder.check(folder.load(), resume=True) == folder.load()
