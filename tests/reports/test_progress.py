"""What a terminal of a given width shows of a run: nothing wider than it, and one line per finished stage."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios

import pyte
import pytest
from rich.console import Console

from sylva_ray.core.records import StageRecord
from sylva_ray.federation.observer import StageStarted
from sylva_ray.reports.evaluation_log import EvaluationLog
from sylva_ray.reports.progress import EvaluationDisplay, Pace, record_numbers, stage_lines
from sylva_ray.reports.run_log import RunLog
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.sweeps.events import AttemptEvent, SweepStarted, TrialProgress
from sylva_ray.sweeps.terminal import SweepDisplay, SweepLog
from tests.reports.synthetic_run import make_run

SCRIPT = """
import sys, time
from sylva_ray.reports.output import Output
from sylva_ray.federation.observer import Notice, StageStarted, TaskDone
from sylva_ray.reports.console import working_on
from sylva_ray.storage.run_folder import RunFolder

folder, output = RunFolder(sys.argv[1]), Output("progress")
records, console = folder.load_records(), output.console()
with working_on(console, f"preparing {folder}", quiet=False):
    time.sleep(0.2)
with output.observing(console, folder) as (display, _):
    for step, record in enumerate(records):
        display.on_stage(StageStarted(step, len(records), f"phase 1: round {step} of {len(records)}"))
        for done in (2, 4, 6):
            time.sleep(0.02)
            display.on_task(TaskDone("evaluate", 2, done, 6))
        display.on_record(record)
    display.on_notice(Notice("a worker was lost"))
output.print_result(console, folder.load_summary(), folder, str(folder.path), "sqlite:///mlflow.db")
"""
"""Shows a finished run as if it took place."""


def screen_of(command: list[str], width: int) -> list[str]:
    """Return the lines that a terminal holds after a command, those that have left the screen first."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment | {"TERM": "xterm-256color"})
    os.close(its)
    screen = pyte.HistoryScreen(width, 24, history=10_000)
    stream = pyte.ByteStream(screen)
    while True:
        try:
            output = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not output:
            break
        stream.feed(output)
    os.close(ours)
    assert process.wait(60) == 0
    above = ["".join(line[column].data for column in range(width)) for line in screen.history.top]
    return [line.rstrip() for line in [*above, *screen.display]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of six clients, both phases."""
    path = tmp_path_factory.mktemp("terminal") / "run"
    make_run(path)
    return RunFolder(path)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_of_any_width_keeps_one_line_per_stage_and_whole_tables(folder: RunFolder, width: int) -> None:
    lines = screen_of([sys.executable, "-c", SCRIPT, str(folder.path)], width)
    steps = len(folder.load_records())
    numbered = [line for line in lines if f"/{steps} " in line]
    assert [line.split()[0] for line in numbered] == [f"{step}/{steps}" for step in range(1, steps + 1)]
    assert all(" s " in f"{line} " for line in numbered)
    assert all("eta" in line for line in numbered[:-1])
    assert not any("preparing" in line or "evaluate:" in line for line in lines), "bars leave nothing behind"
    text = " ".join("\n".join(lines).split())
    assert "a worker was lost" in text
    summary = folder.load_summary()
    assert summary is not None
    for client in summary.clients:  # every row is whole: the client, both ends of its accuracies, its layers
        after = [summary.final.benign_accuracy.per_client[client.client]]
        after.append(next(iter(summary.final.robust_accuracy.values())).per_client[client.client])
        row = next(line for line in lines if line.strip(" │").split()[:1] == [str(client.client)])
        assert all(f"> {100 * value:5.1f}" in row for value in after)
    assert any(f"({next(iter(summary.final.robust_accuracy))})" in line for line in lines)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_terminal_cuts_what_was_measured(folder: RunFolder, width: int) -> None:
    lines = screen_of([sys.executable, "-c", SCRIPT, str(folder.path)], width)
    text = " ".join("\n".join(lines).split())
    for record in folder.load_records():
        assert all(number in text for number in record_numbers(record))


def test_the_attack_of_a_check_is_named_as_such(folder: RunFolder) -> None:
    record = folder.load_records()[-1]
    assert "pgd20-eps255" in (record.evaluation or {})
    texts = record_numbers(record)
    assert any(text.startswith("unbounded ") for text in texts)
    assert not any("eps255" in text for text in texts)


def test_a_stage_has_one_line_where_it_fits_and_an_indented_second_one_elsewhere(folder: RunFolder) -> None:
    record = next(record for record in folder.load_records() if record.evaluation)
    stage, numbers = StageStarted(1, 9, "round 1"), "  ".join(record_numbers(record))
    (whole,) = stage_lines(stage, record, 70.0)
    assert whole.endswith(f"eta 1 min 10 s  {numbers}")
    assert stage_lines(stage, record, 70.0, len(whole)) == [whole]
    first, *others = stage_lines(stage, record, 70.0, 60)
    assert " ".join([first, *(line.strip() for line in others)]).split() == whole.split()
    assert all(len(line) <= 60 and line.startswith("     ") for line in others)


def test_an_evaluation_keeps_its_running_bar_in_sight() -> None:
    """A line takes the place of what is finished: bars that a terminal has no rows for would hide the last one."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with EvaluationDisplay(console) as display:
        for number in range(30):
            display.on_measurement(f"measure{number}", 2, 1)
            display.on_task_measured(f"measure{number}")
            assert len(display._progress.tasks) == 1
        display.on_measurement("measure29", 1, 0)  # a further part of the same
        assert [(task.total, task.completed) for task in display._progress.tasks] == [(3, 2)]
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line for line in range(29) if f"measure{line}  2 tasks" not in written] == []


