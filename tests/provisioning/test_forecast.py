"""What is foretold of a run: passes by hand, seconds from rates and launches, and refusals that name what would fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sylva_ray.cli import app
from sylva_ray.config.experiment import load_config
from sylva_ray.core.errors import UserError
from sylva_ray.execution.ray.launcher import RayLauncher
from sylva_ray.preparation.work import Passes, StageWork
from sylva_ray.provisioning.cards import CARDS, GIB, MACHINES
from sylva_ray.provisioning.demand import estimate_demand
from sylva_ray.provisioning.fit import check_fit
from sylva_ray.provisioning.forecast import CPU_SHARE, EFFICIENCY, Forecast, Gpus, forecast, forecast_of, share_bytes
from sylva_ray.provisioning.forecast_lines import _price, cluster_lines, duration, run_lines, table_rows
from sylva_ray.provisioning.launcher_file import LauncherFile, NodeType

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs/digits.yaml")
SMALL = NodeType("small", {"CPU": 4, "GPU": 1}, 4, "g6.xlarge")
HEAD = NodeType("head", {"CPU": 8}, 0, "m7i.2xlarge")
CLUSTER = LauncherFile(Path("cluster.yaml"), "aws", HEAD, (SMALL,), 4, object_store=4_000_000_000)
L4, H100 = CARDS["L4"], CARDS["H100"]

SIMPLE = [
    *("partition.num_clients=4", "dataset.max_train=400", "partition.valid_fraction=0.2", "partition.test_samples=10"),
    *("training.cohort_size=2", "training.batch_size=32", "training.rounds=3", "training.precision=bfloat16"),
    *("attack.steps=5", "evaluation.checks=false", "evaluation.attacks=[{steps: 7}]", "training.clients_per_round=2"),
    *("algorithm={name: per_lora, final_local_epochs: 2, head_warmup_epochs: 3}", "evaluation.precision=float32"),
]
"""Four clients of 80 training images each, that is three batches; two clients a round."""


@pytest.fixture(scope="module")
def digits() -> Forecast:
    return forecast(load_config(DIGITS))


def test_passes_by_hand() -> None:
    """An image of a step passes forward and backward for five steps of the attack and for the loss: twelve times."""
    work = {stage.title: stage for stage in forecast(load_config(DIGITS, SIMPLE)).work}
    rounds, local = 2 * 80 * 12, 4 * 80 * 2 * 12
    evaluated = Passes(evaluation=40 * 14, float32=2 * 40, batches=15)  # one window: forward, then seven gradients
    assert work == {
        "warm-up": StageWork("warm-up", 1, Passes(training=4 * 80 * 3, batches=2 * 3 * 3), 2),
        "phase 1: adversarial": StageWork("phase 1: adversarial", 3, Passes(training=rounds, batches=1 * 3 * 12), 1),
        "phase 1: local epoch": StageWork("phase 1: local epoch", 1, Passes(training=local, batches=2 * 3 * 2 * 12), 2),
        "evaluation in full": StageWork("evaluation in full", 2, evaluated, 2),
    }


def test_seconds_are_those_of_products_or_of_launches(digits: Forecast) -> None:
    found = dataclasses.replace(digits, flops=10**12, blocks=1)
    many = Passes(training=1000, evaluation=200, float32=30)
    assert digits.config.training.precision == digits.config.evaluation.precision == "float32"
    assert found.stage_seconds(many, Gpus(L4)) == pytest.approx(1230e12 / (EFFICIENCY["float32"] * 30.3e12))
    low = found.config.training.model_copy(update={"precision": "bfloat16"})
    mixed = dataclasses.replace(found, config=found.config.model_copy(update={"training": low}))
    expected = 1000e12 / (EFFICIENCY["bfloat16"] * 121e12) + 230e12 / (EFFICIENCY["float32"] * 30.3e12)
    assert mixed.stage_seconds(many, Gpus(L4)) == pytest.approx(expected)
    assert found.stage_seconds(Passes(batches=1000), Gpus(L4, actors=2)) == pytest.approx(1000 * 21 * 1e-4 / 2)


def test_gpus_share_the_tasks_of_a_stage_as_far_as_it_has_cohorts(digits: Forecast) -> None:
    stage = StageWork("x", 2, Passes(training=1000), cohorts=2)
    one = digits.run_seconds([Gpus(L4)], [stage])
    assert digits.run_seconds([Gpus(L4, 2)], [stage]) == pytest.approx(one / 2)
    assert digits.run_seconds([Gpus(L4, 8)], [stage]) == pytest.approx(one / 2)
    h100 = digits.run_seconds([Gpus(H100)], [stage])
    assert digits.run_seconds([Gpus(L4), Gpus(H100)], [stage]) == pytest.approx(1 / (1 / one + 1 / h100))


def test_larger_cards_hold_more_actors_and_a_plan_stays_within_its_share(digits: Forecast) -> None:
    for card in CARDS.values():
        count = digits.actors_on(card)
        assert count >= 1
        assert digits.plan(share_bytes(card, 1 / count)).peak <= card.memory / count
    assert digits.actors_on(dataclasses.replace(L4, memory=GIB // 2)) == 0
    assert table_rows(digits, [dataclasses.replace(L4, memory=GIB // 2)])[0][:2] == ("L4", "0")


def test_a_checkpoint_holds_the_states_of_all_clients(digits: Forecast) -> None:
    assert digits.checkpoint_bytes == 6 * digits.traffic.state_bytes
    section = digits.config.compression.model_copy(update={"kind": "int8"})
    config = digits.config.model_copy(update={"compression": section})
    assert dataclasses.replace(digits, config=config).checkpoint_bytes == 12 * digits.traffic.state_bytes


def checked(*overrides: str, file: LauncherFile = CLUSTER) -> list[str]:
    """The lines about a run of the digits, one client per cohort, on a cluster of L4s."""
    config = load_config(DIGITS, ["training.cohort_size=1", *overrides])
    demand = estimate_demand(config, file, RayLauncher())
    found = forecast_of(demand.sketch)
    check_fit(demand, found, file)
    return cluster_lines(demand, found, file)


def test_what_fits_is_described_with_its_price() -> None:
    text = "\n".join(checked("cluster.gpus_per_actor=0.5"))
    for part in ("an actor on small:", "an L4 (22 GiB)", "3.00 GB of RAM", "$2.80 an hour", "checkpoint    4 MB"):
        assert part in text


@pytest.mark.parametrize(
    ("overrides", "file", "parts"),
    [
        (
            ["cluster.gpus_per_actor=0.03", "cluster.cpus_per_actor=0.5"],
            CLUSTER,
            ["cluster.gpus_per_actor = 0.03", "the L4 of small", "cluster.gpus_per_actor=0.2", "A100 or", "H200"],
        ),
        (
            ["cluster.gpus_per_actor=0.25", "partition.num_clients=8"],
            CLUSTER,
            ["4 actors on small (g6.xlarge) need 12.00 GB of RAM", "17.18 GB", "=0.33, or g6.2xlarge (34.36 GB)"],
        ),
        (
            ["cluster.gpus_per_actor=0.5", "cluster.memory_per_actor=16 GB"],
            CLUSTER,
            ["cluster.memory_per_actor = '16.00 GB'", "of the L4 of small is 11.81 GB"],
        ),
        (
            ["cluster.gpus_per_actor=0.5", "cluster.memory_per_actor=100 MB"],
            CLUSTER,
            ["cluster.memory_per_actor = '100 MB'", "is too small: at least"],
        ),
        (
            ["cluster.gpus_per_actor=1"],
            dataclasses.replace(CLUSTER, object_store=20_000_000),
            ["OBJECT_STORE_BYTES = 20000000", "raise it to at least 2365"],
        ),
    ],
)
def test_what_cannot_fit_is_refused_and_what_would_is_named(
    overrides: list[str], file: LauncherFile, parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        checked(*overrides, file=file)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_of_an_unknown_machine_nothing_is_foretold() -> None:
    file = dataclasses.replace(CLUSTER, workers=(dataclasses.replace(SMALL, instance="x9.huge"),))
    assert "the card of small is not known" in "\n".join(checked("cluster.gpus_per_actor=0.5", file=file))
    assert "the actors are on CPUs" in "\n".join(checked("cluster.gpus_per_actor=0"))


def test_every_machine_has_a_known_card() -> None:
    assert {machine.card for machine in MACHINES.values()} == {None, *CARDS}
    assert all((machine.num_gpus > 0) == (machine.card is not None) for machine in MACHINES.values())


def test_a_dry_run_prints_settings_and_forecast_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    result = CliRunner().invoke(app, ["run", DIGITS, "--dry-run", "lora.rank=4", "cluster.memory_per_actor=1.2 GB"])
    assert result.exit_code == 0, result.stderr
    settings, _, text = result.stdout.partition("\n\n")
    (tmp_path / "again.yaml").write_text(settings)
    again = load_config(tmp_path / "again.yaml")
    assert (again.lora.rank, again.training.cohort_size) == (4, 3)
    assert again.training.windows != "auto"
    assert again.training.windows.train < 2048  # of this budget
    for part in ("6 with about 239 images each", "GFLOP an image", "B up and", "an actor:", "float32 is assumed"):
        assert part in " ".join(text.split())
    assert [line.split()[0] for line in text.splitlines()[-len(CARDS) :]] == list(CARDS)
    assert max(map(len, text.splitlines())) <= 60
    assert "epsilon: 8/255" in settings
    time = " ".join(text.split()).partition("time a round ")[2]
    assert "(an estimate: 33% of" in time
    assert "GFLOP/s (float32)" in time
    assert {path.name for path in tmp_path.iterdir()} == {"again.yaml"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["cluster.gpus_per_actor=1.5"], "cluster.gpus_per_actor = 1.5: must be a whole number above 1"),
        (["cluster.memory_per_actor=900MB"], "is too small: at least"),
        (["training.precison=bfloat16"], "did you mean 'precision'"),
        (["--resume"], "starts and writes nothing: leave out --resume, --out"),
        (["--out", "x"], "starts and writes nothing"),
        (["--out", ""], "starts and writes nothing"),
        (["--allow-changed"], "leave out --resume, --out and --allow-changed"),
        (["-q"], "leave out --quiet, --verbose and --log-format"),
        (["--log-format", "json"], "leave out --quiet, --verbose and --log-format"),
    ],
)
def test_a_dry_run_of_what_cannot_run_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", DIGITS, "--dry-run", *arguments])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [80])
def test_the_lines_of_a_check_fit_a_terminal(width: int) -> None:
    arguments = ["cluster", "check", str(ROOT / "cluster.yaml"), "--config", DIGITS, "cluster.gpus_per_actor=0.5"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert all(len(line) <= width for line in lines if " " in line.strip()), max(lines, key=len)


def test_time_on_cpus_is_that_of_the_products_shared_by_the_actors(digits: Forecast) -> None:
    stages = [StageWork("x", 3, Passes(training=100, float32=20), cohorts=2)]
    found = dataclasses.replace(digits, flops=10**9, work=stages)
    assert found.cpu_seconds({"float32": 60e9}, 1) == pytest.approx(3 * 120e9 / (CPU_SHARE * 60e9))
    assert found.cpu_seconds({"float32": 60e9}, 8) == pytest.approx(3 * 120e9 / (CPU_SHARE * 60e9) / 2)
    assert found.cpu_seconds({"float32": 60e9}, 1, only_round=True) == 0


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.2, 119, 121, 7199, 7200)] == [
        "<1 s",
        "119 s",
        "2 min",
        "120 min",
        "2.0 h",
    ]


def test_a_price_below_a_cent_is_no_number_with_an_exponent() -> None:
    assert [_price(dollars) for dollars in (8.2e-05, 0.012, 3.4)] == ["<$0.01", "$0.012", "$3.4"]


def test_run_lines_of_a_cluster_name_ram_and_leave_the_card_to_the_table() -> None:
    found = forecast(load_config(DIGITS, ["cluster.address=auto", "cluster.gpus_per_actor=0.5"]))
    assert "of RAM, and on its card as below" in " ".join(run_lines(found))


def test_actors_without_a_cohort_launch_nothing(digits: Forecast) -> None:
    """A stage of two cohorts is no faster with eight actors on a card than with two, nor on one card than on two."""
    stage = StageWork("x", 3, Passes(batches=1000), cohorts=2)
    two, eight = (digits.run_seconds([Gpus(L4, 1, actors)], [stage]) for actors in (2, 8))
    assert eight == two == pytest.approx(digits.run_seconds([Gpus(L4, 1, 1)], [stage]) / 2)
    assert digits.run_seconds([Gpus(L4, 2, 8)], [stage]) == pytest.approx(two)
    one_cohort = dataclasses.replace(digits, work=[dataclasses.replace(work, cohorts=1) for work in digits.work])
    assert one_cohort.actors_on(H100) == 1
