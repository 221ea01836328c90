"""Whole tiny experiments in this process: learning, bit-exact resume, checkpoints that survive torn writes."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.text import clients_text
from sylva_ray.core.types import ParameterStack
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.execution.run import run_prepared
from sylva_ray.federation.client.training import TrainTask
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.stages.federated_round import epsilon_of
from sylva_ray.metrics.checks import is_collapsed
from sylva_ray.models.export import ExportOptions, export_clients
from sylva_ray.models.lora import LoraStack
from sylva_ray.models.peft_format import load_adapter
from sylva_ray.preparation.experiment import Prepared, create_worker, prepare
from sylva_ray.preparation.resolve import resolve_config
from sylva_ray.reports.console import create_console
from sylva_ray.reports.terminal import closing_table
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.checkpoint import CheckpointFolder
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.federation.runs import bare_record, records_of, run

pytestmark = pytest.mark.long


def adapters(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "adapters").rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def finished(tiny: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(tiny, folder)


def test_a_run_leaves_what_it_promises(finished: tuple[Path, Any], tiny: Prepared) -> None:
    folder, summary = finished
    for name in (
        "config.yaml",
        "rounds.jsonl",
        "summary.json",
        "report.html",
        "adapters/client_002/adapter_config.json",
    ):
        assert (folder / name).exists(), name
    assert RunFolder(folder).load_summary() == summary
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in records] == ["warmup", "phase1", "phase1", "mixture", "layer_game", "phase2"]
    assert records[1]["epsilon"] < records[2]["epsilon"] == tiny.config.attack.epsilon
    computed = {
        **{f"{kind}_precision": "float32" for kind in ("training", "evaluation")},
        **{f"attention_{precision}": "fused" for precision in ("float32", "bfloat16")},
    }
    assert all(record["compute"] == computed for record in records)
    assert summary.compute.to_json() == computed
    for stage in ("initial", "phase1", "final"):
        accuracies = getattr(summary, stage)
        assert len(accuracies.benign_accuracy.per_client) == 3
        assert accuracies.robust_accuracy["pgd2-eps4"].mean <= accuracies.benign_accuracy.mean
    game = summary.layer_game
    assert game.exact
    assert game.coalitions_evaluated == 3 * 2**7
    assert np.array(game.shapley).shape == (3, 7)
    assert {check.name for check in summary.checks} == {"S4", "S14"}


def test_a_run_without_its_checkpoints_starts_again_with_one_record_per_stage(
    finished: tuple[Path, Any], tiny: Prepared, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    run(tiny, tmp_path / "run")
    assert [record.step for record in RunFolder(tmp_path / "run").load_records()] == list(range(6))
    assert adapters(tmp_path / "run") == adapters(finished[0])


def test_declared_bytes_are_the_serialised_ones(finished: tuple[Path, Any]) -> None:
    folder, summary = finished
    states = RunFolder(folder).load_states()
    payload = states[0]
    shared = sum(value.nbytes for value in payload.values())
    assert summary.communication.upload_bytes_per_client_round == shared
    header = len(save(payload)) - shared
    assert 0 < header < 100 * len(payload) + 16
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert records[1]["upload_bytes"] == 3 * shared
    heads = sum(value.nbytes for name, value in payload.items() if name.startswith("head"))
    assert records[0]["upload_bytes"] == 3 * heads, "the warm-up trains the heads alone"


def test_equal_runs_write_equal_bytes_however_often_they_evaluate(
    finished: tuple[Path, Any], tiny: Prepared, tmp_path: Path
) -> None:
    folder, evaluated_before = finished
    evaluation = tiny.config.evaluation.model_copy(update={"initial": False})
    summary = run(replace(tiny, config=tiny.config.model_copy(update={"evaluation": evaluation})), tmp_path / "again")
    assert adapters(tmp_path / "again") == adapters(folder)
    assert (evaluated_before.initial is None, summary.initial is None) == (False, True)
    assert (summary.phase1, summary.final) == (evaluated_before.phase1, evaluated_before.final)


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_resume_equals_uninterrupted(
    finished: tuple[Path, Any], tiny: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """The disk fills up after some steps: one clear error, and the resumed run ends with the same bits."""
    folder = tmp_path / "interrupted"
    calls: list[Path] = []

    def full_disk(path: Path, content: bytes, durable: bool = False) -> None:
        if path.name == "manifest.json":
            calls.append(path)
        if len(calls) > steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, content, durable)

    monkeypatch.setattr("sylva_ray.storage.manifest.write_atomically", full_disk)
    with pytest.raises(RunError, match="No space left"):
        run(tiny, folder)
    monkeypatch.setattr("sylva_ray.storage.manifest.write_atomically", write_atomically)
    run(tiny, folder)
    assert adapters(folder) == adapters(finished[0])
    strip = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (finished[0] / "rounds.jsonl").read_text().splitlines()]
    for a, b in zip(strip, whole, strict=True):
        for noisy in ("seconds", "peak_memory_bytes"):
            a.pop(noisy)
            b.pop(noisy)
        assert a == b


def test_without_learning_rate_nothing_moves(tmp_path: Path) -> None:
    """A learning rate of 0 leaves every client as the warm-up left it: in training, aggregation and the last epoch."""
    config = build(
        ExperimentConfig,
        TINY
        | {
            "training": {"rounds": 2, "batch_size": 16, "lr": 0.0},
            "algorithm": {"name": "sylva", "head_warmup_epochs": 0, "phase2": {"enabled": False}},
            "evaluation": {"attacks": [], "checks": False},
        },
    )
    prepared = prepare(config)
    run(prepared, tmp_path / "still")
    states = RunFolder(tmp_path / "still").load_states()
    worker = create_worker(prepared.config, prepared.fleet, prepared.backbone)
    from sylva_ray.core.seeding import generator

    start = worker.model.initial_state(generator(config.seed, "initial state"))
    assert all(np.array_equal(state[name], start[name]) for state in states for name in start)


def test_refinement_touches_the_selected_layers_alone(tiny: Prepared) -> None:
    from sylva_ray.core.seeding import generator
    from sylva_ray.core.types import stack_states
    from sylva_ray.federation.stages.layer_game.tasks import RefineTask

    worker = create_worker(tiny.config, tiny.fleet, tiny.backbone)
    start = worker.model.initial_state(generator(0, "initial state"))
    selected = np.zeros((3, 7), bool)
    selected[0, [1, 6]] = True
    selected[2, 3] = True
    phase2 = worker.algorithm.parameters.phase2
    result = worker.run(RefineTask(5, (0, 1, 2), stack_states([start] * 3), phase2, selected))
    assert isinstance(worker.model, LoraStack)
    players = list(worker.model.players.values())
    for client, outcome in enumerate(result.outcomes):
        after = outcome.states[-1]
        for player, names in enumerate(players):
            moved = any(not np.array_equal(after[name], start[name]) for name in names)
            assert moved == selected[client, player], (client, player)


def test_an_exported_adapter_is_the_clients_state(finished: tuple[Path, Any], tmp_path: Path) -> None:
    config, states = RunFolder(finished[0]).load_config(), RunFolder(finished[0]).load_states()
    (folder,) = export_clients(config, states, [1], tmp_path)
    back = load_adapter(folder)
    assert all(np.array_equal(back[name], states[1][name]) for name in states[1])


def test_merged_weights_predict_like_the_adapter(finished: tuple[Path, Any], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    from sylva_ray.models.backbone import create_backbone

    config, states = RunFolder(finished[0]).load_config(), RunFolder(finished[0]).load_states()
    (folder,) = export_clients(config, states, [0], tmp_path, options=ExportOptions(merged=True))
    adapted, merged = create_backbone(config.backbone, 10), create_backbone(config.backbone, 10)
    merged.model.load_state_dict(load_file(folder / "model.safetensors"))
    x = torch.rand(4, 3, 32, 32)
    expected = PeftModel.from_pretrained(adapted.model, str(folder)).eval()(adapted.preprocess(x))
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-4)


class LatePool(InProcessPool):
    """A pool whose first task misses every deadline of one round."""

    def __init__(self, worker: CohortWorker, late_round: int) -> None:
        super().__init__(worker)
        self.late_round = late_round
        self.limits: list[float | None] = []

    def run(
        self, tasks: Sequence[Any], deadline_s: float | None = None, on_done: Any = None, shared: object = None
    ) -> Any:
        self.limits.append(deadline_s)
        results = super().run(tasks, deadline_s, on_done, shared)
        late = deadline_s is not None and tasks and tasks[0].step == self.late_round
        return [None, *results[1:]] if late else results


@pytest.mark.parametrize(("clients_per_round", "cohort_size"), [(2, 1), (3, 2)])
def test_who_misses_a_deadline_is_asked_again_and_a_rerun_replays_it(
    tmp_path: Path, clients_per_round: int, cohort_size: int
) -> None:
    raw = TINY | {
        "algorithm": {"name": "sylva", "final_local_epochs": 0, "phase2": {"enabled": False}},
        "training": TINY["training"] | {"clients_per_round": clients_per_round, "cohort_size": cohort_size},
        "evaluation": {"attacks": [], "checks": False},
        "cluster": {"pool": "in_process", "round_deadline_s": 5},
    }
    prepared = prepare(build(ExperimentConfig, raw))

    def finish(folder: Path, late_round: int) -> tuple[list[dict[str, Any]], LatePool]:
        folder.mkdir(exist_ok=True)
        pool = LatePool(create_worker(prepared.config, prepared.fleet, prepared.backbone), late_round)
        run_experiment(prepared, RunFolder(folder), pool, Observer())
        return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()], pool

    records, pool = finish(tmp_path / "a", late_round=1)
    missing = records[1]["missing"]
    assert len(missing) == cohort_size
    assert not {*map(str, missing)} & {*records[1]["metrics"]["loss"]}
    assert {*missing} <= {*records[2]["participants"]}, "who was missing comes first in the next round"
    assert pool.limits == [None, None, 5, 5, None]  # the warm-up and the evaluations have no deadline
    summary = RunFolder(tmp_path / "a").load_summary()
    assert summary is not None
    assert any(f"{clients_text(missing)} missed the deadline" in warning for warning in summary.warnings)
    # The same run, cut between the deadline and the checkpoint of round 1: nobody is late now, and the log decides.
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "missing.jsonl").write_text((tmp_path / "a" / "missing.jsonl").read_text().splitlines()[0] + "\n")
    replayed, _ = finish(tmp_path / "b", late_round=-1)
    assert replayed[1]["missing"] == missing
    assert adapters(tmp_path / "b") == adapters(tmp_path / "a")


class SlowPool(InProcessPool):
    """A pool in which one client is always late.

    Attributes:
        slow: its number; by default that of the client whose cohort begins last.
        is_serial: whether the slow client occupies the only worker until the deadline; else the last task is late, too.
    """

    def __init__(self, worker: CohortWorker, slow: int | None, is_serial: bool) -> None:
        super().__init__(worker)
        sizes = worker.fleet.label_matrix().sum(1)
        self.slow = int(len(sizes) - 1 - sizes[::-1].argmin()) if slow is None else slow
        self.is_serial = is_serial

    def run(
        self, tasks: Sequence[Any], deadline_s: float | None = None, on_done: Any = None, shared: object = None
    ) -> Any:
        results = super().run(tasks, deadline_s, on_done, shared)
        if deadline_s is None:
            return results
        slow = [i for i, task in enumerate(tasks) if self.slow in task.clients]
        late = range(min(slow, default=len(tasks)), len(tasks)) if self.is_serial else [*slow, len(tasks) - 1]
        return [None if i in late else result for i, result in enumerate(results)]


def under_a_deadline(
    folder: Path, num_clients: int, training: dict[str, int], slow: int | None, is_serial: bool
) -> tuple[list[int], list[int], int]:
    """Return how often every client trained, how often it was asked, and the slow client."""
    raw = TINY | {
        "algorithm": {"name": "sylva", "final_local_epochs": 0, "phase2": {"enabled": False}},
        "partition": TINY["partition"] | {"num_clients": num_clients},
        "training": TINY["training"] | {"cohort_size": 1} | training,
        "evaluation": {"attacks": [], "checks": False},
        "cluster": {"pool": "in_process", "round_deadline_s": 5},
    }
    prepared = prepare(build(ExperimentConfig, raw))
    folder.mkdir()
    pool = SlowPool(create_worker(prepared.config, prepared.fleet, prepared.backbone), slow, is_serial)
    run_experiment(prepared, RunFolder(folder), pool, Observer())
    rounds = [record for record in RunFolder(folder).load_records() if record.stage == "phase1"]
    trained = [sum(str(c) in record.metrics.get("loss", {}) for record in rounds) for c in range(num_clients)]
    return trained, [sum(c in record.participants for record in rounds) for c in range(num_clients)], pool.slow


def test_small_clients_and_those_beside_a_slow_one_train_under_a_deadline(tmp_path: Path) -> None:
    training = {"clients_per_round": 2, "rounds": 12}
    trained, asked, _ = under_a_deadline(tmp_path / "run", 4, training, slow=2, is_serial=False)
    assert min(trained[client] for client in (0, 1, 3)) >= 1
    assert trained[2] == 0
    assert asked[2] <= 9, "it does not keep a place for ever"


def test_a_client_that_is_always_late_does_not_take_the_time_of_the_others(tmp_path: Path) -> None:
    trained, asked, slow = under_a_deadline(tmp_path / "run", 3, {"rounds": 8}, slow=None, is_serial=True)
    assert asked == [8, 8, 8]
    assert trained[slow] == 0
    assert sorted(trained)[1] >= 7, "it goes first once"


class ShortPool(InProcessPool):
    """A pool whose memory runs out in the first stage, and whose power fails before a later one."""

    def __init__(self, worker: CohortWorker, last_stage: int) -> None:
        super().__init__(worker)
        self.last_stage = last_stage

    def run(self, tasks: Sequence[Any], *others: Any, **named: Any) -> Any:
        step = tasks[0].step
        if step > self.last_stage:
            raise RunError("no power")
        if step == 0:
            self.worker.model.windows.halve("train", 32)
        return super().run(tasks, *others, **named)


@pytest.mark.slow
def test_a_resume_has_the_windows_to_which_the_memory_reduced_them(tmp_path: Path) -> None:
    raw = TINY | {
        "algorithm": {"name": "fedavg_at", "model": "lora"},
        "dataset": {"name": "digits", "max_train": 75, "max_test": 30},
        "partition": {"num_clients": 3, "kind": "iid", "min_samples": 20, "test_samples": 1},
        "training": TINY["training"] | {"rounds": 1},
        "evaluation": {"attacks": [], "checks": False, "initial": False},
    }
    prepared = prepare(build(ExperimentConfig, raw))

    def finish(folder: Path, pool: InProcessPool) -> list[dict[str, Any]]:
        folder.mkdir(exist_ok=True)
        run_experiment(prepared, RunFolder(folder), pool, Observer())
        return records_of(folder)

    def worker() -> CohortWorker:
        return create_worker(prepared.config, prepared.fleet, prepared.backbone)

    records = finish(tmp_path / "whole", ShortPool(worker(), last_stage=9))
    assert [record["reduced_windows"] for record in records] == [{"train": 16}] * 2
    summary = RunFolder(tmp_path / "whole").load_summary()
    assert summary is not None
    assert sum("the memory was too small" in warning for warning in summary.warnings) == 1
    with pytest.raises(RunError, match="no power"):
        finish(tmp_path / "cut", ShortPool(worker(), last_stage=0))
    resumed = finish(tmp_path / "cut", InProcessPool(worker()))
    assert resumed[1]["reduced_windows"] == {"train": 16}
    assert adapters(tmp_path / "cut") == adapters(tmp_path / "whole")


def test_a_client_that_diverges_keeps_its_last_state_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = TINY | {
        "algorithm": {"name": "sylva", "final_local_epochs": 0, "phase2": {"enabled": False}},
        "training": TINY["training"] | {"rounds": 1},
        "evaluation": {"attacks": [], "checks": False},
    }
    prepared = prepare(build(ExperimentConfig, raw))
    train = TrainTask.execute

    def diverge(task: TrainTask, worker: CohortWorker, params: ParameterStack) -> Any:
        outcomes = train(task, worker, params)
        if task.step == 1:
            where = task.clients.index(1) if 1 in task.clients else None
            if where is not None:
                outcomes[where].state["head.bias"][0] = np.nan
        return outcomes

    monkeypatch.setattr(TrainTask, "execute", diverge)
    summary = run(prepared, tmp_path / "run")
    states = RunFolder(tmp_path / "run").load_states()
    assert all(np.isfinite(value).all() for state in states for value in state.values())
    assert any("client 1 diverged" in warning for warning in summary.warnings)


def test_a_benign_end_point_that_diverges_plays_a_game_worth_nothing(tiny: Prepared) -> None:
    """Its NaN must not reach the neighbours' Shapley values: theta^b becomes theta^r, every layer is worth 0."""
    from sylva_ray.core.seeding import generator
    from sylva_ray.core.types import stack_states
    from sylva_ray.federation.stages.layer_game.rankings.shapley import ShapleyRanking
    from sylva_ray.federation.stages.layer_game.shapley import all_coalitions
    from sylva_ray.federation.stages.layer_game.tasks import GameTask

    worker = create_worker(tiny.config, tiny.fleet, tiny.backbone)
    reckless = worker.algorithm.parameters.phase2.model_copy(update={"benign_lr": float("inf")})
    start = worker.model.initial_state(generator(0, "initial state"))
    task = GameTask(5, (0,), stack_states([start]), reckless, all_coalitions(7)[:4], ShapleyRanking())
    (outcome,) = worker.run(task).outcomes
    assert np.isfinite(outcome.values).all()
    assert np.ptp(outcome.values, axis=0).max() < 1e-6
    assert all(np.array_equal(outcome.benign_state[name], start[name]) for name in start)


