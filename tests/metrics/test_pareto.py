"""Dominance against the definition, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sylva_ray.metrics.pareto import dominates, dominators


@pytest.mark.parametrize(
    ("a", "b", "maximize", "expected"),
    [
        ((1.0, 1.0), (1.0, 0.0), (True, True), True),
        ((1.0, 0.0), (0.0, 1.0), (True, True), False),
        ((1.0, 1.0), (1.0, 1.0), (True, True), False),  # equal points
        ((1.0, 5.0), (1.0, 9.0), (True, False), True),
        ((1.0, 9.0), (1.0, 5.0), (True, False), False),
        ((2.0,), (1.0,), (False,), False),
    ],
)
def test_dominates(a: tuple[float, ...], b: tuple[float, ...], maximize: tuple[bool, ...], expected: bool) -> None:
    """By hand, in both directions."""
    assert dominates(a, b, maximize) is expected


def test_dominators_are_those_of_the_definition() -> None:
    """On random points with ties; the second objective is minimised."""
    values = np.random.default_rng(0).integers(0, 6, (40, 2))
    found = dominators(values.tolist(), maximize=(True, False))
    better = values * (1, -1)
    for own, indices in zip(better, found, strict=True):
        expected = [i for i, other in enumerate(better) if (other >= own).all() and (other > own).any()]
        assert indices == expected


def test_each_objective_has_a_direction() -> None:
    """A missing direction is an error, not a default."""
    with pytest.raises(ValueError, match="zip"):
        dominators([(1.0, 2.0), (2.0, 1.0)], maximize=(True,))
