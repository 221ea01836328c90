"""Pareto dominance: which points are at least as good as another one everywhere, and better somewhere."""

from __future__ import annotations

from collections.abc import Sequence


def dominates(a: Sequence[float], b: Sequence[float], maximize: Sequence[bool]) -> bool:
    """Return whether ``a`` is at least as good as ``b`` in every objective and better in at least one.

    Args:
        a: one value per objective.
        b: the same of the other point.
        maximize: per objective, whether more is better; otherwise, less is.
    """
    pairs = [(x, y) if more else (y, x) for x, y, more in zip(a, b, maximize, strict=True)]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


def dominators(points: Sequence[Sequence[float]], maximize: Sequence[bool]) -> list[list[int]]:
    """Find the points that dominate each point.

    The Pareto front is the set of points without a dominator. Equal points do not dominate each other.

    >>> dominators([(0.9, 0.1), (0.5, 0.5), (0.4, 0.5)], maximize=(True, True))
    [[], [], [1]]

    Args:
        points: ``[point][objective]``.
        maximize: per objective, whether more is better; otherwise, less is.

    Returns:
        For each point, the indices of the points that dominate it, in ascending order.
    """
    return [[index for index, other in enumerate(points) if dominates(other, own, maximize)] for own in points]
