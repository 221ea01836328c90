"""Phase 2 from one and the same end of phase 1: every way to select layers runs, and selecting none is legal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sylva_ray.algorithms.sylva import Sylva
from sylva_ray.attacks.losses import true_class_probability
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.summary import Summary
from sylva_ray.core.types import ParameterStack, stack_states
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.client.measuring import EvaluateTask
from sylva_ray.federation.client.training import run_epochs
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.observer import EventLog, Notice, Observer, StageStarted
from sylva_ray.federation.stages.layer_game.client import Phase2Client, SelectionImages
from sylva_ray.federation.stages.layer_game.rankings import shapley
from sylva_ray.federation.stages.layer_game.rankings.gates import learned_gates
from sylva_ray.federation.stages.layer_game.rankings.registry import create_ranking
from sylva_ray.federation.stages.layer_game.rankings.shift import relative_shift
from sylva_ray.federation.stages.layer_game.shapley import exact_shapley
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.federation.stages.layer_game.tasks import GameOutcome, GameTask
from sylva_ray.models.cohort import repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack
from sylva_ray.models.peft_format import load_adapter
from sylva_ray.preparation.experiment import Prepared, create_worker, prepare
from sylva_ray.storage.checkpoint import CheckpointFolder
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.federation.runs import newest, records_of, run

pytestmark = pytest.mark.long

PLAYERS = 7
SHORT = TINY | {
    "dataset": TINY["dataset"] | {"max_train": 90, "max_test": 30},
    "partition": TINY["partition"] | {"min_samples": 16, "test_samples": 6},
    "training": TINY["training"] | {"rounds": 1},
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 1}], "checks": False},
}


def prepared(phase2: dict[str, Any] | None = None, method: dict[str, Any] | None = None, **sections: Any) -> Prepared:
    """`SHORT` with one round and no last local epoch; ``phase2`` on top of the tiny one, None: no phase 2."""
    second = {"enabled": False} if phase2 is None else TINY["algorithm"]["phase2"] | phase2
    algorithm = {"name": "sylva", "final_local_epochs": 0, "phase2": second} | (method or {})
    return prepare(build(ExperimentConfig, SHORT | {"algorithm": algorithm} | sections))


@pytest.fixture(scope="module")
def phase1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder at the end of phase 1: interrupted when the layer game would begin."""
    folder, made = tmp_path_factory.mktemp("phase1"), prepared({})

    class Interrupt(Observer):
        def on_stage(self, started: StageStarted) -> None:
            if started.title == LayerGame.title:
                raise KeyboardInterrupt

    pool = InProcessPool(create_worker(made.config, made.fleet, made.backbone))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(made, RunFolder(folder), pool, Interrupt())
    return folder


def go_on(phase1: Path, folder: Path, **phase2: Any) -> Summary:
    folder.mkdir()
    end = newest(phase1)  # without the settings that it was made with, which differ in phase 2
    CheckpointFolder(folder / "checkpoint").save(end.step, end.states, end.records, end.game, end.residuals)
    return run(prepared(phase2), folder)


@pytest.mark.parametrize("selection", ["shapley", "greedy", "gates", "shift", "all", "head", "random"])
def test_every_selection_runs_to_the_end(selection: str, phase1: Path, tmp_path: Path) -> None:
    """With a guard that lets everything pass, what is selected is the largest candidate."""
    summary = go_on(
        phase1, tmp_path / "run", selection=selection, guard_tolerance=1.0, benign_tolerance=1.0, gate_steps=5
    )
    game = summary.layer_game
    assert game is not None
    assert game.selection == selection
    selected = np.array(game.selected)
    assert selected.shape == (3, PLAYERS)
    assert (game.shapley is not None) == (selection == "shapley")
    assert (game.scores is not None) == (selection in ("gates", "shift", "random"))
    assert game.coalitions_evaluated == (3 * 2**PLAYERS if selection in ("shapley", "greedy") else 0)
    scores = np.array(game.scores)
    match selection:
        case "shapley":
            assert np.array_equal(selected, np.array(game.shapley_benign) > 0)
        case "gates":
            assert scores.shape == (3, PLAYERS)
            assert ((scores >= 0) & (scores <= 1)).all()
            assert np.array_equal(selected, scores > 0.5)
        case "head":
            assert selected.astype(int).tolist() == [[0] * (PLAYERS - 1) + [1]] * 3
        case "greedy":
            assert selected.any()
        case _:
            assert selected.all()
    if selection == "shift":
        assert (scores < 0).all(), "minus the relative shift"
    start, end = newest(phase1).states, newest(tmp_path / "run").states
    refined = [client for client in range(3) if game.kept(client)]
    assert refined == [client for client in range(3) if selected[client].any()]
    players = layers_of(prepared({}))
    for client in range(3):
        for player, names in enumerate(players.values()):
            moved = any(not np.array_equal(start[client][name], end[client][name]) for name in names)
            assert moved == selected[client, player], (client, player)