def test_whole_models_train_behind_the_same_seam(tmp_path: Path) -> None:
    raw = TINY | {
        "algorithm": {"name": "undefended", "model": "full", "heads": "global", "final_local_epochs": 0},
        "training": TINY["training"] | {"rounds": 1, "lr": 1e-4},
        "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 1}], "checks": False},
    }
    summary = run(prepare(build(ExperimentConfig, raw)), tmp_path / "full")
    communication = summary.communication
    assert communication.upload_bytes_per_client_round == communication.full_model_bytes
    assert communication.full_model_ratio == 1
    assert not (tmp_path / "full" / "adapters").exists()
    states = RunFolder(tmp_path / "full").load_states()
    assert all(np.array_equal(states[0][name], states[2][name]) for name in states[0]), "one global model"


# -- checkpoints -------------------------------------------------------------------------------------------------------


def saved(folder: Path, steps: int) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder)
    for step in range(steps):
        checkpoints.save(step, [{"x": np.full(3, step, np.float32)}], [bare_record(s) for s in range(step + 1)], None)
    return checkpoints


def step_of(checkpoints: CheckpointFolder) -> int | None:
    newest = checkpoints.latest()
    return newest.step if newest else None


def test_a_torn_write_leaves_the_previous_round(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 3)
    (tmp_path / "round_0002" / "states.safetensors").write_bytes(b"half")
    assert step_of(checkpoints) == 1
    (tmp_path / "round_0001" / "manifest.json").unlink()
    assert step_of(checkpoints) == 0


