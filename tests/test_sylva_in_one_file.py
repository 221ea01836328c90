"""The package is equal to `examples/sylva_in_one_file.py`, a loop over ordinary PEFT models, after every stage.

A run computes in float32: the backbone is loaded so, and a worker casts states when it takes them over and gives them
back. The three functions that do this keep float64 here; all else is the public way: ``prepare``, ``run_prepared``, the
run folder. States and values then differ by rounding alone (2e-13 was measured), and no decision differs. The values of
coalitions are in no record, so a worker is asked for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from examples import sylva_in_one_file as plain
from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.records import StageRecord
from sylva_ray.core.types import stack_states
from sylva_ray.execution.run import run_prepared
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.stages.layer_game.rankings.shapley import ShapleyRanking
from sylva_ray.federation.stages.layer_game.shapley import all_coalitions
from sylva_ray.federation.stages.layer_game.tasks import GameTask
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import to_arrays, to_parameters
from sylva_ray.preparation.experiment import create_worker, prepare
from sylva_ray.storage.run_folder import RunFolder

pytestmark = pytest.mark.long

SETTINGS = {
    "DTYPE": torch.float64,
    "RANK": 2,
    "ROUNDS": 2,
    "LR": 0.02,
    "EPSILON": 2 / 255,
    "STEPS": 2,
    "BENIGN_EPOCHS": 2,
    "BENIGN_LR": 0.03,
    "REFINE_EPOCHS": 4,
    "REFINE_LR": 0.1,
    "STRENGTHS": (0.5, 0.75),
    "TOLERANCE": 0.18,
    "BENIGN_TOLERANCE": 0.1,
    "BENIGN_CONFIDENCE": 0.6,
    "ATTACK_STEPS": 2,
    "MAX_IMAGES": 6,
}
"""Constants of the file that are other here."""

BACKBONE = {"name": "test_vit", "image_size": 32}
"""Six blocks, 64 wide, four patches; its weights are drawn by `drawn_weights`."""

TOLERANCE = 1e-10
"""Of states and values, absolute; parameters are of order 0.1. In float32 rounding alone would be 1e-8."""


def drawn_weights(path: Path) -> Path:
    """Write weights with which the game selects some of the layers, and the guard accepts some of the refinements."""
    torch.manual_seed(0)
    for num_classes in (2, 10):  # the second model, whose weights follow those of the first in the stream
        model = timm.create_model(str(BACKBONE["name"]), img_size=BACKBONE["image_size"], num_classes=num_classes)
    save_file(model.state_dict(), path)
    return path


def config_of(checkpoint: Path) -> ExperimentConfig:
    """The settings of the file, as the package has them; what the file leaves at a default is not given here."""
    return build(
        ExperimentConfig,
        {
            "seed": plain.SEED,
            "algorithm": {
                "name": "sylva",
                "head_warmup_lr": plain.HEAD_WARMUP_LR,
                "epsilon_warmup": plain.EPSILON_WARMUP,
                "mixture": {
                    "own_shares": plain.OWN_SHARES,
                    "attack_steps": plain.MIXTURE_STEPS,
                    "max_images": plain.MIXTURE_IMAGES,
                    "balance": plain.BALANCE,
                    "shrink_strength": plain.MIXTURE_SHRINK,
                },
                "phase2": {
                    "benign_epochs": plain.BENIGN_EPOCHS,
                    "benign_lr": plain.BENIGN_LR,
                    "refine_epochs": plain.REFINE_EPOCHS,
                    "refine_lr": plain.REFINE_LR,
                    "attack_steps": plain.ATTACK_STEPS,
                    "max_images": plain.MAX_IMAGES,
                    "shrink_strength": plain.SHRINK_STRENGTH,
                    "strengths": plain.STRENGTHS,
                    "guard_tolerance": plain.TOLERANCE,
                    "guard_confidence": plain.CONFIDENCE,
                    "benign_tolerance": plain.BENIGN_TOLERANCE,
                    "benign_confidence": plain.BENIGN_CONFIDENCE,
                },
            },
            "dataset": {"name": "digits", "max_train": 150, "max_test": 60},
            "partition": {
                "num_clients": 3,
                "min_samples": 30,
                "valid_fraction": 0.4,
                "test_samples": 12,
                "leftovers": "first",  # the splits for which the constants above were found
            },
            "backbone": BACKBONE | {"checkpoint": str(checkpoint)},
            "lora": {"rank": plain.RANK, "alpha": plain.ALPHA, "target_modules": plain.TARGETS},
            "attack": {"epsilon": plain.EPSILON, "steps": plain.STEPS},
            "training": {
                "rounds": plain.ROUNDS,
                "batch_size": plain.BATCH_SIZE,
                "lr": plain.LR,
                "weight_decay": plain.WEIGHT_DECAY,
                "clip_norm": plain.CLIP_NORM,
                "precision": "float32",
                "attention": "fused",
            },
            "evaluation": {
                "attacks": [{"epsilon": plain.EPSILON, "steps": 3}],
                "checks": False,
                "precision": "float32",
            },
            "cluster": {"pool": "in_process"},
            "tracking": {"enabled": False},
        },
    )


def replace_everywhere(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], replacement: Callable[..., Any]
) -> None:
    """Whatever module imported ``function``, under its own name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sylva_ray") and getattr(module, function.__name__, None) is function:
            monkeypatch.setattr(module, function.__name__, replacement)


def own_name(name: str) -> str:
    """The package's name of a PEFT model's parameter."""
    name = name.split("base_model.model.")[1].replace(".modules_to_save.default", "")
    return name.replace(".default.weight", "")


