"""The terminal, the log, trackers, figures, summary and model cards say the same of one run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Summary
from sylva_ray.observers.metrics import record_metrics
from sylva_ray.preparation.experiment import check_attacks, prepare
from sylva_ray.reports.model_card import model_card
from sylva_ray.reports.pages.run import write_report
from sylva_ray.reports.progress import mean_metrics
from sylva_ray.reports.terminal import closing_table
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.federation.runs import run

pytestmark = pytest.mark.long

EPSILON = 4 / 255
ATTACKS = [{"epsilon": "4/255", "steps": 1}, {"epsilon": "4/255", "steps": 2}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with an attacker, evaluated on two images of a client between the ends of its phases."""
    folder = RunFolder(tmp_path_factory.mktemp("numbers") / "run")
    sections = {
        "byzantine": {"fraction": 0.34, "attack": "sign_flip"},
        "training": TINY["training"] | {"rounds": 2, "lr": 0.01},
        "evaluation": {"every": 1, "initial": False, "max_samples": 2, "attacks": ATTACKS},
        "algorithm": {"name": "fedavg_at_ft", "model": "lora", "epsilon_warmup": 0.0},
    }
    run(prepare(build(ExperimentConfig, TINY | sections)), folder.path)
    return folder


@pytest.fixture
def records(folder: RunFolder) -> list[StageRecord]:
    return folder.load_records()


@pytest.fixture
def summary(folder: RunFolder) -> Summary:
    found = folder.load_summary()
    assert found is not None
    return found


def test_attackers_count_nowhere(summary: Summary, records: list[StageRecord]) -> None:
    assert summary.byzantine is not None
    (attacker,) = summary.byzantine.attackers
    assert all(record.byzantine == [attacker] for record in records)
    last, final = records[-1], summary.final
    shown, sent = mean_metrics(last)["accuracy"], record_metrics(last, list(final.robust_accuracy))
    assert shown["benign"] == pytest.approx(final.benign_accuracy.mean)
    assert sent["benign_accuracy/mean"] == pytest.approx(final.benign_accuracy.mean)
    for label, spread in final.robust_accuracy.items():
        assert shown[label] == pytest.approx(spread.mean)
        assert sent[f"robust_accuracy/{label}/mean"] == pytest.approx(spread.mean)
    assert f"client_{attacker:03d}/benign_accuracy" in sent, "its own value is there"
    losses = {int(client): loss for client, loss in last.metrics["loss"].items() if int(client) != attacker}
    assert mean_metrics(last)["metrics"]["loss"] == pytest.approx(sum(losses.values()) / len(losses))
    assert f"client {attacker} of 3" in summary.threat_model["byzantine"]


def test_attackers_are_marked(folder: RunFolder, summary: Summary, records: list[StageRecord]) -> None:
    assert summary.byzantine is not None
    (attacker,) = summary.byzantine.attackers
    console = Console(width=120, file=io.StringIO())
    console.print(closing_table(console, summary, records))
    assert f"{attacker} Byzantine" in console.file.getvalue()  # type: ignore[attr-defined]
    page = write_report(folder).read_text()
    assert f'<td>{attacker} <span class="bad">Byzantine</span></td>' in page


def test_what_was_evaluated_in_part_is_no_end_of_a_phase(
    folder: RunFolder, summary: Summary, records: list[StageRecord]
) -> None:
    assert [record.in_part for record in records] == [True, True, True, None]
    assert summary.initial is None, "evaluation.initial=false"
    assert summary.phase1 == summary.final
    assert "Hollow dots are of the first attack, and perhaps of fewer images." in write_report(folder).read_text()


def test_stages_say_what_they_trained_with(records: list[StageRecord]) -> None:
    assert [record.epsilon for record in records] == [None, *[pytest.approx(EPSILON)] * 3]
    assert all(record.lr for record in records)


def test_a_card_counts_all_test_images(folder: RunFolder, summary: Summary) -> None:
    client = summary.clients[0]
    text = model_card(folder.load_config(), summary, 0, ["adapter_model.safetensors"])
    assert f"on this client's {client.test} test images" in text
    assert client.test > 2


def test_methods_without_attacks_have_no_epsilon(tmp_path: Path) -> None:
    sections = {
        "algorithm": {"name": "undefended", "phase2": {"enabled": True, "benign_epochs": 1, "refine_epochs": 1}},
        "training": TINY["training"] | {"rounds": 1},
        "evaluation": {"attacks": ATTACKS[:1], "checks": False},
    }
    summary = run(prepare(build(ExperimentConfig, TINY | sections)), tmp_path)
    records = RunFolder(tmp_path).load_records()
    assert [record.epsilon for record in records] == [None] * len(records)
    (game,) = [record for record in records if record.stage == "layer_game"]
    assert game.lr == 0.001, "algorithm.phase2.benign_lr"
    spent = summary.seconds
    work = spent.train + spent.attack + spent.mixture + spent.game + spent.evaluate + spent.aggregate
    assert spent.setup + work + spent.idle == pytest.approx(spent.total), "every second is in one activity"
    refine = records[-1]
    assert (refine.lr is None) == (not refine.participants)
    assert ("train" in refine.seconds) == bool(refine.participants)


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        ({"epsilon": 1.0, "steps": 20}, "check S4"),
        ({"name": "apgd", "loss": "targeted", "epsilon": "4/255", "steps": 1}, "at least 4 classes"),
    ],
)
def test_attacks_that_cannot_be_shown_are_refused(attack: dict[str, object], says: str) -> None:
    config = build(ExperimentConfig, TINY | {"evaluation": {"attacks": [attack]}})
    with pytest.raises(UserError, match=says):
        check_attacks(config, num_classes=3)
