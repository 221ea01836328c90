"""The threat model in words, and the warning about a budget that was trained for but not measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sylva_ray.config.attacks import parse_attack
from sylva_ray.config.experiment import EvaluationSection, ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.records import StageRecord
from sylva_ray.federation.stages.layer_game.client import Phase2Client
from sylva_ray.federation.threat_model import budget_warnings, threat_model
from sylva_ray.preparation.resolve import resolve_config
from sylva_ray.reports.terminal import closing_lines
from tests.algorithms.toys import tiny_experiment
from tests.federation.runs import run

TRAINED = StageRecord(step=1, stage="phase1", round=1, participants=[], seconds={"train": 1.0, "attack": 2.0})
BENIGN = TRAINED.model_copy(update={"seconds": {"train": 1.0}})
GUARDED = TRAINED.model_copy(update={"stage": "layer_game", "seconds": {"attack": 1.0, "game": 2.0}})


def test_the_threat_model_names_what_was_measured(tiny_config: ExperimentConfig) -> None:
    resolved = resolve_config(tiny_config)

    def stated(*attacks: str) -> Any:
        return threat_model(resolved, [parse_attack(text) for text in attacks], [TRAINED])

    assert stated("pgd:norm=l2,epsilon=0.5")["norm"].startswith("L2, on pixels")
    assert stated("pgd", "sparsefool")["norm"].startswith("L-infinity, L0 (pixels), on")
    assert "white box, except square (the model's answers only)" in stated("square")["evaluation"]
    assert "misclassifies it unchanged or after any step of the attack" in stated("pgd")["evaluation"]
    assert "own test images;" in stated("pgd")["evaluation"]
    equal = tiny_config.partition.model_copy(update={"test_shares": "equal"})
    resolved = resolve_config(tiny_config.model_copy(update={"partition": equal}))
    assert "own test images, as many of each of its classes;" in stated("pgd")["evaluation"]


def test_a_method_without_an_attack_in_training_says_so(tiny_config: ExperimentConfig) -> None:
    resolved, attacks = resolve_config(tiny_config), [parse_attack("pgd")]
    assert threat_model(resolved, attacks, [TRAINED])["training"] == "PGD-1 at epsilon 4/255"
    assert threat_model(resolved, attacks, [BENIGN, GUARDED])["training"] == "without an attack"
    zero = tiny_config.attack.model_copy(update={"epsilon": 0.0})
    resolved = resolve_config(tiny_config.model_copy(update={"attack": zero}))
    assert threat_model(resolved, attacks, [TRAINED])["training"] == "without an attack"
    assert not budget_warnings(resolved, attacks, [TRAINED])


@pytest.mark.parametrize(
    ("attacks", "records", "says"),
    [
        (["pgd:epsilon=8/255"], [TRAINED], "training used L-infinity epsilon 4/255, but only pgd20-eps8 was measured"),
        (["pgd:epsilon=8/255"], [TRAINED, GUARDED], "training and the guard of phase 2 used"),
        (["pgd:epsilon=8/255"], [BENIGN, GUARDED], "the guard of phase 2 used"),
        (["pgd:norm=l2,epsilon=0.5", "deepfool"], [TRAINED], "only pgd20-l2-eps0.5 was measured"),
        (["pgd:epsilon=8/255", "pgd:epsilon=4/255,steps=2"], [TRAINED, GUARDED], ""),
        (["pgd:epsilon=8/255"], [BENIGN], ""),
        (["deepfool"], [TRAINED], ""),
        ([], [TRAINED], ""),
    ],
)
def test_a_budget_that_is_defended_but_not_measured_is_said(
    attacks: Sequence[str], records: Sequence[StageRecord], says: str, tiny_config: ExperimentConfig
) -> None:
    config = resolve_config(tiny_config)
    assert config.attack.epsilon == 4 / 255
    texts = budget_warnings(config, [parse_attack(text) for text in attacks], records)
    assert len(texts) == bool(says)
    assert says in "".join(texts)
    assert not texts or texts[0].endswith("for that: sylva-ray evaluate RUN --attack pgd:epsilon=4/255")
    on_a_curve = [epsilon / 255 for epsilon in (2, 4, 8)]
    assert not budget_warnings(config, [parse_attack(text) for text in attacks], records, on_a_curve)


@pytest.mark.parametrize(
    ("attacks", "numerator"),
    [
        ([{"epsilon": "8/255"}], 8),
        ([{"epsilon": "8/255"}, {"epsilon": "4/255"}], 4),
        ([{"norm": "l2", "epsilon": 0.5}, {"epsilon": "2/255"}], 2),
        ([{"name": "deepfool"}], 4),
        ([], 4),
    ],
)
def test_guard_game_and_mixture_attack_at_what_is_reported(
    attacks: list[dict[str, Any]], numerator: int, tiny_config: ExperimentConfig
) -> None:
    section = build(EvaluationSection, {"attacks": attacks})
    config = resolve_config(tiny_config.model_copy(update={"evaluation": section}))
    assert config.attack.epsilon == 4 / 255
    assert config.reported_epsilon == pytest.approx(numerator / 255)
    guarded = budget_warnings(config, section.specs, [GUARDED])
    assert not guarded, "the guard of phase 2 defends what is measured, or nothing is"


@pytest.mark.slow
def test_the_guard_of_phase_2_uses_that_epsilon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used: list[float] = []
    build_client = Phase2Client.__init__

    def spy(self: Phase2Client, *arguments: Any) -> None:
        build_client(self, *arguments)
        used.append(self.attack.epsilon)

    monkeypatch.setattr(Phase2Client, "__init__", spy)
    phase2 = {"enabled": True, "selection": "all", "attack_steps": 1, "benign_epochs": 1, "refine_epochs": 1}
    evaluation = {"attacks": [{"epsilon": "8/255", "steps": 1}], "checks": False}
    run(tiny_experiment("sylva", {"phase2": phase2}, evaluation=evaluation), tmp_path / "run")
    assert set(used) == {8 / 255}


@pytest.mark.long
@pytest.mark.usefixtures("page")
def test_it_stands_in_summary_terminal_and_report(tmp_path: Path) -> None:
    made = tiny_experiment("fedavg_at", evaluation={"attacks": [{"epsilon": "8/255", "steps": 1}], "checks": False})
    summary = run(made, tmp_path / "run")
    (text,) = summary.warnings
    assert text.startswith("training used L-infinity epsilon 4/255, but only pgd1-eps8 was measured")
    assert f"warning  {text}" in closing_lines(summary, tmp_path / "run", None)
    assert text in (tmp_path / "run" / "report.html").read_text()
