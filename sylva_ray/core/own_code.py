"""What a configuration names as ``package.module:Name``, and where its code may come from.

A configuration may be somebody else's, for example in the folder of a run. So it does not decide which code runs. A
module is used if it

* has been imported already,
* is installed, which means that its file is in ``site-packages``, or
* is in a directory that the user names: ``--import DIR``, in Python ``imports=[DIR]``.

The current directory, ``PYTHONPATH`` and editable installations, which contain other things than code, are none of
these.
"""

from __future__ import annotations

import importlib
import os
import shlex
import site
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import local_path
from sylva_ray.core.text import did_you_mean

C = TypeVar("C")

_allowed: list[str] = []


@contextmanager
def importing_from(directories: Sequence[str | Path]) -> Iterator[None]:
    """Allow the code in directories for as long as a block lasts.

    Args:
        directories: with modules; those inside a package are named by the package.

    Raises:
        UserError: one of them is not a directory.
    """
    allowed_before, path_before = list(_allowed), set(sys.path)
    try:
        allow(directories)
        yield
    finally:
        added = set(_allowed) - path_before
        _allowed[:] = allowed_before
        sys.path[:] = [directory for directory in sys.path if directory not in added]


def allow(directories: Sequence[str | Path]) -> None:
    """Allow the code in directories in this process, as `importing_from` does. Nothing installed is hidden by it.

    Raises:
        UserError: one of them is not a directory.
    """
    if isinstance(directories, str | Path):
        raise UserError("imports", directories, f"must be a list: [{str(directories)!r}]")
    paths = [local_path("--import", directory) for directory in directories]
    for path in paths:
        if not path.is_dir():
            raise UserError("--import", str(path), "is not a directory")
    for absolute in map(os.path.abspath, paths):
        if absolute not in _allowed:
            _allowed.append(absolute)
        if absolute not in sys.path:  # for what the module itself imports; last, so that nothing installed is hidden
            sys.path.append(absolute)


def allowed_directories() -> tuple[str, ...]:
    """Return the absolute paths of the directories that the user has named, for other processes to allow them, too."""
    return tuple(_allowed)


def import_options() -> str:
    """Return the options of a command that allow what is allowed now, each after a space."""
    return "".join(f" --import {shlex.quote(directory)}" for directory in _allowed)


def load_attribute(key: str, name: str) -> object:
    """Return what ``package.module:Attribute`` names.

    Args:
        key: of the setting, for the message.
        name: its value.

    Raises:
        UserError: the module is not there or its code is not allowed, it fails, or it has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(key, name, "must be package.module:Class")
    try:
        module = sys.modules.get(module_name) or _import(module_name)
        if module is not None:
            return getattr(module, attribute)
    except (Exception, SystemExit) as error:  # code that is not ours may raise anything
        raise UserError(key, name, f"cannot be imported ({type(error).__name__}: {error})") from None
    raise UserError(key, name, _how_to_allow(module_name))


def load_own(key: str, name: str, group: str) -> object:
    """Return what ``package.module:Attribute`` or an installed entry point names.

    Args:
        key: of the setting, for the message.
        name: its value.
        group: of the entry points, e.g. ``sylva_ray.datasets``.

    Raises:
        UserError: as `load_attribute`; or there is no such entry point.
    """
    target = name if ":" in name else entry_points_of(group).get(name)
    if target is None:
        raise UserError(key, name, f"no installed package has an entry point of this name in {group}")
    return load_attribute(key, target)


def find_class(key: str, name: str, what: str, known: Mapping[str, type[C]], group: str, base: type[C]) -> type[C]:
    """Return a class of this package by its name, or another's by ``package.module:Class`` or an entry point.

    Args:
        key: of the setting, for the message.
        name: its value.
        what: what the classes are called, e.g. ``attack``, for the message.
        known: the classes of this package, ``{name: class}``.
        group: of the entry points, e.g. ``sylva_ray.attacks``.
        base: of which the class must be a subclass.

    Raises:
        UserError: the name is unknown, what it names cannot be imported, or it is no such subclass.
    """
    if name in known:
        return known[name]
    available = f"{', '.join(known)}; or package.module:Class"
    if ":" not in name and name not in entry_points_of(group):
        raise UserError(key, name, f"unknown {what}; {did_you_mean(name, known)}Available: {available}")
    found = load_own(key, name, group)
    if not (isinstance(found, type) and issubclass(found, base)):
        derived = f"which inherits from {base.__module__}.{base.__qualname__}"
        raise UserError(key, name, f"is no {what}. Expected: {available}, {derived}")
    return found


def entry_points_of(group: str) -> dict[str, str]:
    """Return the entry points of installed packages in a group: ``{name: package.module:Attribute}``."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=group)}


def _import(name: str) -> ModuleType | None:
    """Import a module from what is installed or allowed; None if it is in neither.

    Python's own search would begin with the current directory where the program is started with ``python -m``. Hence
    the packages around the module are looked for only where the module is.
    """
    importlib.invalidate_caches()  # a file may be younger than the listing of its directory
    directory = _directory_of(name, [*_installed(), *_allowed])
    if directory is None:
        return None
    parts, module = name.split("."), None
    for depth in range(1, len(parts) + 1):
        parent, full_name = module, ".".join(parts[:depth])
        module = sys.modules.get(full_name) or _execute(_find(full_name, directory))
        if parent is not None:
            setattr(parent, parts[depth - 1], module)
    return module


def _execute(spec: ModuleSpec | None) -> ModuleType:
    assert spec is not None, "the module was found in this directory"
    module = sys.modules[spec.name] = module_from_spec(spec)
    try:
        if spec.loader is not None:  # a folder without __init__.py has none
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return sys.modules[spec.name]


def _find(name: str, directory: str) -> ModuleSpec | None:
    """Find a module in a directory of top-level modules, by its full name; nothing is executed."""
    return PathFinder.find_spec(name, [os.path.join(directory, *name.split(".")[:-1])])


def _directory_of(name: str, directories: Sequence[str]) -> str | None:
    """Return the first directory that holds a module, which is a file and not only a folder of that name."""
    specs = ((directory, _find(name, directory)) for directory in directories)
    return next((directory for directory, spec in specs if spec is not None and spec.has_location), None)


def _installed() -> list[str]:
    """Return the directories into which packages are installed."""
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [directory for directory in (*site.getsitepackages(), *user) if directory in sys.path]


def _how_to_allow(name: str) -> str:
    directory = _directory_of(name, [os.getcwd(), *map(os.path.abspath, sys.path)])
    if directory is None or name.split(".")[0] in sys.stdlib_module_names:
        return (
            f"no module {name} is installed; name the directory that holds it: --import DIR (in Python: imports=[DIR])"
        )
    shown = "." if directory == os.getcwd() else directory
    return (
        f"the code of {name} in {directory} does not run only because a configuration names it; if you trust it, "
        f"add: --import {shown} (in Python: imports=[{shown!r}])"
    )