def layers_of(made: Prepared) -> dict[str, tuple[str, ...]]:
    """The players of the layer game, with the names of their parameters."""
    model = create_worker(made.config, made.fleet, made.backbone).model
    assert isinstance(model, LoraStack)
    return model.players


@pytest.mark.usefixtures("page")
def test_a_client_without_finite_values_refines_nothing_and_the_run_ends_and_can_be_read(
    phase1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no such numbers: the record of the game holds null for this client, and the figure leaves it out."""

    def spoiled(values: np.ndarray) -> np.ndarray:
        phi = np.array(exact_shapley(values))
        if next(calls) == 1:
            phi[:] = np.nan
        return phi

    calls = iter(range(100))
    monkeypatch.setattr(shapley, "exact_shapley", spoiled)
    log = EventLog()
    (tmp_path / "run").mkdir()
    end = newest(phase1)
    CheckpointFolder(tmp_path / "run" / "checkpoint").save(end.step, end.states, end.records, end.game, end.residuals)
    game = run(prepared({}), tmp_path / "run", log).layer_game
    assert game is not None
    assert game.shapley is not None
    assert [any(value is None for value in row) for row in game.shapley] == [False, True, False]
    assert not any(game.selected[1])
    assert any("no finite values of client 1" in event.text for event in log.events if isinstance(event, Notice))
    stored = RunFolder(tmp_path / "run").load_summary()
    assert stored is not None
    assert stored.layer_game == game
    assert newest(tmp_path / "run").game == game


def test_an_empty_selection_is_legal_and_leaves_phase_1_as_it_was(
    phase1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sylva_ray.federation.stages.layer_game.stage.select_layers",
        lambda candidates, *_: np.zeros_like(candidates[:, 0]),
    )
    summary = go_on(phase1, tmp_path / "run", selection="all")
    game = summary.layer_game
    assert game is not None
    assert not np.array(game.selected).any()
    assert game.strength == game.guard_bound == game.benign_bound == [0, 0, 0]
    records = records_of(tmp_path / "run")
    assert [record["stage"] for record in records[-2:]] == ["layer_game", "phase2"]
    assert records[-1]["participants"] == []
    assert records[-1]["upload_bytes"] == 0
    start, end = newest(phase1).states, newest(tmp_path / "run").states
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(start, end, strict=True) for name in a)
    assert summary.phase1 is not None
    assert summary.final.benign_accuracy == summary.phase1.benign_accuracy
    assert (tmp_path / "run" / "report.html").exists()


# -- the scores of layers ----------------------------------------------------------------------------------------------


def played(
    phase1: Path, method: type[Algorithm] | None = None, **sections: Any
) -> tuple[CohortWorker, GameTask, tuple[GameOutcome, ...]]:
    """The game of two clients of unequal size at the end of phase 1, with the worker that has run it."""
    made = prepared({"gate_steps": 40, "max_images": 4}, **sections)
    worker = create_worker(made.config, made.fleet, made.backbone)
    if method is not None:
        worker.algorithm = method(worker.algorithm.parameters)
    states = stack_states([newest(phase1).states[client] for client in (0, 2)])
    phase2 = worker.algorithm.parameters.phase2
    task = GameTask(3, (0, 2), states, phase2, np.zeros((1, PLAYERS), bool), create_ranking("shapley"))
    return worker, task, worker.run(task).outcomes


def make_player(phase1: Path, method: type[Algorithm] | None = None, **sections: Any) -> Phase2Client:
    """Two clients of unequal size at the end of phase 1, about to score their layers."""
    worker, task, _ = played(phase1, method, **sections)
    return Phase2Client.from_task(worker, task, to_parameters(task.states, "cpu", torch.float32), task.phase2)


@pytest.fixture(scope="module")
def player(phase1: Path) -> Phase2Client:
    return make_player(phase1)


def layer_scores(player: Phase2Client, benign: ParameterStack, kind: str) -> np.ndarray:
    """``[C, n]``, as the ranking of that name measures them."""
    outcomes = create_ranking(kind).measure(player, benign, np.zeros((0, PLAYERS), bool))
    return np.stack([outcome.scores for outcome in outcomes if outcome.scores is not None])


def with_bias(player: Phase2Client, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """A head that answers by class frequencies alone, whatever the image: attacks cannot change it."""
    return player.robust | {"head.weight": torch.zeros_like(player.robust["head.weight"]), "head.bias": bias}


def test_gates_open_where_it_pays_and_shut_where_nothing_differs(
    player: Phase2Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """theta^r's head knows nothing, theta^b's the class frequencies; elsewhere only the price of a gate acts."""
    labels = [own.selection.labels[:4] for own in player.data]
    frequencies = torch.stack([torch.bincount(torch.from_numpy(own), minlength=10) / len(own) for own in labels])
    knowing = with_bias(player, (frequencies + 0.01).log())
    misled = with_bias(player, -5 * frequencies)
    monkeypatch.setattr(player, "robust", with_bias(player, torch.zeros(2, 10)))
    scores = layer_scores(player, knowing, "gates")
    assert scores.shape == (2, PLAYERS)
    assert (scores[:, -1] > 0.7).all()
    assert (scores[:, :-1] < 0.25).all()
    assert (layer_scores(player, misled, "gates") < 0.25).all(), (
        "a gate that costs accuracy shuts like one without effect"
    )


def test_gates_and_shifts_are_each_clients_own(player: Phase2Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's scores do not depend on who shares its cohort."""
    monkeypatch.setattr(player, "phase2", player.phase2.model_copy(update={"gate_steps": 5}))
    together = {kind: layer_scores(player, player.benign_end_point(), kind) for kind in ("gates", "shift")}
    alone = {name: value[1:] for name, value in player.robust.items()}
    monkeypatch.setattr(player, "robust", alone)
    monkeypatch.setattr(player, "clients", (2,))
    monkeypatch.setattr(player, "data", player.data[1:])
    monkeypatch.setattr(player, "class_counts", player.class_counts[1:])
    benign = player.benign_end_point()
    for kind, scores in together.items():
        np.testing.assert_allclose(layer_scores(player, benign, kind)[0], scores[1], rtol=0.05, atol=0.02)


def test_benign_epochs_are_on_the_loss_that_the_method_names(player: Phase2Client, phase1: Path) -> None:
    """With a loss of 0 nothing moves, neither theta^b nor what is refined."""

    class Still(Sylva):
        def refinement_losses(self, context: ClientContext, params: ParameterStack, batch: Batch) -> torch.Tensor:
            return super().refinement_losses(context, params, batch) * 0

    assert any((player.benign_end_point()[name] != value).any() for name, value in player.robust.items())
    still = make_player(phase1, Still, training={"weight_decay": 0.0})
    everything = np.ones((2, PLAYERS), bool)
    for found in (still.benign_end_point(), still.refined(everything)):
        assert all(torch.equal(found[name], value) for name, value in still.robust.items())


def test_values_candidates_and_shrinkage_weigh_held_out_images(phase1: Path) -> None:
    """Where the first image of a client weighs a billion times as much as the others, it alone decides."""

    class FirstImage(Sylva):
        def image_weights(self, class_counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
            del class_counts
            return np.where(np.arange(len(labels)) == 0, 1e9, 1.0)

    worker, task, outcomes = played(phase1, FirstImage)
    assert [outcome.num_samples for outcome in outcomes] == pytest.approx([1, 1])
    player = Phase2Client.from_task(worker, task, to_parameters(task.states, "cpu", torch.float32), task.phase2)
    benign = player.benign_end_point()
    images = player.selection_images(benign)
    with torch.no_grad():
        alone = true_class_probability(player.model.forward(player.robust, images.x, images.owner), images.y)
    firsts = [int((images.owner == client).nonzero()[0]) for client in (0, 1)]
    for outcome, first in zip(outcomes, firsts, strict=True):
        assert outcome.values[0, 0] == pytest.approx(float(alone[first]), abs=1e-5)
    candidates = np.zeros((2, 2, PLAYERS), bool)
    candidates[:, 1] = True
    refined = player.refine(candidates[:, 1])[1]
    for found in (*player.try_candidates(benign, candidates), *refined):
        assert found.num_samples == pytest.approx(1)
        assert np.allclose(found.lost.round(), found.lost, atol=1e-6)


def test_gates_weigh_held_out_images(player: Phase2Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images without weight might as well be absent."""
    monkeypatch.setattr(player, "phase2", player.phase2.model_copy(update={"gate_steps": 3}))
    benign = player.benign_end_point()
    images = player.selection_images(benign)
    first = torch.cat([(images.owner == client).nonzero()[:1, 0] for client in (0, 1)])
    weights = torch.zeros(len(images.x)).index_copy(0, first, images.counts.float())
    alone = SelectionImages(
        images.x[first], images.y[first], repeat_owner([1, 1]), 2, [x[first] for x in images.against], torch.ones(2)
    )
    found = learned_gates(player, benign, replace(images, weights=weights))
    np.testing.assert_allclose(found, learned_gates(player, benign, alone), atol=2e-5)
    assert np.abs(found - learned_gates(player, benign, images)).max() > 1e-4


@pytest.mark.parametrize("weights", [np.zeros(4), np.array([1.0, np.nan, 1.0, 1.0]), np.ones(3)])
def test_weights_that_are_none_are_refused(
    weights: np.ndarray, player: Phase2Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(player, "image_weights", lambda *_: weights)
    with pytest.raises(UserError, match="image_weights must return a positive number for every image"):
        player.weights(player.selection_splits)


def test_a_refinement_that_diverges_leaves_the_client_at_theta_r(
    player: Phase2Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two clients gets an infinite entry; no mixture of its states may be computed from that."""
    train = run_epochs

    def diverging(params: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        losses = train(params, *args, **kwargs)
        params["head.bias"][0] = float("inf")
        return losses

    monkeypatch.setattr("sylva_ray.federation.stages.layer_game.client.run_epochs", diverging)
    stacks, outcomes = player.refine(np.ones((2, PLAYERS), bool))
    for stack in stacks:
        robust = {name: value[0].numpy() for name, value in player.robust.items()}
        assert all(np.allclose(stack[name][0], value, atol=1e-6) for name, value in robust.items())
        assert not all(np.array_equal(stack[name][1], value[1]) for name, value in player.robust.items())
    assert not outcomes[0].lost.any()
    assert not outcomes[0].gained.any()


def test_shift_is_the_relative_distance_after_every_block(player: Phase2Client) -> None:
    """Against one plain forward with hooks on the blocks and the head."""
    x, y = torch.rand(5, 3, 32, 32), repeat_owner([2, 3])
    moved = (x + 0.05 * torch.randn(x.shape)).clamp(0, 1)
    seen: dict[int, list[torch.Tensor]] = {}
    model: Any = player.model.backbone.model
    hooks = [
        block.register_forward_hook(lambda _, __, out, key=i: seen.setdefault(key, []).append(out))
        for i, block in enumerate([*model.blocks, model.head])
    ]
    with torch.no_grad():
        for images in (x, moved):
            player.model.forward(player.robust, images, y)
    for hook in hooks:
        hook.remove()
    expected = np.zeros((2, PLAYERS))
    for layer, (clean, after) in seen.items():
        distance, size = (after - clean).flatten(1).norm(dim=1), clean.flatten(1).norm(dim=1)
        for client, rows in enumerate((slice(0, 2), slice(2, 5))):
            expected[client, layer] = distance[rows].mean() / size[rows].mean()
    against, unmoved = (
        SelectionImages(x, torch.zeros(5), y, 2, [images, images], torch.ones(5)) for images in (moved, x)
    )
    np.testing.assert_allclose(relative_shift(player, against), expected, rtol=1e-4)
    assert not relative_shift(player, unmoved).any()


# -- what is measured, and when ----------------------------------------------------------------------------------------


def test_a_run_on_held_out_images_says_so_and_measures_them(tmp_path: Path) -> None:
    made = prepared(dataset={"name": "digits", "max_train": 130, "test_pool": "train"})
    assert set(map(bytes, made.fleet.dataset.test.images)).isdisjoint(map(bytes, made.fleet.dataset.train.images))
    summary = run(made, tmp_path / "run")
    pool = create_worker(made.config, made.fleet, made.backbone)
    task = EvaluateTask(1, (0, 1, 2), stack_states(newest(tmp_path / "run").states))
    for client, answer in enumerate(pool.run(task).outcomes):
        right = answer.predictions["benign"] == made.fleet.client(client).test.labels
        assert summary.final.benign_accuracy.per_client[client] == pytest.approx(right.mean())
    assert "held-out training images" in summary.threat_model["evaluation"]


def test_rounds_between_measure_the_first_attack_and_shared_heads_start_as_one(tmp_path: Path) -> None:
    attacks = [{"epsilon": "4/255", "steps": 1}, {"epsilon": "2/255", "steps": 1}]
    made = prepared(
        method={"name": "fedit_at"},
        training=TINY["training"] | {"rounds": 2},
        evaluation={"attacks": attacks, "checks": False, "every": 1, "max_samples": 3},
    )
    run(made, tmp_path / "run")
    records = records_of(tmp_path / "run")
    first, second = (spec.label for spec in made.config.evaluation.specs)
    assert [set(record["evaluation"]) for record in records] == [
        {"benign", first, second},
        {"benign", first},
        {"benign", first, second},
    ]
    folder = CheckpointFolder(tmp_path / "run" / "checkpoint")
    shutil.rmtree(folder.root / "round_0002")
    shutil.rmtree(folder.root / "round_0001")
    warm = folder.latest()
    assert warm is not None
    heads = {name: value for name, value in warm.states[0].items() if name.startswith("head")}
    assert records[0]["upload_bytes"] == 3 * sum(value.nbytes for value in heads.values())
    assert all(np.array_equal(state[name], heads[name]) for state in warm.states for name in heads)


def test_fast_training_runs_with_its_guard(tmp_path: Path) -> None:
    made = prepared(attack={"name": "fgsm_rs", "epsilon": "4/255"}, method={"epsilon_warmup": 0.0})
    run(made, tmp_path / "run")
    warmup, training = records_of(tmp_path / "run")
    assert set(warmup["metrics"]) == {"loss"}
    assert set(training["metrics"]) == {"loss", "rolled_back"}
    assert set(training["metrics"]["rolled_back"]) == {"0", "1", "2"}


class CountingPool(InProcessPool):
    """Notes every evaluation that it runs."""

    def __init__(self, worker: CohortWorker) -> None:
        super().__init__(worker)
        self.evaluated: list[EvaluateTask] = []

    def run(
        self, tasks: Sequence[Any], deadline_s: float | None = None, on_done: Any = None, shared: object = None
    ) -> Any:
        self.evaluated += [task for task in tasks if isinstance(task, EvaluateTask)]
        return super().run(tasks, deadline_s, on_done, shared)


@pytest.mark.parametrize("strict", [True, False])
def test_who_did_not_change_is_not_attacked_again(tmp_path: Path, strict: bool) -> None:
    """A guard that refuses everything leaves phase 1's end and its numbers; otherwise all are attacked again."""
    phase2 = {
        "guard_tolerance": 0.0 if strict else 1.0,
        "benign_tolerance": 0.0 if strict else 1.0,
        "selection": "head",
    }
    made = prepared(phase2)
    pool = CountingPool(create_worker(made.config, made.fleet, made.backbone))
    (tmp_path / "run").mkdir()
    summary = run_experiment(made, RunFolder(tmp_path / "run"), pool, Observer())
    ends = [record for record in records_of(tmp_path / "run") if record["evaluation"]]
    assert summary.layer_game is not None
    changed = [strength > 0 for strength in summary.layer_game.strength]
    assert any(changed) != strict
    assert len(pool.evaluated) == 2 * (len(ends) - strict), "three clients in two cohorts"
    if strict:
        assert ends[-1]["evaluation"] == ends[-2]["evaluation"]


@pytest.mark.parametrize("method", [{"name": "lorica"}, {"name": "ffa_lora_at"}])
def test_phase_2_leaves_alone_what_the_method_never_trains(tmp_path: Path, method: dict[str, Any]) -> None:
    """A that is frozen in phase 1 stays the same for all clients, in the benign end point and in what is refined."""
    phase2 = {"enabled": True, "selection": "all", "guard_tolerance": 1.0, "benign_tolerance": 1.0}
    phase2 |= {"refine_lr": 0.01, "benign_lr": 0.01}
    summary = run(prepared(phase2, method), tmp_path / "run")
    assert summary.layer_game is not None
    assert all(summary.layer_game.strength)
    states = newest(tmp_path / "run").states
    frozen = [name for name in states[0] if name.endswith(".lora_A")]
    for name in frozen:
        assert all(np.array_equal(state[name], states[0][name]) for state in states), name
    moved = [name for name in states[0] if name.endswith(".lora_B")]
    assert any(not np.array_equal(states[1][name], states[0][name]) for name in moved)


def test_pm_afl_of_adapters_has_a_phase_2_and_exports_no_probe(tmp_path: Path) -> None:
    phase2 = {"enabled": True, "selection": "all", "guard_tolerance": 1.0, "benign_tolerance": 1.0}
    method = {"name": "pm_afl", "model": "lora", "head_warmup_epochs": 1}
    summary = run(prepared(phase2, method), tmp_path / "run")
    assert summary.layer_game is not None
    assert all(summary.layer_game.strength)
    states = newest(tmp_path / "run").states
    exported = load_adapter(tmp_path / "run" / "adapters" / "client_000")
    assert set(states[0]) - set(exported) == {"teacher_head.weight", "teacher_head.bias"}
    assert all(np.array_equal(exported[name], states[0][name]) for name in exported)
    config = json.loads((tmp_path / "run" / "adapters" / "client_000" / "adapter_config.json").read_text())
    assert not any("teacher" in name for name in config["target_modules"])


def test_the_neighbourhood_of_phase_2_is_that_of_the_last_uploads(tmp_path: Path) -> None:
    """Nothing that stays at home decides it: not the last local epoch, not the heads."""
    made = prepared({"selection": "head"}, {"final_local_epochs": 1})
    run(made, tmp_path / "run")
    (noted,) = [record["neighbours"] for record in records_of(tmp_path / "run") if "neighbours" in record]
    without = prepared({"selection": "head"}, {"final_local_epochs": 0})
    run(without, tmp_path / "other")
    (same,) = [record["neighbours"] for record in records_of(tmp_path / "other") if "neighbours" in record]
    assert noted == same
    np.testing.assert_allclose(np.sum(noted["weights"], axis=1), 1)


def test_without_phase_2_nobody_looks_for_its_neighbourhood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Algorithm, "phase2_graph", None)
    run(prepared(), tmp_path / "run")
    assert not any("neighbours" in record for record in records_of(tmp_path / "run"))


@pytest.mark.slow
def test_values_in_bfloat16_are_verified_in_float32(
    phase1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small difference is recorded; with a large one the game is played again, as float32 alone plays it."""
    precise = {"evaluation": SHORT["evaluation"] | {"precision": "float32"}}
    low = {"evaluation": SHORT["evaluation"] | {"precision": "bfloat16"}}

    def play(name: str, sections: dict[str, Any]) -> Any:
        (tmp_path / name).mkdir()
        end = newest(phase1)
        CheckpointFolder(tmp_path / name / "checkpoint").save(
            end.step, end.states, end.records, end.game, end.residuals
        )
        return run(prepared({}, **sections), tmp_path / name).layer_game

    rough = play("rough", low)
    assert 0 < rough.value_difference < 0.02
    expected = play("precise", precise)
    assert expected.value_difference is None
    np.testing.assert_allclose(rough.shapley, expected.shapley, atol=0.02)
    assert rough.shapley != expected.shapley
    monkeypatch.setattr("sylva_ray.federation.stages.layer_game.stage.MAX_DIFFERENCE", 0.0)
    again = play("again", low)
    # the images of the game are still attacked in bfloat16
    np.testing.assert_allclose(again.shapley, expected.shapley, atol=0.02)
    assert again.value_difference == rough.value_difference
    assert again.shapley != rough.shapley
    sent = {}
    for name in ("precise", "rough", "again"):
        (game,) = [record for record in records_of(tmp_path / name) if record["stage"] == "layer_game"]
        sent[name] = game["upload_bytes"]
    num_clients, float64 = len(again.selected), 8
    values = 2 * float64 * again.coalitions_evaluated
    assert sent["again"] >= sent["rough"] + values, "both games are sent"
    assert sent["rough"] - num_clients * float64 >= values, "the game, and what verifies it"
