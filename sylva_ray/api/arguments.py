"""Checks of the arguments of the Python interface that the command line checks by their form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import get_args

from sylva_ray.config.recipes import recipes
from sylva_ray.config.stored import RUN_CONFIG
from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import is_url, local_path
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


def check_list(name: str, values: object) -> None:
    """Check that an argument is a list of numbers, not one number; the numbers are checked where they are used.

    Args:
        name: of the argument.
        values: the argument.

    Raises:
        UserError: it is not.
    """
    if isinstance(values, Real):
        raise UserError(name, values, f"must be a list: [{values}]")
    if not isinstance(values, Iterable) or isinstance(values, str | Mapping):
        raise UserError(name, values, "must be a list of numbers")


def check_count(name: str, value: object, at_least: int = 1) -> None:
    """Check that an argument is a whole number, and not too small.

    Raises:
        UserError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise UserError(name, value, f"must be a whole number of at least {at_least}")


def check_clients(clients: Sequence[int] | None, num_clients: int) -> None:
    """Check that an argument is a list of clients of a run.

    Args:
        clients: the argument; None: all clients.
        num_clients: of the run.

    Raises:
        UserError: it is not a list, or there is no such client.
    """
    allowed = f"must be 0 to {num_clients - 1}"
    if clients is not None and (not isinstance(clients, Sequence) or isinstance(clients, str)):
        raise UserError("clients", clients, f"must be a list of client numbers; each {allowed}")
    for client in clients or ():
        if type(client) is not int or client not in range(num_clients):
            raise UserError("clients", client, allowed)


def check_show(show: Show, log_format: LogFormat | None = None) -> None:
    """Check the arguments ``show`` and ``log_format``.

    Raises:
        UserError: one is not among the values of `Show` or `LogFormat`.
    """
    if show not in get_args(Show):
        raise UserError("show", show, f"must be one of {', '.join(get_args(Show))}")
    if log_format not in (None, *get_args(LogFormat)):
        raise UserError("log_format", log_format, f"must be one of {', '.join(get_args(LogFormat))}")


def check_source(config: str, resume: bool, out: str | None) -> None:
    """Check that CONFIG, --resume and --out of ``sylva-ray run`` say where a run is, or what a new one is made from.

    Raises:
        UserError: they do not.
    """
    if is_url(config):
        if not resume:
            raise UserError("CONFIG", config, "is a URL; use --resume to continue the run there, or give a YAML file")
        return
    path = local_path("CONFIG", config)
    if resume:
        if out is not None or path.is_dir():
            return
        if not path.exists() and config not in recipes():
            raise UserError("RUN", config, "no such run folder")
        raise UserError("--resume", config, "needs --out FOLDER (or the run folder instead of CONFIG)")
    if not path.is_dir():
        return
    if not (path / RUN_CONFIG).is_file():
        if config not in recipes():  # a recipe of that name comes before such a folder
            raise UserError("CONFIG", config, f"is a folder without {RUN_CONFIG}: neither a run nor a configuration")
    elif out is None:
        fix = "is a folder; use --resume to continue the run in it, or --out for a new run with its config"
        raise UserError("CONFIG", config, fix)
