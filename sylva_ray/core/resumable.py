"""Work that can be resumed: whatever stops it ends in one line that says how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sylva_ray.core.errors import Interrupted, RunError, Stopped


@contextmanager
def resumable(sign: Path, how: str) -> Iterator[None]:
    """Add to a failure how to resume, if anything was begun. SIGTERM ends the block like Ctrl-C.

    Args:
        sign: a file or folder that is there as soon as something can be resumed.
        how: the sentence that says what to do.

    Raises:
        RunError: the block failed.
        Interrupted: Ctrl-C in the block.
        Stopped: SIGTERM in the block.
    """
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        """Raise, so that whatever is open is closed (Ray turns a SystemExit of its own into another exit code)."""
        del frame
        received.append(signum)
        sys.exit(128 + signum)

    # Python handles signals in the main thread only. Ray's own handler is put aside by `ray_session`.
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    failure: RunError
    try:
        yield
    except (KeyboardInterrupt, SystemExit, RunError, OSError) as error:
        if not sign.exists() or (isinstance(error, SystemExit) and not received):
            raise
        if isinstance(error, KeyboardInterrupt):
            failure = Interrupted(f"interrupted. {how}")
        elif isinstance(error, SystemExit):
            failure = Stopped(f"stopped. {how}")
        else:
            failure = RunError(f"{error}. {how}")
        raise failure from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
