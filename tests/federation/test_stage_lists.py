"""Runs of other stages than the shipped list: what a stage does depends on its round, not on its position."""

from __future__ import annotations

import runpy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.algorithms.sylva import Sylva
from sylva_ray.algorithms.undefended import Undefended
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.config.schema import build
from sylva_ray.core.errors import UserError
from sylva_ray.core.summary import Summary
from sylva_ray.core.types import ParameterStack
from sylva_ray.federation.client.training import TrainOutcome, TrainSettings, TrainTask
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.context import RoundUploads
from sylva_ray.federation.contract import stages_of_run
from sylva_ray.federation.observer import EventLog, Notice
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.federated_round import federated_rounds
from sylva_ray.federation.stages.layer_game.rankings.shift import ShiftRanking
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.federation.stages.local_epochs import LocalEpochs
from sylva_ray.federation.stages.stage import STAGES, Stage, StageResult
from sylva_ray.federation.stages.warm_up import WarmUp
from sylva_ray.federation.summary import DeclaredTraffic, RunCosts, run_seconds
from sylva_ray.preparation.experiment import prepare
from sylva_ray.preparation.resolve import resolve_config
from sylva_ray.storage.run_folder import RunFolder
from tests.conftest import TINY
from tests.federation.runs import bare_record, run

SHORT: dict[str, Any] = TINY | {
    "evaluation": {"attacks": [{"epsilon": "4/255", "steps": 1}], "max_samples": 4, "checks": False, "every": 1}
}


class Pooling(Stage):
    """Notes which clients are the neighbours of each."""

    name = "pooling"
    title = "phase 3: pooling"
    phase = 3
    needs_neighbours = True

    def run(self, server: Server, step: int) -> StageResult:
        """Record the number of neighbours of every client."""
        del step
        members = server.recorded_neighbourhood().members
        return StageResult(metrics={"neighbours": {str(client): float(len(m)) for client, m in enumerate(members)}})


class NotANumber(Stage):
    """Reports values of which some are no finite numbers."""

    name = "not_a_number"
    title = "phase 3: no numbers"
    phase = 3

    def run(self, server: Server, step: int) -> StageResult:
        """Report them."""
        del server, step
        return StageResult(metrics={"odd": {"0": float("nan"), "1": 2.0, "2": float("inf")}})


class Odd(Undefended):
    """A third phase with such values."""

    name = "odd"

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return the usual stages and `NotANumber`."""
        return [*super().stages(config), NotANumber()]


class NoWarmUp(Sylva):
    """Rounds alone."""

    name = "no_warm_up"

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return the rounds."""
        return federated_rounds(config)


class LateRounds(Sylva):
    """A local epoch comes before the rounds."""

    name = "late_rounds"

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return a warm-up, a local epoch and the rounds."""
        return [WarmUp(), LocalEpochs(1), *federated_rounds(config)]


class Pooled(Undefended):
    """A third phase that needs neighbourhoods."""

    name = "pooled"

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return the usual stages and `Pooling`."""
        return [*super().stages(config), Pooling()]


class OnlyPooling(Sylva):
    """A stage that needs neighbourhoods, without a round before it."""

    name = "only_pooling"

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return a list that cannot run."""
        return [WarmUp(), Pooling(), *federated_rounds(config)]


class OwnGame(Undefended):
    """A layer game that the method names itself, whatever the settings of phase 2 say."""

    name = "own_game"

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return the rounds and the game."""
        return [*federated_rounds(config), LayerGame(ShiftRanking(), self.parameters.phase2)]


class TwoExchanges(Stage):
    """Trains and exchanges twice; the upload of client 2 is damaged the first time."""

    name = "two_exchanges"
    title = "two exchanges"
    exchanges = True

    def run(self, server: Server, step: int) -> StageResult:
        """Do both in one stage."""
        for epochs in (1, 2):
            received = server.states.copy()
            outcomes, _ = server.train(step, server.everyone, TrainSettings(0.0, 0.005, epochs))
            server.adopt_states(outcomes)
            if epochs == 1:
                huge = {name: value * np.float32(1e30) for name, value in outcomes[2].state.items()}
                outcomes[2] = replace(outcomes[2], state=huge)
            server.exchange(step, outcomes, received)
        return StageResult()


