"""Evaluation of a panel between the ends of phases, of everybody at the ends, and in windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sylva_ray.core.records import ClientAccuracies, StageRecord
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.evaluator import Evaluator
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.federated_round import federated_rounds
from sylva_ray.observers.metrics import record_metrics
from sylva_ray.storage.run_folder import RunFolder
from tests.algorithms.toys import starting_states, tiny_experiment, tiny_worker
from tests.federation.runs import bare_record


def evaluator_of(folder: Path, **evaluation: Any) -> Evaluator:
    section = {"attacks": [{"epsilon": "4/255", "steps": 1}], "every": 1, "checks": False, **evaluation}
    made = tiny_experiment("fedavg_at", evaluation=section)
    worker = tiny_worker(made)
    pool, observer = InProcessPool(worker), Observer()
    server = Server(
        made.config, worker.algorithm, made.fleet, starting_states(worker), {}, pool, RunFolder(folder), observer
    )
    return Evaluator(server, federated_rounds(made.config))


def test_a_panel_is_evaluated_between_and_everybody_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, panel = evaluator_of(tmp_path), evaluator_of(tmp_path, clients=2)
    chosen = panel.panel(0)
    assert chosen is not None
    assert len(chosen) == 2
    assert panel.panel(0) == evaluator_of(tmp_path, clients=2).panel(0), "the same in every round and run"
    everybody, some = whole.evaluate(0), panel.evaluate(0)
    assert everybody is not None
    assert some is not None
    for condition, measured in some.items():
        assert measured.accuracy == [everybody[condition].accuracy[client] for client in chosen]
    last = len(panel.stages) - 1
    assert panel.panel(last) is None
    monkeypatch.setattr("sylva_ray.federation.evaluator.WINDOW_BYTES", 1)
    in_windows, at_once = panel.evaluate(last), whole.evaluate(last)
    assert in_windows == at_once
    assert at_once is not None
    assert len(at_once["benign"].accuracy) == panel.server.fleet.num_clients


def test_a_panel_has_no_attackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel of them alone would have no mean; and only an evaluation that has less than one in full is in part."""
    some = evaluator_of(tmp_path, clients=1)
    chosen = some.panel(0)
    assert chosen is not None
    monkeypatch.setattr("sylva_ray.federation.evaluator.byzantine_clients", lambda _: chosen)
    other = evaluator_of(tmp_path, clients=1)
    assert other.panel(0) is not None
    assert other.panel(0) != chosen
    last = len(other.stages) - 1
    assert [other.has_less(index) for index in (0, last)] == [True, False]
    assert not evaluator_of(tmp_path).has_less(0), "one attack, all images, all clients"
    assert evaluator_of(tmp_path, max_samples=1).has_less(0)


def test_accuracies_of_a_panel_belong_to_its_clients() -> None:
    accuracies = ClientAccuracies(accuracy=[0.25, 0.75], balanced_accuracy=[0.5, 0.5])
    record = StageRecord.model_validate(
        {**bare_record(1).model_dump(), "evaluation": {"benign": accuracies}, "panel": [3, 8]}
    )
    values = record_metrics(record, ())
    assert values["client_003/benign_accuracy"] == 0.25
    assert values["client_008/benign_accuracy"] == 0.75
    assert values["benign_accuracy/mean"] == 0.5
    assert record.places_of([8, 9]) == [1]
    assert bare_record(1).places_of([8, 9]) == [8, 9]
