"""The tables of docs/sizing.md are what the code foretells; after a change of memory or work: ``make sizing``."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "sizing_docs.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small", "vit_base"])
def test_a_table_of_the_page_is_made_by_the_code(name: str) -> None:
    text = SCRIPT["PAGE"].read_text()
    assert f"<!-- table: {name} -->" in text
    assert SCRIPT["page"](text, [name]) == text