def test_a_complete_round_is_immutable_and_old_ones_go(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["round_0002", "round_0003", "round_0004"]
    checkpoints.save(4, [{"x": np.zeros(3, np.float32)}], [], None)
    newest = checkpoints.latest()
    assert newest is not None
    assert newest.states[0]["x"].tolist() == [4, 4, 4]


def test_only_damaged_checkpoints_is_an_error_and_none_is_a_start(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "none").latest() is None
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "round_0000" / "progress.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        checkpoints.latest()


@pytest.mark.parametrize("partners", [None, ["neighbours"]])
def test_with_a_part_of_the_clients_in_a_round_neighbours_are_those_of_the_local_epochs(
    partners: list[str] | None, tmp_path: Path
) -> None:
    """One model for all says nothing about who was not in the last round, so everybody uploads once more."""
    raw = TINY | {
        "algorithm": {"name": "sylva", "num_neighbours": 2, "mixture": {"partners": partners}},
        "training": TINY["training"] | {"clients_per_round": 1},
        "evaluation": {"attacks": [{"name": "fgsm"}], "checks": False},
    }
    config = build(ExperimentConfig, raw)
    folder = RunFolder(tmp_path / "run")
    run_prepared(prepare(config), folder, False, Observer())
    records = {record.stage: record for record in folder.load_records()}
    last, graph = records["phase1"], records["mixture"].neighbours
    assert graph is not None
    assert last.upload_bytes > 0
    uploads = records["mixture"].upload_bytes / last.upload_bytes
    assert 3 <= uploads < 3.5, "one upload of each of three clients"
    own = [sum(weight for member, weight in zip(*row, strict=True)) for row in zip(graph.members, graph.weights)]
    assert own == pytest.approx([1.0] * 3)
    whole = RunFolder(tmp_path / "whole")
    everyone = raw | {"training": TINY["training"], "algorithm": {"name": "sylva", "num_neighbours": 2}}
    run_prepared(prepare(build(ExperimentConfig, everyone)), whole, False, Observer())
    assert {record.stage: record for record in whole.load_records()}["mixture"].neighbours is None


def test_a_run_without_attacks_says_nothing_of_robust_accuracy(tmp_path: Path) -> None:
    raw = TINY | {"algorithm": {"name": "fedavg_at"}, "evaluation": {"attacks": [], "checks": True}}
    folder = RunFolder(tmp_path / "run")
    summary = run_prepared(prepare(build(ExperimentConfig, raw)), folder, False, Observer())
    assert [check.name for check in summary.checks] == ["S4"]
    assert not any(client.collapsed for client in summary.clients)
    console = create_console()
    table = closing_table(console, summary, folder.load_records())
    assert not any("robust" in str(column.header) for column in table.columns)


def test_a_single_round_has_all_of_epsilon() -> None:
    config = build(ExperimentConfig, TINY | {"attack": {"epsilon": "8/255"}})
    resolved = resolve_config(config)
    assert epsilon_of(resolved, 0.3, 1, 1) == 8 / 255
    assert epsilon_of(resolved, 0.3, 1, 2) == 4 / 255


def test_s14_is_about_an_attack_that_has_a_budget(tmp_path: Path) -> None:
    attacks = [{"name": "deepfool", "steps": 2}, {"name": "noise", "epsilon": 0.01}, {"name": "pgd", "steps": 1}]
    raw = TINY | {"algorithm": {"name": "fedavg_at"}, "evaluation": {"attacks": attacks, "checks": True}}
    summary = run_prepared(prepare(build(ExperimentConfig, raw)), RunFolder(tmp_path / "run"), False, Observer())
    robust = summary.final.robust_accuracy["pgd1-eps8"].per_client
    evaluation = RunFolder(tmp_path / "run").load_records()[-1].evaluation
    assert evaluation is not None
    for client, accuracy, single in zip(summary.clients, robust, evaluation["benign"].one_class or [], strict=True):
        assert client.collapsed == is_collapsed(accuracy, client.majority_share, bool(single))
    alone = raw | {"evaluation": {"attacks": attacks[:1], "checks": True}}
    summary = run_prepared(prepare(build(ExperimentConfig, alone)), RunFolder(tmp_path / "alone"), False, Observer())
    assert [check.name for check in summary.checks] == ["S4"]
