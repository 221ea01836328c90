"""Rows, spreads over seeds and dominance, on numbers that can be computed by hand."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sylva_ray.config.attacks import parse_attack
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build, parse_value
from sylva_ray.core.errors import UserError
from sylva_ray.core.own_code import importing_from
from sylva_ray.core.summary import Spread
from sylva_ray.reports.compare import compare, markdown
from sylva_ray.reports.compare.rows import Row, short_key, short_value
from sylva_ray.reports.compare.tables import csv_text, plot, remarks, terminal_tables
from sylva_ray.reports.compare.verdicts import dominance, footnotes, notes, sentences, strongest_attack, warnings

ATTACKS = ("pgd20-eps4", "pgd20-eps8")
SETTINGS: dict[str, dict[str, Any]] = {
    "fgsm-eps8": {"name": "fgsm"},
    "pgd10-eps8": {"steps": 10},
    "pgd20-eps4": {"epsilon": "4/255"},
    "pgd20-eps8": {},
    "pgd20-eps12": {"epsilon": "12/255"},
    "pgd20-margin-eps8": {"loss": "margin"},
    "pgd20x5-margin-eps8": {"loss": "margin", "restarts": 5},
    "pgd50-eps4": {"steps": 50, "epsilon": "4/255"},
    "deepfool50-l2": {"name": "deepfool"},
}
"""Settings of each attack in ``evaluation.attacks``, by label."""


def spread(values: Any) -> dict[str, Any]:
    return Spread.from_values(values).to_json()


def accuracies(benign: list[float], robust: list[float], attacks: tuple[str, ...] = ATTACKS) -> dict[str, Any]:
    """Return accuracies after a phase; the values are class-balanced, and plain ones are 0.1 higher."""
    plain = [[value + 0.1 for value in values] for values in (benign, robust)]
    return {
        "benign_accuracy": spread(plain[0]),
        "benign_balanced_accuracy": spread(benign),
        "robust_accuracy": {attack: spread(plain[1]) for attack in attacks},
        "robust_balanced_accuracy": {attack: spread(robust) for attack in attacks},
    }


def summary(
    algorithm: str = "sylva",
    seed: int = 0,
    benign: tuple[float, ...] = (0.5, 0.7),
    robust: tuple[float, ...] = (0.2, 0.4),
    attacks: tuple[str, ...] = ATTACKS,
    **changes: Any,
) -> dict[str, Any]:
    """Return a summary, by default of two clients; the worst decile is the worse of them."""
    end = accuracies(list(benign), list(robust), attacks)
    return {
        "name": "experiment",
        "algorithm": algorithm,
        "dataset": "digits",
        "backbone": "vit",
        "num_clients": len(benign),
        "num_classes": 10,
        "seed": seed,
        "rounds": 3,
        "label_matrix": [[seed, 10], [20, 30]],
        "clients": [{"client": c, "collapsed": False} for c in range(len(benign))],
        "phase1": end,
        "final": end,
        "majority": spread([0.3, 0.5]),
        "communication": {
            "upload_bytes_per_client_round": 1000,
            "total_bytes": 60_000,
            "full_model_ratio": 50.0,
        },
        "layer_game": None,
        "seconds": {"total": 12.0},
        "checks": [{"name": "S4", "passed": True, "meaning": ""}, {"name": "S14", "passed": True, "meaning": ""}],
        "warnings": [],
    } | changes


def config(**changes: Any) -> dict[str, Any]:
    """Return a config.yaml as a mapping."""
    base = {"partition": {"num_clients": 2}, "algorithm": {"name": "sylva"}}
    parsed: dict[str, Any] = json.loads(build(ExperimentConfig, base | changes).model_dump_json())
    return parsed


def names(rows: list[Row]) -> list[str]:
    return [row.name for row in rows if row.stage != "majority"]


# -- rows over seeds ---------------------------------------------------------------------------------------------------


def test_mean_and_sample_deviation_over_seeds() -> None:
    runs = [
        summary(seed=0, benign=(0.5, 0.7)),  # mean 0.6, worst 0.5
        summary(seed=1, benign=(0.6, 0.8)),  # mean 0.7, worst 0.6
        summary(seed=2, benign=(0.4, 1.2)),  # mean 0.8, worst 0.4
    ]
    (_, row) = compare(runs)
    assert row.seeds == (0, 1, 2)
    mean, worst = (row.value("benign", "balanced_accuracy", statistic) for statistic in ("mean", "worst_decile"))
    assert mean is not None
    assert worst is not None
    assert mean.num_seeds == 3
    assert [mean.mean, mean.std] == pytest.approx([0.7, 0.1])
    assert [worst.mean, worst.std] == pytest.approx([0.5, 0.1])
    plain = row.value("benign", "accuracy", "mean")
    assert plain is not None
    assert plain.mean == pytest.approx(0.8)


def test_one_seed_has_no_deviation() -> None:
    (_, row) = compare([summary()])
    assert row.accuracy["benign", "balanced_accuracy", "mean"].std is None
    assert "rows of one seed have no spread" in " ".join(notes([row]))


def test_costs_and_collapsed_clients_are_means_over_seeds() -> None:
    bad = [{"client": 0, "collapsed": True}, {"client": 1, "collapsed": False}]
    (_, row) = compare([summary(seconds={"total": 10.0}), summary(seed=1, seconds={"total": 14.0}, clients=bad)])
    assert row.seconds is not None
    assert row.collapsed is not None
    assert [row.seconds.mean, row.seconds.std] == pytest.approx([12.0, math.sqrt(8)])
    assert row.collapsed.mean == 0.5


def test_attackers_cannot_collapse() -> None:
    clients = [{"client": 0, "collapsed": True}, {"client": 1, "collapsed": False, "byzantine": True}]
    run = summary(clients=clients, byzantine={"attack": "sign_flip", "attackers": [1]})
    assert "| 1/1 |" in markdown(compare([run]))


def test_a_summary_without_the_worst_decile_gets_it_from_its_clients() -> None:
    run = summary(benign=tuple(i / 20 for i in range(20)), robust=(0.1,) * 20)
    del run["final"]["benign_balanced_accuracy"]["worst_decile"]
    (_, row) = compare([run])
    assert row.accuracy["benign", "balanced_accuracy", "worst_decile"].mean == pytest.approx((0 + 0.05) / 2)


def test_the_majority_row_is_the_mean_over_seeds_and_balanced_it_is_unknown() -> None:
    runs = [summary(), summary("other"), summary(seed=1, majority=spread([0.5, 0.9]))]
    (majority, *_) = compare(runs)
    assert majority.name == "majority"
    for condition in ("benign", *ATTACKS):
        value = majority.value(condition, "accuracy", "mean")
        assert value is not None
        assert [value.mean, value.std] == pytest.approx([0.55, math.sqrt(0.045)])
        assert majority.accuracy[condition, "accuracy", "worst_decile"].mean == pytest.approx(0.4)
        assert majority.value(condition, "balanced_accuracy", "mean") is None


def test_phase_1_is_a_row_where_a_phase_2_follows() -> None:
    phase1 = accuracies([0.4, 0.6], [0.3, 0.5])
    run = summary(phase1=phase1, layer_game={"players": [], "selected": []})
    rows = compare([run, summary("local_lora")])
    assert names(rows) == ["sylva, phase 1", "sylva", "local_lora"]
    first = rows[1]
    assert first.accuracy["benign", "balanced_accuracy", "mean"].mean == pytest.approx(0.5)
    assert first.upload_bytes == rows[2].upload_bytes
    assert (first.seconds, first.total_bytes, first.collapsed) == (None, None, None)


# -- what becomes one row ----------------------------------------------------------------------------------------------

RANK_4 = config(lora={"rank": 4})
RANK_8 = config(lora={"rank": 8})

GROUPINGS = {
    "seeds": ([summary(), summary(seed=1)], ["sylva"]),
    "methods": ([summary("b"), summary("a")], ["b", "a"]),
    "method wins over algorithm": ([summary(method="Sylva r4")], ["Sylva r4"]),
    "method keeps names together": ([summary(method="s", name="x"), summary(method="s", name="y", seed=1)], ["s"]),
    "ranks": (
        [summary(config=RANK_4), summary(config=RANK_8), summary(config=RANK_4 | {"seed": 1}, seed=1)],
        ["sylva (rank=4)", "sylva (rank=8)"],
    ),
    "a difference of one method labels no other": (
        [summary(config=RANK_4), summary(config=RANK_8), summary("local_lora", config=RANK_4)],
        ["sylva (rank=4)", "sylva (rank=8)", "local_lora"],
    ),
    "epsilon in pixel units": (
        [summary(config=config(attack={"epsilon": e})) for e in ("4/255", "8/255")],
        ["sylva (epsilon=4/255)", "sylva (epsilon=8/255)"],
    ),
    "settings of the cluster, of tracking and of the place": (
        [
            summary(config=config(cluster={"num_actors": 1}, name="a", training={"cohort_size": 2})),
            summary(
                config=config(cluster={"num_actors": 3}, name="b", tracking={"enabled": False}, dataset={"root": "/x"}),
                seed=1,
            ),
        ],
        ["sylva"],
    ),
    "a default that an older config lacks": (
        [
            summary(config=RANK_8),
            summary(config={k: v for k, v in RANK_8.items() if k != "training"}, seed=1),
        ],
        ["sylva"],
    ),
    "without configs, names": (
        [summary(name="r4"), summary(name="r8"), summary(name="r4", seed=1)],
        ["sylva (name=r4)", "sylva (name=r8)"],
    ),
    "without configs, rounds": (
        [summary(rounds=3), summary(rounds=9, seed=1)],
        ["sylva (rounds=3)", "sylva (rounds=9)"],
    ),
    "attacks": (
        [summary(), summary(seed=1, attacks=("pgd20-eps4",))],
        ["sylva (attacks=pgd20-eps4+pgd20-eps8)", "sylva (attacks=pgd20-eps4)"],
    ),
    "data sets label every row": (
        [summary(), summary("b", dataset="parquet:/data/cifar10/")],
        ["sylva (dataset=digits)", "b (dataset=parquet:cifar10)"],
    ),
    "a config beside none": (
        [summary(config=RANK_4, source="runs/a"), summary(source="b.json", seed=1)],
        ["sylva [runs/a]", "sylva [b.json]"],
    ),
    "many differences": (
        [
            summary(config=config(training={"lr": 0.1, "batch_size": 4, "local_epochs": 2, "optimizer": "sgd"})),
            summary(config=config(), seed=1),
        ],
        [
            "sylva (local_epochs=2, batch_size=4, optimizer=sgd, 1 more)",
            "sylva (local_epochs=1, batch_size=32, optimizer=adamw, 1 more)",
        ],
    ),
}


@pytest.mark.parametrize("case", GROUPINGS)
def test_one_row_per_method_and_settings_labelled_by_what_differs(case: str) -> None:
    runs, expected = GROUPINGS[case]
    assert names(compare(runs)) == expected


def test_the_same_run_twice_counts_once() -> None:
    rows = compare(
        [summary(source="runs/a"), summary(config=RANK_4, source="mlflow/a"), summary(seed=1, config=RANK_4)]
    )
    assert names(rows) == ["sylva"]
    assert rows[1].seeds == (0, 1)
    assert "runs given more than once are counted once: sylva" in notes(rows)


def test_one_seed_with_two_results_is_not_averaged() -> None:
    rows = compare([summary(source="a"), summary(benign=(0.1, 0.2), source="b"), summary(seed=1, source="c")])
    assert names(rows) == ["sylva [a]", "sylva [b]"]
    assert [row.seeds for row in rows[1:]] == [(0, 1), (0,)]
    assert any("they are not averaged" in text for text in warnings(rows))


def test_names_are_unique_even_without_sources() -> None:
    assert names(compare([summary(), summary(benign=(0.1, 0.2))])) == ["sylva", "sylva #2"]


@pytest.mark.parametrize(
    ("key", "short"),
    [
        ("lora.rank", "rank"),
        ("lora.alpha", "lora.alpha"),
        ("partition.alpha", "partition.alpha"),
        ("seed", "seed"),
        ("backbone.name", "backbone"),
        ("algorithm.phase2.shrink", "shrink"),
    ],
)
def test_the_shortest_unambiguous_key(key: str, short: str) -> None:
    assert short_key(key) == short


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("[2, 4]", "2+4"),
        ("[label", "[label"),
        ("[1, 2", "[1, 2"),
        ("parquet:/data/cifar10", "cifar10"),
        ("x" * 99, None),
    ],
)
def test_a_value_in_a_name(text: str, short: str | None) -> None:
    """A bracket alone makes no list: columns of a data set may have any name."""
    found = short_value("dataset.label", text)
    assert found == short if short else (len(found) < len(text) and found.endswith("…"))


# -- comparability -----------------------------------------------------------------------------------------------------

FLEETS: dict[str, tuple[dict[str, Any], str | None]] = {
    "the same": ({}, None),
    "data set": ({"dataset": "cifar10"}, "dataset is digits (a (dataset=digits)); cifar10 (b (dataset=cifar10))"),
    "classes": ({"num_classes": 7}, "num_classes is 10"),
    "clients": ({"benign": (0.5,) * 3, "robust": (0.2,) * 3}, "num_clients is 2"),
    "partition": (
        {"config": config(partition={"num_clients": 2, "alpha": 0.1}), "label_matrix": None},
        "partition.alpha is 0.5",
    ),
    "other images for the same seed": (
        {"label_matrix": [[1, 1], [2, 2]]},
        "the same seed gave the clients other images",
    ),
}


@pytest.mark.parametrize("case", FLEETS)
def test_rows_of_different_fleets_are_warned_of_and_are_not_compared(case: str) -> None:
    changes, says = FLEETS[case]
    accuracies: dict[str, Any] = {"benign": (0.1, 0.1), "robust": (0.1, 0.1)}
    rows = compare([summary("a", config=config()), summary("b", **accuracies | changes)])
    alarms = [text for text in warnings(rows) if text.startswith("NOT COMPARABLE")]
    assert len(alarms) == (says is not None)
    assert says is None or says in alarms[0]
    assert len([row for row in rows if row.stage == "majority"]) == (1 if says is None else 2)
    dominated = [name for name, above in dominance(rows, "mean").items() if above]
    assert dominated == (["b"] if says is None else [])
    assert says is None or alarms[0] in markdown(rows)


def test_a_run_without_its_configuration_is_not_known_to_be_of_the_same_fleet() -> None:
    """Test images of equal shares, for instance, leave no trace in a summary."""
    equal = config(partition={"num_clients": 2, "test_shares": "equal"})
    (text,) = warnings(compare([summary("a", config=equal), summary("b")]))
    assert text.startswith("NOT KNOWN to be comparable: b:")
    assert warnings(compare([summary("a", config=equal), summary("b", config=equal)])) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "the seeds differ"),
        ({"backbone": "resnet"}, "the backbone differs: vit (a); resnet (b)"),
        ({"rounds": 30}, "the number of rounds differs: 3 (a); 30 (b)"),
        (
            {"byzantine": {"attack": "sign_flip", "attackers": [1]}},
            "the kind of Byzantine clients differs: none (a); sign_flip by 1 (b)",
        ),
    ],
)
def test_other_differences_are_warned_of(changes: dict[str, Any], says: str) -> None:
    assert warnings(compare([summary("a"), summary("b")])) == []
    assert says in " ".join(warnings(compare([summary("a"), summary("b", **changes)])))


def test_attacks_of_other_step_sizes_have_other_labels() -> None:
    labels = {parse_attack(f"pgd:step_size={step}/255").label for step in (3, 2)}
    assert labels == {"pgd20-step2-eps8", "pgd20-step3-eps8"}


# -- dominance ---------------------------------------------------------------------------------------------------------

DOMINANCE: dict[str, tuple[dict[str, tuple[float, float]], dict[str, list[str]]]] = {
    "better in both": ({"a": (0.6, 0.4), "b": (0.5, 0.3)}, {"a": [], "b": ["a"]}),
    "a trade": ({"a": (0.6, 0.3), "b": (0.5, 0.4)}, {"a": [], "b": []}),
    "equal in one": ({"a": (0.6, 0.4), "b": (0.6, 0.3)}, {"a": [], "b": ["a"]}),
    "equal in both": ({"a": (0.6, 0.4), "b": (0.6, 0.4)}, {"a": [], "b": []}),
    "a chain, the front first": (
        {"low": (0.1, 0.1), "middle": (0.2, 0.2), "top": (0.3, 0.3)},
        {"low": ["top", "middle"], "middle": ["top"], "top": []},
    ),
}


@pytest.mark.parametrize("case", DOMINANCE)
def test_dominance(case: str) -> None:
    points, expected = DOMINANCE[case]
    rows = compare([summary(name, benign=(x, x), robust=(y, y)) for name, (x, y) in points.items()])
    assert dominance(rows, "mean") == expected
    assert dominance(rows, "worst_decile") == expected


def test_mean_and_worst_decile_have_fronts_of_their_own() -> None:
    rows = compare([summary("a", benign=(0.2, 0.9)), summary("b", benign=(0.5, 0.5))])
    assert dominance(rows, "mean") == {"a": [], "b": ["a"]}
    assert dominance(rows, "worst_decile") == {"a": ["b"], "b": []}
    assert sentences(rows) == [
        "Not dominated: a (mean only); b (worst decile only).",
        "a is dominated by b (worst decile).",
        "b is dominated by a (mean).",
    ]


def test_the_plain_accuracy_does_not_count() -> None:
    """A constant answer may have the highest plain accuracy."""
    constant = summary("constant", benign=(0.1, 0.1), robust=(0.1, 0.1))
    constant["final"]["benign_accuracy"] = constant["final"]["robust_accuracy"]["pgd20-eps8"] = spread([0.99, 0.99])
    assert dominance(compare([constant, summary("real")]), "mean") == {"constant": ["real"], "real": []}


def test_sentences_name_three_and_count_the_rest() -> None:
    rows = compare([summary(f"m{i}", benign=(i / 10, i / 10), robust=(0.2, 0.2)) for i in range(1, 7)])
    assert sentences(rows)[0] == "Not dominated: m6."
    assert sentences(rows)[1] == "m1 is dominated by m6; m2; m3 and 2 more (mean and worst decile)."
    assert sentences(rows)[-1] == "m5 is dominated by m6 (mean and worst decile)."


@pytest.mark.parametrize(("lead", "close"), [(0.02, True), (0.2, False)])
def test_a_lead_within_the_spread_over_seeds_is_noted(lead: float, close: bool) -> None:
    runs = []
    for seed, noise in enumerate((-0.05, 0.05)):
        runs += [
            summary("a", seed, (0.5 + lead + noise,) * 2, (0.3,) * 2),
            summary("b", seed, (0.5 + noise,) * 2, (0.3,) * 2),
        ]
    (sentence,) = sentences(compare(runs))[1:]
    assert ("by no more than the spread over seeds" in sentence) == close


@pytest.mark.parametrize(
    ("attacks", "strongest"),
    [
        (("pgd20-eps4", "pgd20-eps8"), "pgd20-eps8"),
        (("pgd20-eps8", "pgd50-eps4"), "pgd20-eps8"),
        (("fgsm-eps8", "pgd20-eps8", "pgd10-eps8"), "pgd20-eps8"),
        (("pgd20-eps8", "pgd20x5-margin-eps8"), "pgd20x5-margin-eps8"),
        (("pgd20-eps8", "pgd20-margin-eps8"), "pgd20-margin-eps8"),
        (("pgd20-eps12", "pgd20-eps8"), "pgd20-eps12"),
        (("deepfool50-l2", "pgd20-eps8"), "pgd20-eps8"),
        ((), None),
    ],
)
def test_the_strongest_attack(attacks: tuple[str, ...], strongest: str | None) -> None:
    described = config(evaluation={"attacks": [SETTINGS[label] for label in attacks]})
    assert strongest_attack(compare([summary(attacks=attacks, config=described)])) == strongest


@pytest.mark.parametrize(
    ("attacks", "strongest"),
    [
        (("autoattack", "pgd:steps=500,restarts=5"), "autoattack"),
        (("autoattack", "noise:tries=1000"), "autoattack"),
        (("autoattack", "square:queries=5000"), "autoattack"),
        (("pgd", "noise:tries=1000,epsilon=16/255"), "pgd"),
        (("fgsm", "square:queries=5000"), "fgsm"),
        (("pgd", "sparsefool:epsilon=20"), "pgd"),
        (("pgd", "apgd:norm=l2,epsilon=2"), "pgd"),
        (("noise:tries=10", "square:queries=100"), "square:queries=100"),
    ],
)
def test_answers_alone_and_other_norms_are_weaker(attacks: tuple[str, ...], strongest: str) -> None:
    """Tries, queries and gradient steps are not compared, nor are budgets of different norms."""
    specs = [parse_attack(text) for text in attacks]
    described = config(evaluation={"attacks": [{"name": t.partition(":")[0], **settings_of(t)} for t in attacks]})
    rows = compare([summary(attacks=tuple(spec.label for spec in specs), config=described)])
    assert strongest_attack(rows) == parse_attack(strongest).label
    backwards = compare([summary(attacks=tuple(spec.label for spec in reversed(specs)), config=described)])
    assert strongest_attack(backwards) == parse_attack(strongest).label


def test_an_attack_of_ones_own_says_itself_whether_it_follows_gradients(tmp_path: Path) -> None:
    code = "from sylva_ray.attacks.noise import NoiseAttack\n\n\nclass Blind(NoiseAttack):\n    name: str\n"
    (tmp_path / "blind_attack.py").write_text(code)
    own = {"name": "blind_attack:Blind", "tries": 1000, "epsilon": "16/255"}
    with importing_from([tmp_path]):
        described = config(evaluation={"attacks": [own, {"name": "pgd"}]})
        rows = compare([summary(attacks=("Blind1000-eps16", "pgd20-eps8"), config=described)])
        assert strongest_attack(rows) == "pgd20-eps8"


def settings_of(text: str) -> dict[str, object]:
    """Return the settings in ``name:key=value,...``."""
    pairs = [pair.split("=") for pair in text.partition(":")[2].split(",") if pair]
    return {key: parse_value(key, value) for key, value in pairs}


def test_of_attacks_that_no_config_defines_the_last_one_is_taken() -> None:
    assert strongest_attack(compare([summary(attacks=("pgd20-eps8", "pgd20-eps4"))])) == "pgd20-eps4"


def test_the_strongest_attack_is_common_to_all_rows() -> None:
    rows = compare([summary("a"), summary("b", attacks=("pgd20-eps4",))])
    assert strongest_attack(rows) == "pgd20-eps4"
    none = compare([summary("a", attacks=("pgd20-eps8",)), summary("b", attacks=("pgd20-eps4",))])
    assert sentences(none) == ["No attack is common to all rows, so dominance is not defined."]


# -- the table ---------------------------------------------------------------------------------------------------------

FAILED = [{"name": "S4", "passed": False, "meaning": "masked"}, {"name": "S14", "passed": True, "meaning": ""}]


def test_markdown_holds_the_compact_numbers() -> None:
    runs = [summary(seed=0, benign=(0.5, 0.7)), summary(seed=1, benign=(0.6, 0.8)), summary(seed=2, benign=(0.4, 1.2))]
    lines = markdown(compare(runs)).splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:6] == ["A", "sylva", "3", "both", "80.0±10.0/60.0±10.0", "70.0±10.0/50.0±10.0"]
    assert cells[-5:] == ["0/2", "1 kB", "50x", "60 kB", "12"]
    assert len({line.count("|") for line in lines[:4]}) == 1
    majority = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert majority[4:7] == ["40.0±0.0/30.0±0.0", "", "40.0±0.0/30.0±0.0"]


def test_failed_checks_stand_beside_the_number_and_below_the_table() -> None:
    rows = compare([summary(checks=FAILED, warnings=["check S4 FAILED: masked", "round 3: clients 1 are late"])])
    line = markdown(rows).splitlines()[3]
    assert "| A | sylva ! |" in line
    assert line.count("†") == 4  # plain and balanced, two attacks; not the benign ones
    assert "40.0/30.0†" in line
    assert any(text.startswith("† check S4 FAILED:") and "sylva (seed 0)" in text for text in footnotes(rows))
    assert "! sylva, seed 0: round 3: clients 1 are late" in footnotes(rows)
    assert sum("S4" in text for text in footnotes(rows)) == 1
    assert "†" not in markdown(compare([summary()]))


def test_missing_checks_are_noted() -> None:
    assert any("no checks were computed" in text and "sylva" in text for text in notes(compare([summary(checks=[])])))


def test_many_warnings_are_counted() -> None:
    texts = footnotes(compare([summary(warnings=[f"round {i}: late" for i in range(10)])]))
    assert len(texts) == 4
    assert "7 more warnings" in texts[-1]


def test_csv_is_raw_and_tidy() -> None:
    text = csv_text(
        compare([summary(seed=0, benign=(1 / 3, 1.0)), summary(seed=1, benign=(2 / 3, 1.0), checks=FAILED)])
    )
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [(line["row"], line["statistic"]) for line in lines[2:]] == [("sylva", "mean"), ("sylva", "worst_decile")]
    mean, worst = lines[2:]
    assert float(mean["benign_balanced_accuracy"]) == pytest.approx((2 / 3 + 5 / 6) / 2, abs=1e-15)
    assert float(mean["benign_balanced_accuracy.std"]) == pytest.approx((5 / 6 - 2 / 3) / math.sqrt(2), abs=1e-15)
    assert float(worst["benign_balanced_accuracy"]) == pytest.approx(0.5, abs=1e-15)
    assert float(mean["robust_balanced_accuracy.pgd20-eps8"]) == pytest.approx(0.3)
    assert (mean["num_seeds"], mean["seeds"], mean["on_front"]) == ("2", "0 1", "1")
    assert float(mean["upload_bytes_per_client_round"]) == 1000
    assert mean["failed_checks"] == "S4 (seed 1)"
    assert lines[0]["benign_balanced_accuracy"] == ""
    assert "%" not in text


def test_a_group_of_columns_that_is_wider_than_the_terminal_is_divided() -> None:
    rows = compare([summary(name, seed) for name in ("sylva", "fedavg_at") for seed in range(3)])
    out = Console(width=60, file=io.StringIO(), color_system=None)
    for table in terminal_tables(rows, 60):
        out.print(table)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 60
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("60.0±0.0/50.0±0.0") == 2  # benign balanced


def test_a_sentence_names_long_rows_by_their_letters() -> None:
    config = {"attack.epsilon": 8 / 255, "training.rounds": 2}
    runs = [summary("a", benign=(0.2, 0.2), config=config), summary("a", config=config | {"training.rounds": 3})]
    rows = compare(runs)
    texts = sentences(rows)
    for row in rows:
        if row.letter and len(row.name) > 24:
            assert all(row.name not in text for text in texts)


@pytest.mark.parametrize("width", [100, 160, 250])
def test_the_terminal_tables_fit_and_cut_nothing(width: int) -> None:
    attacks = ("pgd20-eps4", "pgd20-eps8", "pgd50x2-margin-eps8")
    runs = [summary(f"method_{i}", seed, attacks=attacks) for i in range(25) for seed in range(3)]
    runs.append(summary("sylva [red]x[/red]", attacks=attacks, config=None))
    rows = compare(runs)
    out = Console(width=width, file=io.StringIO(), color_system=None)
    for table in terminal_tables(rows, width):
        out.print(table)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "sylva [red]x[/red]" in text
    for name in ("method_7 ", "sylva [red]"):
        assert sum(name in line for line in lines) == len(terminal_tables(rows, width))
    assert text.count("60.0±0.0/50.0±0.0") == 25  # benign balanced, of no other column
    for heading in ("seeds", "front", *attacks, "collapsed", "upload", "ratio", "total", "seconds"):
        assert heading in text
    tables = {100: 4, 160: 2, 250: 1}[width]
    assert len(terminal_tables(rows, width)) == tables


def test_where_there_is_no_result_remarks_begin_with_alarms() -> None:
    rows = compare([summary("a"), summary("b", dataset="cifar10")])
    (_, result), (style, lines), *_ = remarks(rows, ["runs/x has not finished and is left out"])
    assert not result
    assert "red" in style
    assert lines[0].startswith("! NOT COMPARABLE")
    assert lines[-1] == "! runs/x has not finished and is left out"


def test_a_plot_needs_an_attack(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="no attack is common"):
        plot(compare([summary(attacks=())]), tmp_path / "x.png")


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, list[str]]] = {
    "no object": ([1, 2], ["a JSON object is needed"]),
    "no accuracies": ({k: v for k, v in summary().items() if k not in ("final", "phase1")}, ["final"]),
    "no seed": ({k: v for k, v in summary().items() if k != "seed"}, ["seed", "required"]),
    "no method": ({k: v for k, v in summary().items() if k != "algorithm"}, ["algorithm", "required"]),
    "a number that is a word": (summary(seconds={"total": "long"}), ["seconds.total"]),
    "a spread without numbers": (summary(majority={}), ["majority"]),
    "accuracies that are a number": (summary(final=3), ["final"]),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_summary_is_named(case: str) -> None:
    bad, says = BAD[case]
    if isinstance(bad, dict):
        bad = bad | {"source": "runs/bad.json"}
    with pytest.raises(UserError) as caught:
        compare([summary(), bad])
    for part in ["not a summary of a finished run", *says]:
        assert part in str(caught.value)
    assert isinstance(bad, list) or "runs/bad.json" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_method_may_stand_in_place_of_the_algorithm() -> None:
    run = {k: v for k, v in summary(method="FedAvg").items() if k != "algorithm"}
    assert names(compare([run])) == ["FedAvg"]


def test_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="at least one"):
        compare([])
