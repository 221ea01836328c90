"""The two things that every check of typed words does: split ``KEY=VALUE``, and name the nearest word that is known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def split_assignment(text: str) -> tuple[str, str] | None:
    """Split ``KEY=VALUE`` at the first equals sign, without the spaces around both.

    Args:
        text: what was typed.

    Returns:
        Key and value; None where there is no equals sign, or nothing before it.

    >>> split_assignment("attack.epsilon=8/255")
    ('attack.epsilon', '8/255')
    >>> split_assignment("parameters.lr={grid: [a=1]}")
    ('parameters.lr', '{grid: [a=1]}')
    >>> split_assignment("attack.epsilon") is None
    True
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    return (key, value.strip()) if equals and key else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Name the known word that is nearest to a mistyped one.

    Args:
        word: what was typed.
        known: the words that are allowed.

    Returns:
        A question that ends with a space, to stand before the list of what is allowed; empty where no word is near.

    >>> did_you_mean("atack", ["attack", "training"])
    "did you mean 'attack'? "
    >>> did_you_mean("zebra", ["attack", "training"])
    ''
    """
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {nearest[0]!r}? " if nearest else ""