def arrays(client: plain.Client) -> dict[str, np.ndarray]:
    return {own_name(name): value.numpy() for name, value in client.state().items()}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One run by the package and one by the file: states and records of every stage, and both games."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in SETTINGS.items():
            monkeypatch.setattr(plain, name, value)
        yield compare(tmp_path_factory.mktemp("package"))


def compare(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    made = prepare(config_of(drawn_weights(folder / "vit.safetensors")))
    run = RunFolder(folder / "run")
    package, records = [], []

    class Recorder(Observer):
        def on_record(self, record: StageRecord) -> None:
            records.append(record)
            package.append(run.load_states())

    with pytest.MonkeyPatch.context() as monkeypatch:
        replace_everywhere(monkeypatch, create_backbone, lambda *a, **k: create_backbone(*a, **k).double())
        replace_everywhere(
            monkeypatch, to_parameters, lambda stack, device, _: to_parameters(stack, device, torch.float64)
        )
        replace_everywhere(monkeypatch, to_arrays, lambda params: {n: v.numpy().copy() for n, v in params.items()})
        summary = run_prepared(made, run, False, Recorder())
        before_game = package[[record.stage for record in records].index("layer_game")]
        phase2 = create_algorithm(made.config.algorithm).parameters.phase2
        states = stack_states(before_game)
        task = GameTask(plain.ROUNDS + 2, (0, 1, 2), states, phase2, all_coalitions(7), ShapleyRanking())
        played = create_worker(made.config, made.fleet, made.backbone).run(task).outcomes

    vit = timm.create_model(str(BACKBONE["name"]), img_size=BACKBONE["image_size"], num_classes=made.fleet.num_classes)
    vit.load_state_dict({name: torch.from_numpy(value) for name, value in made.backbone.items()})
    clients = [plain.Client(i, made.fleet.client(i), vit) for i in range(3)]
    file, accuracies = [], []

    def look() -> None:
        file.append([arrays(client) for client in clients])
        label = f"pgd3-eps{plain.EPSILON * 255:.4g}"
        accuracies.append([[r.mean() for r in plain.answers(c, c.data.test, 3, label)] for c in clients])

    plain.warm_up(clients)
    look()
    for round in range(1, plain.ROUNDS + 1):
        near = plain.federated_round(clients, round)
        look()
    received = clients[0].state()
    plain.adversarial_epoch(clients, plain.ROUNDS + 1)
    plain.mix_in_others(clients, received)
    look()
    games = plain.layer_game(clients, near)
    look()
    kept = plain.refine(clients, games, near)
    look()
    return {
        "package": package,
        "file": file,
        "records": records,
        "accuracies": accuracies,
        "summary": summary,
        "played": played,
        "near": near,
        "games": games,
        "kept": kept,
    }


STAGES = ["warmup", "phase1", "phase1", "mixture", "layer_game", "phase2"]


def test_the_stages_are_the_same(both: dict[str, Any]) -> None:
    assert [record.stage for record in both["records"]] == STAGES


@pytest.mark.parametrize("step", range(len(STAGES)), ids=[f"{i} {stage}" for i, stage in enumerate(STAGES)])
def test_every_clients_state_is_the_same_after_every_stage(both: dict[str, Any], step: int) -> None:
    for ours, theirs in zip(both["package"][step], both["file"][step], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == np.float64
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=TOLERANCE, err_msg=name)


def test_neighbours_are_the_same(both: dict[str, Any]) -> None:
    (noted,) = [record.neighbours for record in both["records"] if record.neighbours]
    dense = np.zeros((3, 3))
    np.put_along_axis(dense, np.array(noted.members), np.array(noted.weights), axis=1)
    np.testing.assert_allclose(both["near"], dense, atol=TOLERANCE)


def test_coalition_and_shapley_values_are_the_same(both: dict[str, Any]) -> None:
    summary = both["summary"].layer_game
    for game, outcome in zip(both["games"], both["played"], strict=True):
        np.testing.assert_allclose(outcome.values, game["values"], rtol=0, atol=TOLERANCE)
    shapley = np.stack([game["shapley"] for game in both["games"]])
    for column, key in enumerate(("shapley_benign", "shapley_robust")):
        assert np.abs(shapley[:, :, column]).max() > 1e-3
        np.testing.assert_allclose(getattr(summary, key), shapley[:, :, column], rtol=0, atol=TOLERANCE)


def test_every_decision_is_the_same_and_something_is_decided(both: dict[str, Any]) -> None:
    candidates, selected = ([game[key] for game in both["games"]] for key in ("candidates", "selected"))
    summary = both["summary"].layer_game
    assert summary.candidates == [len(rows) for rows in candidates]
    assert np.array_equal(summary.selected, selected)
    assert summary.strength == both["kept"]
    accepted, proposed = np.sum(selected), sum(rows[-1].sum() for rows in candidates)
    assert 0 < accepted < proposed, "the guard refuses something, but not everything"
    assert any(0 < strength < 1 for strength in both["kept"])


def test_the_mixture_changes_some_clients_but_not_all(both: dict[str, Any]) -> None:
    (shares,) = [record.metrics for record in both["records"] if record.stage == "mixture"]
    mixed = [shares[f"{group}_from_global"][client] > 0 for group in ("adapters", "heads") for client in "012"]
    assert 0 < sum(mixed) < len(mixed)


def test_accuracies_are_the_same(both: dict[str, Any]) -> None:
    for record, accuracies in zip(both["records"], both["accuracies"], strict=True):
        if record.evaluation:
            benign, attacked = (found.accuracy for found in record.evaluation.values())
            assert np.array_equal(np.transpose([benign, attacked]), accuracies)
