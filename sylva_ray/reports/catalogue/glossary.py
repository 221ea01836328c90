"""The words of docs/glossary.md, for ``sylva-ray show WORD``. A wheel contains the page."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]

_ENTRY = re.compile(r"^\*\*(.+?)\.\*\* (.+?)(?=\n\n|\n*\Z)", re.MULTILINE | re.DOTALL)


@cache
def glossary() -> dict[str, str]:
    """Return ``{word in lower case: explanation}``; words that one entry explains together have the same text."""
    places = (_PACKAGE / "recipes" / "glossary.md", _PACKAGE.parent / "docs" / "glossary.md")
    page = next(path for path in places if path.is_file()).read_text(encoding="utf-8")
    return {
        word.lower(): _plain(text) for words, text in _ENTRY.findall(page) for word in re.split(", (?:and )?", words)
    }


def _plain(text: str) -> str:
    """Return Markdown on one line, without emphasis and the targets of links."""
    return re.sub(r"\[(.+?)\]\(.+?\)|\*(\S.*?)\*", r"\1\2", " ".join(text.split()))
