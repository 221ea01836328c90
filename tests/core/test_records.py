"""What a record says about itself in words."""

from __future__ import annotations

from typing import Any

import pytest

from sylva_ray.core.records import GameRecord

PLAYERS = [*(f"blocks.{number}" for number in range(6)), "head"]


def game(selected: list[int], **kept: Any) -> GameRecord:
    return GameRecord(players=PLAYERS, selected=[[player in selected for player in range(7)]], **kept)


@pytest.mark.parametrize(
    ("selected", "strength", "text"),
    [
        ([], 0.0, "none"),
        ([6], 1.0, "head"),
        ([0, 2, 3, 4, 5, 6], 0.5, "0 2-5 head 50%"),
        ([0, 1, 4], 0.75, "0 1 4 75%"),
        ([1, 2, 3], 0.0, "1-3 (not kept)"),
    ],
)
def test_what_was_refined_in_words(selected: list[int], strength: float, text: str) -> None:
    assert game(selected, strength=[strength]).refined(0) == text


def test_blocks_without_adapters_are_not_named() -> None:
    players = ["blocks.0", "blocks.3", "blocks.4", "blocks.5", "head"]
    record = GameRecord(players=players, selected=[[True] * 5], strength=[1.0])
    assert record.refined(0) == "0 3-5 head"


def test_version_0_1_noted_epochs_instead_of_a_strength() -> None:
    assert game([1, 6], refined_epochs=[2]).refined(0) == "1 head"
    assert game([1, 6], refined_epochs=[0]).refined(0) == "1 head (not kept)"
