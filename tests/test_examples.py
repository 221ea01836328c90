"""The reader's own method: the example runs, is as short as promised, and is the one that the documentation shows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import sylva_ray
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import AlgorithmSection, ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.own_code import importing_from
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.execution.run import run_prepared
from sylva_ray.federation.context import Batch, ClientContext, RoundUploads
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.stages.kinds import title_of
from sylva_ray.preparation.experiment import prepare
from sylva_ray.reports.console import create_console
from sylva_ray.reports.pages.run import write_report
from sylva_ray.reports.terminal import closing_table
from sylva_ray.storage.jsonl import read_records
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.fake_model import FakeModel

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "margin_at.py"
NAME = "examples.margin_at:MarginAT"
THIRD = "examples.third_phase:HardenedSylva"
FEW = TINY | {
    "dataset": TINY["dataset"] | {"max_train": 90, "max_test": 30},
    "partition": TINY["partition"] | {"min_samples": 16, "test_samples": 6},
    "training": TINY["training"] | {"rounds": 1},
}
"""`TINY` with one round and fewer images."""


@pytest.fixture(autouse=True)
def _import_from_the_root() -> Iterator[None]:
    with importing_from([ROOT]):
        yield


def test_the_example_is_short_and_quoted_verbatim() -> None:
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) < 60
    assert f"```python\n{source}```" in (ROOT / "docs" / "methods.md").read_text()


def test_the_example_runs_both_phases_end_to_end(tmp_path: Path) -> None:
    config = build(ExperimentConfig, {**FEW, "algorithm": {**TINY["algorithm"], "name": NAME, "width": 2}})
    summary = run_prepared(prepare(config), RunFolder(tmp_path / "run"), False, Observer())
    assert summary.algorithm == NAME
    assert all(np.isfinite(summary.final.benign_accuracy.per_client))
    assert summary.communication.upload_bytes_per_client_round > 0
    assert (tmp_path / "run" / "adapters" / "client_002").is_dir()


def test_a_third_phase_is_one_new_file(tmp_path: Path) -> None:
    """It is recorded, evaluated and resumed like any stage, and phase 1 still ends where phase 2 begins."""
    config = build(ExperimentConfig, {**FEW, "algorithm": {**TINY["algorithm"], "name": THIRD}})
    made = prepare(config)
    summary = run_prepared(made, RunFolder(tmp_path / "run"), False, Observer())
    records = read_records(tmp_path / "run" / "rounds.jsonl")
    assert [record["stage"] for record in records] == [
        *("warmup", "phase1", "mixture", "layer_game", "phase2", "harden")
    ]
    assert records[-1]["epsilon"] == pytest.approx(1.25 * config.attack.epsilon)
    full = [set(record["evaluation"] or ()) for record in records]
    assert full[2] < full[5], "the end of the run has the unbounded attack, too"
    assert full[4], "phase 2 ends before the third phase begins"
    end_of_phase1 = records[2]["evaluation"]["benign"]["accuracy"]
    assert summary.phase1 is not None
    assert summary.phase1.benign_accuracy.per_client == pytest.approx(end_of_phase1)
    report = write_report(RunFolder(tmp_path / "run")).read_text()
    assert "sylva_ray" in report
    whole = RunFolder(tmp_path / "run").load_states()
    (tmp_path / "run" / "checkpoint" / "round_0005" / "manifest.json").unlink()
    run_prepared(prepare(config, RunFolder(tmp_path / "run")), RunFolder(tmp_path / "run"), True, Observer())
    for before, after in zip(whole, RunFolder(tmp_path / "run").load_states(), strict=True):
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert title_of("harden") == "phase 3: hardening"


@pytest.mark.usefixtures("page")
@pytest.mark.parametrize("phase2", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_result_of_a_third_phase_is_shown_as_such(phase2: bool, tmp_path: Path) -> None:
    method = {"name": THIRD, "phase2": TINY["algorithm"]["phase2"] | {"enabled": phase2}, "harden_factor": 4.0}
    run, fast = tmp_path / "run", {"training": FEW["training"] | {"lr": 0.02}}
    summary = sylva_ray.run(FEW | fast | {"algorithm": method}, out=run, show="nothing")
    assert summary.phase1 is not None
    assert summary.final != summary.phase1
    folder = RunFolder(run)
    table = closing_table(create_console(), summary, folder.load_records())
    assert str(table.title).endswith("before > phase 1 > phase 3")
    benign = [end.benign_accuracy.mean for end in (summary.initial, summary.phase1, summary.final) if end is not None]
    (column,) = (column for column in table.columns if column.header == "benign")
    assert list(column.cells)[-2] == " > ".join(f"{100 * value:5.1f}" for value in benign)
    html = folder.report_file.read_text()
    assert html.count(">phase 3<") >= 1
    assert ">phase 2<" not in html
    assert ("phases 2 and 3" in html) == phase2, "what is shaded in the figure"
    rows = sylva_ray.compare([run], show="nothing")
    accuracies = {row.stage: row.accuracy["benign", "accuracy", "mean"].mean for row in rows if row.stage != "majority"}
    assert accuracies == pytest.approx({"phase1": benign[1], "final": benign[2]})


class Linear(FakeModel):
    """Logits are the first two pixels of the first channel, whatever the parameters."""

    head_names: tuple[str, ...] = ()

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        del params, owner
        return x[:, 0, 0, :2]


def test_loss_attack_and_weights_by_hand() -> None:
    method = create_algorithm(AlgorithmSection(name=NAME, width=4))
    context = ClientContext(Linear(), torch.tensor([[16, 1], [0, 81]]), {}, Stopwatch())
    x = torch.full((3, 3, 1, 2), 0.5)
    x[:, 0, 0] = torch.tensor([0.6, 0.4])
    y, owner = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    batch = Batch(x, y, owner, 2, torch.ones(2, dtype=torch.bool), ImageDraws(torch.arange(3)))
    losses = method.sample_losses(context, {}, batch, x)
    margins = [-0.2 + 4 / 2, 0.2 + 4 / 1, 0.2 + 4 / 3]  # of 16, 1 and 81 images of the class
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(m)) for m in margins])
    x_adv = method.craft(context, {}, batch, AttackSpec("pgd", 0.1, 4, 0.05))
    moved = (x_adv - x)[:, 0, 0]
    assert moved.flatten().tolist() == pytest.approx([-0.1, 0.1, 0.1, -0.1, 0.1, -0.1], abs=1e-6)
    uploads = RoundUploads(1, [], [], {}, num_samples=[1, 4, 9])
    assert method.client_weights(uploads, [0, 2]).tolist() == [1, 3]
