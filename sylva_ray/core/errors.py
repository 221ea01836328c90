"""The errors that end a command, and their exit codes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sylva_ray.core.credentials import mask_credentials, mask_value
from sylva_ray.core.text import BUDGETS, abbreviated, budget_text, one_line


def error_line(message: str) -> str:
    """Return a message as one line without credentials."""
    return mask_credentials(" ".join(message.split()))


def reason_of(error: BaseException, *urls: str) -> str:
    """Return the beginning of an exception's message as one line without credentials; its type if it has no message.

    Args:
        error: the exception.
        urls: addresses whose credentials the message may quote.
    """
    return mask_credentials(" ".join(str(error).split()), *urls)[:200] or type(error).__name__


def _as_written(value: object) -> str:
    """Return a value as a configuration has it: null, true and false, not Python's names for them."""
    return {"None": "null", "True": "true", "False": "false"}.get(text := repr(value), text)


def _as_budget(value: object) -> str:
    return budget_text(value) if isinstance(value, float) else _as_written(value)


class UserError(ValueError):
    """Wrong input. The message is one line: key, value, and what is allowed. Exit code 2; nothing has been written.

    Whatever the three hold, the message is printable and without credentials, and a long value is abbreviated in it.

    Args:
        key: the setting or the option, e.g. ``attack.epsilon`` or ``--out``.
        value: the value that was given.
        fix: what is allowed, or what to do.
    """

    exit_code = 2

    def __init__(self, key: str, value: object, fix: str) -> None:
        self.key, self.value, self.fix = key, value, fix
        shown = _as_budget if key.endswith(BUDGETS) else _as_written
        fix = abbreviated(mask_credentials(fix), length=1200)
        super().__init__(
            one_line(f"{abbreviated(mask_credentials(key))} = {abbreviated(mask_value(value), shown)}: {fix}")
        )

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        """Return the arguments of the constructor; by default, pickle would pass the message only."""
        return type(self), (self.key, self.value, self.fix)


@contextmanager
def asked_as(argument: str, *keys: str) -> Iterator[None]:
    """Report errors of a block under the name of the argument that the user gave.

    Args:
        argument: as the user knows it, e.g. ``--surrogate``.
        keys: what the block calls it, e.g. ``RUN``.

    Raises:
        UserError: the block raised one; if it is about one of ``keys``, it names ``argument`` instead.
    """
    try:
        yield
    except UserError as error:
        if error.key not in keys:
            raise
        raise UserError(argument, error.value, error.fix) from error.__cause__


class RunError(RuntimeError):
    """A failure during a run; the message names the round and the clients. Exit code 1; the run can be resumed.

    Args:
        message: what failed; the credentials in it are not shown.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(mask_credentials(message))


class RepeatedError(RunError):
    """A failure that would come again if the work were resumed; the message says what else to do."""


class OutOfMemoryError(RuntimeError):
    """A task did not fit the memory of its process. The message is one line.

    Args:
        message: what the memory was too small for.
        windows: images in one pass with which the task may fit, ``{pass: images}``; empty: it cannot be made smaller.
    """

    def __init__(self, message: str, windows: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.windows = dict(windows or {})


class DeviceError(RuntimeError):
    """The GPU of a process has failed, and the process cannot use it any more. The message is one line."""


class Interrupted(RunError):
    """A run was interrupted with Ctrl-C and can be resumed. Exit code 130, as is usual for SIGINT."""

    exit_code = 130


class Stopped(Interrupted):
    """A run was stopped with SIGTERM (`ray job stop`, a time limit) and can be resumed. Exit code 143."""

    exit_code = 143
