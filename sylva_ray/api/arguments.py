"""Checks of the arguments of the Python interface that the command line checks by their form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from sylva_ray.core.errors import UserError
from sylva_ray.core.text import LogFormat, Show


def check_texts(name: str, values: Sequence[str | Path]) -> None:
    """Check that an argument is a list of texts or paths, not one text, whose letters would be taken for entries.

    Args:
        name: of the argument.
        values: its value.

    Raises:
        UserError: it is not such a list.
    """
    if isinstance(values, str | Path):
        raise UserError(name, values, f"must be a list: [{str(values)!r}]")
    if not isinstance(values, Sequence) or not all(isinstance(value, str | Path) for value in values):
        raise UserError(name, values, "must be a list of texts")


def check_clients(clients: Sequence[int] | None, num_clients: int) -> None:
    """Check that an argument is a list of clients of a run.

    Args:
        clients: the argument; None: all clients.
        num_clients: of the run.

    Raises:
        UserError: it is not a list, or there is no such client.
    """
    allowed = f"must be all or 0 to {num_clients - 1}"
    if clients is not None and (not isinstance(clients, Sequence) or isinstance(clients, str)):
        raise UserError("clients", clients, f"must be a list of client numbers; each {allowed}")
    for client in clients or ():
        if type(client) is not int or client not in range(num_clients):
            raise UserError("--client", client, allowed)


def check_show(show: Show, log_format: LogFormat | None = None) -> None:
    """Check the arguments ``show`` and ``log_format``.

    Raises:
        UserError: one is not among the values of `Show` or `LogFormat`.
    """
    if show not in get_args(Show):
        raise UserError("show", show, f"must be one of {', '.join(get_args(Show))}")
    if log_format not in (None, *get_args(LogFormat)):
        raise UserError("log_format", log_format, f"must be one of {', '.join(get_args(LogFormat))}")
