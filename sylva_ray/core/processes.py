"""Processes of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess


def is_running(pid: int) -> bool:
    """Return whether a process exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it exists and belongs to another user
        pass
    return True


class AfterDeath:
    """A shell script that runs when this process ends or closes it, unless it is cancelled before.

    It runs even where no code of this process does any more: Ray ends a process at once when its node's services are
    lost, and the kernel when memory is. The shell waits at a pipe, whose end means that this process has gone.

    Args:
        script: for ``/bin/sh``.
        arguments: ``$1``, ``$2``, ... of the script.
    """

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", f'read -r word; [ "$word" = cancelled ] || {{ {script}\n}}', "sh", *arguments],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a signal to the process group must not end it
        )

    def cancel(self) -> None:
        """End the shell without running the script."""
        self._process.communicate(b"cancelled\n")

    def close(self) -> None:
        """Let the script begin, unless it was cancelled, and do not wait for it."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # the shell was ended by somebody else
                self._process.stdin.write(b"closed\n")
                self._process.stdin.close()
