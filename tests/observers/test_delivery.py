"""Delivery to a store that fails at chosen calls: retries, warnings and timestamps."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pytest

from sylva_ray.observers.mlflow import delivery
from sylva_ray.observers.mlflow.delivery import Delivery, DeliveryState
from sylva_ray.storage import client_tables
from sylva_ray.storage.jsonl import read_records, rewrite_records
from sylva_ray.storage.run_folder import RunFolder
from tests.reports.synthetic_run import make_config, make_run


class FlakyStore:
    """Keeps what it receives; the calls whose numbers are in ``failing`` raise."""

    uri = "https://ada:s3cret@store"

    def __init__(self, failing: Collection[int] = ()) -> None:
        self.failing, self.calls = failing, 0
        self.steps: list[int] = []
        self.times: list[int] = []
        self.names: list[str] = []
        self.texts: list[str] = []
        self.notes: list[str] = []

    def _call(self) -> None:
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise ConnectionError("went away\nlong story") from OSError("cable pulled")

    def open_run(self, state: DeliveryState) -> None:
        self._call()
        state.update(run_id="1")

    def log_metrics(self, values: Mapping[str, float], time_ms: int, step: int) -> None:
        self._call()
        assert all(isinstance(value, float) for value in values.values())
        self.steps.append(step)
        self.times.append(time_ms)

    def log_text(self, text: str, name: str) -> None:
        self._call()
        self.names.append(name)
        self.texts.append(text)

    def log_table(self, table: Mapping[str, Sequence[object]], name: str) -> None:
        self._call()
        assert len({len(values) for values in table.values()}) == 1
        self.names.append(name)

    def describe(self, note: str) -> None:
        self._call()
        self.notes.append(note)

    def log_file(self, path: Path) -> None:
        self._call()
        self.names.append(path.name)

    def log_folder(self, path: Path, name: str) -> None:
        self._call()
        assert any(path.iterdir())
        self.names.append(name)

    def end_run(self, status: str) -> None:
        self._call()
        self.names.append(status)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "PAUSE_S", 0.0)


def test_what_failed_is_sent_after_the_next_record_and_only_that(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    records = read_records(tmp_path / "rounds.jsonl")
    rewrite_records(tmp_path / "rounds.jsonl", records[:4])
    store = FlakyStore(failing={3})  # call 0 opens the run, so record 2 is lost on the way
    sent = Delivery(RunFolder(tmp_path), config, store)
    assert not sent.send_records()
    assert store.steps == [0, 1]
    (warning,) = sent.warnings()
    assert "did not receive 2 of 4 records: went away long story ... (cable pulled)" in warning
    assert "https://***@store" in warning
    rewrite_records(tmp_path / "rounds.jsonl", records[:5])
    assert sent.send_records()
    assert store.steps == [0, 1, 2, 3, 4]
    assert sent.warnings() == []


def test_another_process_continues_after_the_first_one_failed(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    first, second = FlakyStore(failing=range(4, 1000)), FlakyStore()
    Delivery(RunFolder(tmp_path), config, first).send_records()
    Delivery(RunFolder(tmp_path), config, second).send_records()
    assert first.steps + second.steps == [record["step"] for record in read_records(tmp_path / "rounds.jsonl")]


def test_the_end_is_tried_three_times_and_what_is_missing_is_named(tmp_path: Path) -> None:
    config = make_run(tmp_path, make_config(uri=FlakyStore.uri))
    num_records = len(read_records(tmp_path / "rounds.jsonl"))
    up_to_config = 1 + num_records + 3  # open, records, summary, description, end
    store = FlakyStore(failing=range(up_to_config + 1, 1000))
    sent = Delivery(RunFolder(tmp_path), config, store)
    assert not sent.finish("FINISHED", threading.Event())
    (warning,) = sent.warnings()
    assert "did not receive rounds.jsonl, summary.json, clients.json, figures, model: went away" in warning
    assert store.calls == up_to_config + 2 + 2  # twice more, and each ends at the first call
    assert store.names == ["FINISHED", "config.yaml"]
    assert "**sylva** on digits" in store.notes[0]
    assert "s3cret" not in store.texts[0] + (tmp_path / "tracking.json").read_text()


def test_what_the_records_name_is_sent_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, store, folder = make_run(tmp_path, make_config(detail="fleet")), FlakyStore(), RunFolder(tmp_path)
    monkeypatch.setattr(client_tables, "MAX_CLIENTS_IN_LINE", 5)
    folder.write_records(folder.load_records())
    assert Delivery(folder, config, store).finish("FINISHED", threading.Event())
    assert store.names[:4] == ["FINISHED", "config.yaml", "clients", "rounds.jsonl"]
    assert store.steps[: len(folder.load_records())] == [record.step for record in folder.load_records()]


def test_abandoning_ends_the_attempts(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    store, abandoned = FlakyStore(failing=range(1000)), threading.Event()
    abandoned.set()
    assert not Delivery(RunFolder(tmp_path), config, store).finish("FINISHED", abandoned)
    assert store.calls == 1


def test_damaged_state_and_another_store_start_with_a_new_state(tmp_path: Path) -> None:
    state = DeliveryState.load(RunFolder(tmp_path), "sqlite:///a")
    state.update(run_id="7", records_sent=3)
    assert DeliveryState.load(RunFolder(tmp_path), "sqlite:///a") == state
    assert DeliveryState.load(RunFolder(tmp_path), "sqlite:///b").records_sent == 0
    for damage in ("", "[]", "{", json.dumps({"uri": "sqlite:///a", "unknown": 1})):
        (tmp_path / "tracking.json").write_text(damage)
        assert DeliveryState.load(RunFolder(tmp_path), "sqlite:///a").run_id is None


def test_an_equal_record_always_has_an_equal_time(tmp_path: Path) -> None:
    """Stores recognise a value that is sent twice by its timestamp, which must not depend on the clock."""
    config = make_run(tmp_path)
    times = []
    for _ in range(2):
        store = FlakyStore()
        sent = Delivery(RunFolder(tmp_path), config, store)
        sent.send_records()
        sent.state.update(records_sent=0)
        times.append(store.times)
    assert times[0] == times[1]
    assert times[0] == sorted(set(times[0]))
