"""Parsing of ``KEY=VALUE``, hints about misspelt words, and lists in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def split_assignment(text: str) -> tuple[str, str] | None:
    """Split ``KEY=VALUE`` at the first equals sign and strip spaces.

    Returns:
        Key and value, or None if there is no equals sign or no key.

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
    """Suggest the known word that is most similar to a misspelt one.

    Args:
        word: the misspelt word.
        known: the words that are allowed.

    Returns:
        A question that ends with a space, or an empty text if no word is similar.

    >>> did_you_mean("atack", ["attack", "training"])
    "did you mean 'attack'? "
    >>> did_you_mean("zebra", ["attack", "training"])
    ''
    """
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {nearest[0]!r}? " if nearest else ""


def shortened(words: Iterable[object], limit: int = 3) -> str:
    """List the first few of many words.

    Args:
        words: what is listed.
        limit: how many are shown.

    >>> shortened(["a", "b"])
    'a, b'
    >>> shortened(range(6))
    '0, 1, 2 and 3 more'
    """
    texts = [str(word) for word in words]
    rest = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + rest
