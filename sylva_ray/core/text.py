"""Parsing of ``KEY=VALUE``, hints about misspelt words, and texts made fit for one line of a terminal."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterable
from typing import Literal

Show = Literal["tasks", "progress", "result", "nothing"]
"""What is printed on standard output: progress with every finished task, progress, tables at the end only, nothing.

The first two print these tables, too."""

PROGRESS: frozenset[Show] = frozenset({"tasks", "progress"})
"""The values that show progress."""

LogFormat = Literal["plain", "json"]
"""How progress is printed instead of bars: lines with time stamps, or one JSON object per line."""


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
    nearest = difflib.get_close_matches(word[:100], list(known), n=1)
    return f"did you mean {nearest[0]!r}? " if nearest else ""


def of_255(value: float, digits: int = 4) -> str:
    """Return a number in pixel units [0, 1] as people read it: as a fraction of 255, rounded.

    Args:
        value: an epsilon, a step size or a distance in L-infinity.
        digits: significant ones of the numerator.

    >>> of_255(8 / 255), of_255(0.1), of_255(0.0123456), of_255(0.0123456, 2)
    ('8/255', '25.5/255', '3.148/255', '3.1/255')
    """
    return f"{value * 255:.{digits}g}/255"


def budget_text(value: float) -> str:
    """Return an epsilon or a step size as a configuration has it: as `of_255`, if no digit is lost.

    >>> budget_text(4 / 255), budget_text(2.5 / 255), budget_text(0.1), budget_text(1.0), budget_text(0.0123456)
    ('4/255', '2.5/255', '0.1', '1.0', '0.0123456')
    """
    text = of_255(value)
    is_fraction = len(repr(value)) > MAX_DECIMAL and float(text.removesuffix("/255")) / 255 == value
    return text if is_fraction else repr(value)


BUDGETS = ("epsilon", "step_size")
"""Last parts of the keys of settings that are often fractions of 255."""

MAX_DECIMAL = 8
"""Characters of a number that is written as it is, and not as a fraction."""

_BUDGET = re.compile(r"""(?P<key>\b(?:epsilon|step_size)["']?(?:: |=))(?P<value>0\.\d+|\d(?:\.\d+)?e-\d+)""")


def with_fractions(text: str) -> str:
    """Write every epsilon and every step size in the text of a configuration as `budget_text` does.

    >>> with_fractions("attack: {epsilon: 0.03137254901960784, steps: 3}")
    'attack: {epsilon: 8/255, steps: 3}'
    """
    return _BUDGET.sub(lambda found: found["key"] + budget_text(float(found["value"])), text)


def as_argument(value: object) -> str:
    """Return a path or another text as an argument of a command that a shell reads.

    >>> as_argument("runs/a"), as_argument("my runs/a")
    ('runs/a', "'my runs/a'")
    """
    return shlex.quote(str(value))


def one_line(text: str) -> str:
    r"""Replace line breaks and tabs by spaces, and write every other character that cannot be printed as its escape.

    >>> one_line("two\nlines \x1b[31m")
    'two lines \\x1b[31m'
    """
    text = " ".join(text.splitlines()).replace("\t", " ").strip()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def abbreviated(value: object, shown: Callable[[object], str] = str, length: int = 300) -> str:
    """Return a value as text; of a long one, beginning and end.

    Args:
        value: anything.
        shown: how it becomes a text, ``str`` or ``repr``.
        length: characters of the text, at most.

    >>> abbreviated("x" * 1000, length=20)
    'xxxxxxxxxx...xxxxx'
    """
    try:
        text = shown(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; mappings inside each other without end
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 4 :]}"


def shortened(words: Iterable[object], limit: int = 3) -> str:
    """List the first few of many words, each abbreviated to 100 characters.

    Args:
        words: what is listed.
        limit: how many are shown.

    >>> shortened(["a", "b"])
    'a, b'
    >>> shortened(range(6))
    '0, 1, 2 and 3 more'
    """
    texts = list(words)
    rest = f" and {len(texts) - limit:,} more" if len(texts) > limit else ""
    return ", ".join(abbreviated(text, length=100) for text in texts[:limit]) + rest


def clients_text(clients: Iterable[int]) -> str:
    """Return the numbers of clients as words, the first 20 of many.

    >>> clients_text([2]), clients_text([2, 5])
    ('client 2', 'clients 2, 5')
    """
    numbers = [str(client) for client in clients]
    return f"client{'' if len(numbers) == 1 else 's'} {shortened(numbers, limit=20)}"


def duration(seconds: float) -> str:
    """Return a time in the largest two units.

    >>> duration(7.4), duration(75), duration(3 * 3600 + 120)
    ('7 s', '1 min 15 s', '3 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