def test_what_is_left_is_reckoned_from_the_stages_that_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 110.0])
    monkeypatch.setattr("sylva_ray.reports.progress.time.perf_counter", lambda: next(now))
    pace = Pace()
    pace.start(4)  # a run that was resumed
    pace.start(5)
    assert pace.seconds_left(StageStarted(5, 9, "")) == 15.0  # two stages took 10 s, and three are left


def test_json_lines_hold_no_number_that_json_does_not_have() -> None:
    lines: list[str] = []
    log = RunLog(lines.append, "json")
    log.on_stage(StageStarted(0, 1, "phase 1"))
    record = StageRecord(step=0, stage="phase1", round=0, participants=[0], metrics={"loss": {"0": math.nan}})
    log.on_record(record.model_copy(update={"seconds": {"wall": 1.0}}))
    assert json.loads(lines[-1], parse_constant=pytest.fail)["metrics"] == {"loss": None}


def test_a_piped_evaluation_counts_its_tasks() -> None:
    console = Console(file=io.StringIO(), width=100)
    with EvaluationDisplay(console) as display:
        display.on_measurement("pgd20", 100, 40)
        for _ in range(60):
            display.on_task_measured("pgd20")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "pgd20: 100 tasks (40 already on disk)"
    assert [line.split("  ")[0] for line in lines[1:]] == [f"pgd20: {done}/100 tasks" for done in range(50, 101, 10)]
    assert all(" s" in line and "eta" in line for line in lines[1:-1])


@pytest.mark.parametrize("tasks", [False, True])
def test_the_log_of_an_evaluation_has_a_line_for_some_or_all_tasks(tasks: bool) -> None:
    lines: list[str] = []
    log = EvaluationLog(lines.append, "json", tasks)
    log.on_measurement("pgd20", 30, 0)
    for _ in range(30):
        log.on_task_measured("pgd20")
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["measurement", *["task"] * (30 if tasks else 10)]
    assert (events[-1]["done"], events[-1]["total"]) == (30, 30)


def test_a_piped_sweep_counts_its_trials() -> None:
    console = Console(file=io.StringIO(), width=100)
    events: list[SweepStarted | TrialProgress] = [
        SweepStarted(12, ["a"]),
        TrialProgress("b", AttemptEvent(began=0.0, step=1)),
        TrialProgress("b", AttemptEvent(began=0.0, ended=2.0, outcome="finished")),
        TrialProgress("c", AttemptEvent(began=0.0, ended=3.0, outcome="died", error="no memory")),
    ]
    lines: list[str] = []
    log = SweepLog(lines.append, "json", steps=True)
    with SweepDisplay(console, quiet=False) as display:
        for event in events:
            display.on_event(event)
            log.on_event(event)
    written = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert written == [
        "1 of 12 trials have finished before",
        " 2/12  trial b  finished     2.0 s",
        " 2/12  trial c  died         3.0 s: no memory",
    ]
    assert [json.loads(line)["event"] for line in lines] == ["sweep", "step", "trial", "trial"]
    assert (json.loads(lines[-1])["done"], json.loads(lines[-1])["trials"]) == (2, 12)
