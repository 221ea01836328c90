"""The two ways a command can end badly, and the exit code each one maps to."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input: one line naming the key, the value and what is allowed. Exit code 2, nothing written.

    Args:
        key: what the user would change, e.g. ``attack.epsilon`` or a path.
        value: what was found there.
        fix: what is allowed, or what to do.
    """

    exit_code = 2

    def __init__(self, key: str, value: object, fix: str) -> None:
        self.key, self.value, self.fix = key, value, fix
        super().__init__(f"{key} = {value!r}: {fix}")

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        """Exceptions cross process borders by pickle, which would otherwise call us with the message alone."""
        return type(self), (self.key, self.value, self.fix)


class RunError(RuntimeError):
    """A failure while running: what happened, to which client, in which round. Exit code 1, the run can be resumed."""

    exit_code = 1


class Interrupted(RunError):
    """Ctrl-C during a run, which can be resumed. Exit code 130, as shells expect of SIGINT."""

    exit_code = 130


class Stopped(Interrupted):
    """SIGTERM during a run (`ray job stop`, a scheduler's time limit), which can be resumed. Exit code 143."""

    exit_code = 143