class Twice(Undefended):
    """One stage with two exchanges, each of which takes a while."""

    name = "twice"

    def aggregate(self, uploads: RoundUploads) -> list[dict[str, np.ndarray]]:
        """Sleep first."""
        time.sleep(0.02)
        return super().aggregate(uploads)

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return that stage."""
        del config
        return [TwoExchanges()]


class LongEpilogue(Undefended):
    """Local epochs of another number than the parameter says."""

    name = "long_epilogue"

    def stages(self, config: ResolvedConfig) -> list[Stage]:
        """Return the rounds and two local epochs."""
        return [*federated_rounds(config), LocalEpochs(2)]


def config_of(method: type, **parameters: Any) -> ExperimentConfig:
    """`SHORT` with a method of this file."""
    return build(ExperimentConfig, SHORT | {"algorithm": {"name": f"{__name__}:{method.__name__}"} | parameters})


def finish(method: type, folder: Path, **parameters: Any) -> Summary:
    """Run it."""
    return run(prepare(config_of(method, **parameters)), folder)


@pytest.mark.parametrize(("method", "first"), [(NoWarmUp, 0), (LateRounds, 2)])
def test_epsilon_rate_and_merge_of_a_round_are_those_of_its_number(method: type, first: int, tmp_path: Path) -> None:
    summary = finish(method, tmp_path / "run", phase2={"enabled": False})
    rounds = RunFolder(tmp_path / "run").load_records()[first:]
    assert [record.stage for record in rounds] == ["phase1", "phase1"]
    assert [record.epsilon for record in rounds] == pytest.approx([2 / 255, 4 / 255])
    assert [record.lr for record in rounds] == pytest.approx([0.005, 0.0005])
    assert (summary.initial is None) == (method is NoWarmUp), "there is no accuracy from before the defence"
    assert summary.phase1 == summary.final
    checkpoints = RunFolder(tmp_path / "run").checkpoints
    for step in checkpoints.steps():
        if step > first:
            checkpoints.remove(step)
    after_first_round = checkpoints.latest()
    assert after_first_round is not None
    one, *others = after_first_round.states
    adapters = [name for name in one if ".lora_" in name]
    assert adapters
    assert all(np.array_equal(one[name], other[name]) for name in adapters for other in others), (
        "in the first round all clients are neighbours"
    )


def test_the_last_round_records_neighbourhoods_for_any_stage_that_needs_them(tmp_path: Path) -> None:
    finish(Pooled, tmp_path / "run")
    records = RunFolder(tmp_path / "run").load_records()
    assert [record.stage for record in records] == ["warmup", "phase1", "phase1", "personalise", "pooling"]
    assert [record.neighbours is not None for record in records] == [False, False, True, False, False]
    assert records[-1].metrics == {"neighbours": {"0": 2.0, "1": 2.0, "2": 2.0}}


def test_what_is_no_finite_number_is_left_out_and_the_run_can_be_read_and_resumed(
    tmp_path: Path,
) -> None:
    """JSON has no such numbers: a run that wrote them could not be opened any more."""
    log = EventLog()
    run(prepare(config_of(Odd)), tmp_path / "run", log)
    folder = RunFolder(tmp_path / "run")
    assert folder.load_records()[-1].metrics == {"odd": {"1": 2.0}}
    assert folder.load_checkpoint() is not None
    (text,) = (event.text for event in log.events if isinstance(event, Notice) and "recorded" in event.text)
    assert "odd of clients 0, 2 is not a finite number after not_a_number" in text


def test_a_stage_without_the_neighbourhoods_that_it_needs_is_refused() -> None:
    with pytest.raises(UserError, match="stage pooling needs the neighbourhoods of a federated round, and none comes"):
        prepare(config_of(OnlyPooling, phase2={"enabled": False}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"algorithm": {"model": "full"}}, "algorithm.model = .full.: the stage layer_game needs adapters: use lora"),
        ({"lora": {"target_modules": ["blocks.0.attn.qkv"]}}, "ranking = .shift.: needs a plain chain of transformer"),
    ],
)
def test_a_layer_game_that_a_method_names_itself_is_checked_before_the_run(
    sections: dict[str, Any], message: str
) -> None:
    config = SHORT | {"lora": {"rank": 2}} | sections
    algorithm = {"name": f"{__name__}:OwnGame", "phase2": {"enabled": False}} | sections.get("algorithm", {})
    with pytest.raises(UserError, match=message):
        prepare(build(ExperimentConfig, config | {"algorithm": algorithm}))


def test_a_stage_with_two_exchanges_records_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = TrainTask.execute

    def diverge(task: TrainTask, worker: CohortWorker, params: ParameterStack) -> list[TrainOutcome]:
        """One client at a time: client 0 in the first training, client 1 in the second."""
        outcomes, diverging = execute(task, worker, params), task.settings.epochs - 1
        if diverging in task.clients:
            outcomes[task.clients.index(diverging)].state["head.bias"][0] = np.nan
        return outcomes

    monkeypatch.setattr(TrainTask, "execute", diverge)
    summary = finish(Twice, tmp_path / "run")
    (record,) = RunFolder(tmp_path / "run").load_records()
    assert record.dropped == [0, 1]
    assert record.refused is not None
    assert list(record.refused) == ["2"]
    assert record.seconds["aggregate"] >= 0.04
    assert record.upload_bytes == 4 * summary.communication.upload_bytes_per_client_round, "two clients, two times"


def test_seconds_that_a_method_names_itself_are_no_waiting() -> None:
    measured = {"train": 1.0, "distill": 2.0, "aggregate": 0.5, "wall": 4.0}
    records = [bare_record(step).model_copy(update={"seconds": measured}) for step in range(2)]
    spent = run_seconds(records, RunCosts(DeclaredTraffic(0, 0, 0), num_actors=2, setup_seconds=3.0))
    assert (spent.total, spent.train, spent.other, spent.aggregate, spent.idle) == (11.0, 2.0, 4.0, 1.0, 16.0 - 6.0)


def test_local_epochs_are_as_many_as_the_stage_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, train = [], Server.train

    def noted(server: Server, step: int, clients: Any, settings: TrainSettings, *deadline: float | None) -> Any:
        trained.append(settings.epochs)
        return train(server, step, clients, settings, *deadline)

    monkeypatch.setattr(Server, "train", noted)
    finish(LongEpilogue, tmp_path / "run")
    assert trained == [1, 1, 2]


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("undefended", {}, ["warmup", "phase1", "personalise"]),
        ("undefended", {"phase2": {"enabled": True}}, ["warmup", "phase1", "personalise", "layer_game", "phase2"]),
        ("lorica", {}, ["warmup", "phase1", "personalise", "layer_game", "phase2"]),
        ("sylva", {}, ["warmup", "phase1", "mixture", "layer_game", "phase2"]),
        ("sylva", {"phase2": {"enabled": False}}, ["warmup", "phase1", "mixture"]),
        (f"{__name__}:Pooled", {}, ["warmup", "phase1", "personalise", "pooling"]),
        (
            f"{__name__}:Pooled",
            {"phase2": {"enabled": True}},
            ["warmup", "phase1", "personalise", "layer_game", "phase2", "pooling"],
        ),
    ],
)
def test_phase_2_is_part_of_a_method_or_added_by_its_key(
    name: str, parameters: dict[str, Any], expected: list[str]
) -> None:
    config = build(
        ExperimentConfig,
        SHORT | {"algorithm": {"name": name} | parameters, "training": SHORT["training"] | {"rounds": 1}},
    )
    assert [
        stage.name for stage in stages_of_run(create_algorithm(config.algorithm), resolve_config(config))
    ] == expected


def test_two_stages_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two stages are named 'phase1': FederatedRound and .*Mine"):

        class Mine(Stage):
            name = "phase1"
            title = "mine"

            def run(self, server: Server, step: int) -> StageResult:
                """Do nothing."""
                del server, step
                return StageResult()


STAGE_FILE = """
from sylva_ray.federation.stages.stage import Stage, StageResult

class Twice(Stage):
    name = "defined_twice"
    title = "twice"

    def run(self, server, step):
        return StageResult()
"""


def test_a_file_that_is_run_as_a_script_and_imported_by_its_name_defines_one_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a method is that the script which starts the run defines; a copy in another file is another stage."""
    monkeypatch.setitem(STAGES, "defined_twice", WarmUp)
    del STAGES["defined_twice"]
    script, copy = tmp_path / "my_script.py", tmp_path / "my_copy.py"
    script.write_text(STAGE_FILE)
    copy.write_text(STAGE_FILE)
    runpy.run_path(str(script), run_name="__main__")
    imported = runpy.run_path(str(script), run_name="my_script")["Twice"]
    assert STAGES["defined_twice"] is imported
    (link := tmp_path / "a_link").symlink_to(tmp_path)
    linked = runpy.run_path(str(link / script.name), run_name="linked.my_script")["Twice"]
    assert STAGES["defined_twice"] is linked, "a symbolic link leads to the same file"
    with pytest.raises(ValueError, match="two stages are named 'defined_twice': Twice and Twice"):
        runpy.run_path(str(copy), run_name="my_copy")
