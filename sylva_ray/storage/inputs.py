"""``inputs.json`` in a folder, and its comparison with what was loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sylva_ray.core.errors import UserError
from sylva_ray.core.inputs import Inputs
from sylva_ray.storage.reading import read_json

INPUTS = "inputs.json"


class InputCheck(NamedTuple):
    """How data and weights compare with those that the work in a folder began with.

    Attributes:
        changed: what is different, in words.
        notices: what the user should know, one sentence each.
    """

    changed: tuple[str, ...]
    notices: tuple[str, ...]


def load_inputs(folder: Path, fix: str) -> Inputs | None:
    """Return ``inputs.json``; None where the folder is of a version that did not write it.

    Args:
        folder: of a run or a pre-training.
        fix: what to do if the file is damaged.

    Raises:
        UserError: it is damaged.
    """
    path = folder / INPUTS
    try:
        return Inputs.from_json(read_json(path, path.stem, fix), str(path))
    except FileNotFoundError:
        return None


def compare_inputs(
    stored: Inputs | None, now: Inputs, key: str, folder: Path, kind: str, data: str, weights: str, allow_changed: bool
) -> InputCheck:
    """Compare data and weights with those that the work in a folder began with.

    Args:
        stored: what it began with; None: not known.
        now: what was loaded; what it lacks is not compared.
        key: the argument that names the folder, for messages, as the next four.
        folder: of the work.
        kind: noun for the work, e.g. ``run``.
        data: name of the data set.
        weights: name of the backbone or its file.
        allow_changed: whether a difference is accepted.

    Raises:
        UserError: something has changed and ``allow_changed`` is false; names all of it.
    """
    if stored is None:
        text = f"the {kind} is of a version that stored no digests"
        return InputCheck((), (f"{text}: it cannot be checked that data and weights are the same",))
    other_data, other_weights = stored.changed_data(now), stored.changed_weights(now)
    changed = [f"{_listed(other_data)} of {data}"] if other_data else []
    changed += [f"{_listed(other_weights)} ({weights})"] if other_weights else []
    if changed and not allow_changed:
        fix = "restore them, or add --allow-changed, which the results then say"
        raise UserError(key, str(folder), f"{_listed(changed)} are not those of the {kind}; {fix}")
    notices = [f"{_listed(changed)} are not those of the {kind} (--allow-changed)"] if changed else []
    if stored.version != now.version:
        notices.append(f"the {kind} began with version {stored.version} of sylva_ray, and this is {now.version}")
    return InputCheck(tuple(changed), tuple(notices))


def _listed(parts: Sequence[str]) -> str:
    """Return "a", "a and b", or "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
