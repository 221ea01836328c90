"""Whatever ends a run that can be resumed, the last line says how."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sylva_ray.core.errors import RunError
from sylva_ray.core.resumable import resumable

SCRIPT = """
import os, signal, sys
from pathlib import Path
from sylva_ray.core.resumable import resumable

with resumable(Path(sys.argv[1]), "Go on with: this"):
    {action}
"""


def said(action: str, marker: Path) -> tuple[int, str]:
    """Run a block that does ``action``; return the exit code and what was written to standard error."""
    command = [sys.executable, "-c", SCRIPT.format(action=action), str(marker)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.abort()", -signal.SIGABRT),
        ("os._exit(1)", 1),
        ("os.killpg(os.setpgid(0, 0) or os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_a_process_that_ends_without_a_word_has_a_last_line(action: str, code: int, tmp_path: Path) -> None:
    """Ray aborts the driver where a service of its machine is lost; the kernel kills what has too much memory."""
    returned, text = said(action, tmp_path)
    assert returned == code
    assert text.splitlines()[-1].startswith("sylva-ray: ended without a message")
    assert text.splitlines()[-1].endswith("Go on with: this")


@pytest.mark.parametrize("action", ["pass", "sys.exit(3)", "raise ValueError('a bug')"])
def test_a_process_that_speaks_for_itself_has_none(action: str, tmp_path: Path) -> None:
    assert "ended without a message" not in said(action, tmp_path)[1]


def test_where_there_is_nothing_to_resume_the_command_is_repeated(tmp_path: Path) -> None:
    """Ray may abort the driver while it starts."""
    code, text = said("os._exit(1)", tmp_path / "absent")
    assert code == 1
    assert text.splitlines()[-1].endswith("Nothing was begun: the same command starts again")


def test_a_failure_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no space. Go on with: this"), resumable(tmp_path, "Go on with: this"):
        raise OSError("no space")
