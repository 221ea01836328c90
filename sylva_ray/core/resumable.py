"""Work that can be resumed: whatever stops it ends in one line that says how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sylva_ray.core.errors import Interrupted, RepeatedError, RunError, Stopped
from sylva_ray.core.processes import AfterDeath


@contextmanager
def resumable(marker: Path, instruction: str) -> Iterator[None]:
    """Append to the message of a failure how to resume the run, and turn SIGTERM into an exception.

    Args:
        marker: a file or folder that exists as soon as there is something to resume.
        instruction: the sentence to append.

    Raises:
        RunError: the block failed; a `RepeatedError` as it is.
        Interrupted: Ctrl-C in the block.
        Stopped: SIGTERM in the block.
    """
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        """Raise SystemExit, so that files and actors are closed (the exit code is set by `Stopped`)."""
        del frame
        received.append(signum)
        sys.exit(128 + signum)

    ended = "sylva-ray: ended without a message: it was killed, or Ray lost a service of this machine."
    again = f"{ended} Nothing was begun: the same command starts again"
    script = 'if [ -e "$1" ]; then echo "$2"; else echo "$3"; fi >&2'
    last_words = AfterDeath(script, str(marker), f"{ended} {instruction}", again)
    # Python handles signals in the main thread only. `ray_session` replaces the handler that Ray installs.
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    failure: RunError
    try:
        yield
    except (KeyboardInterrupt, SystemExit, RunError, OSError) as error:
        is_final = isinstance(error, RepeatedError) or (isinstance(error, SystemExit) and not received)
        if is_final or not marker.exists():
            raise
        if isinstance(error, KeyboardInterrupt):
            failure = Interrupted(f"interrupted. {instruction}")
        elif isinstance(error, SystemExit):
            failure = Stopped(f"stopped. {instruction}")
        else:
            failure = RunError(f"{error}. {instruction}")
        raise failure from error
    finally:
        last_words.cancel()
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
