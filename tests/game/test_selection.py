"""Shrinking, nested candidates and the guard's bound."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from sylva_ray.game.selection import nested_candidates, paired_upper_bound, shrink


def test_shrinking_by_hand():
    phi = np.array([[[1.0, 0.0]], [[3.0, 2.0]]])
    mean = np.full((2, 2), 0.5)
    np.testing.assert_allclose(shrink(phi, mean, np.array([64, 64]))[0], [[1.5, 0.5]])
    np.testing.assert_allclose(shrink(phi, mean, np.array([10**9, 1]))[0], phi[0], atol=1e-6)
    np.testing.assert_allclose(shrink(phi, mean, np.array([1, 1]), strength=0), phi)
    np.testing.assert_allclose(shrink(phi, np.eye(2), np.array([1, 1])), phi)


def test_shrinking_reads_the_receivers_row():
    """Client 0 listens to client 1, who listens to nobody."""
    phi = np.array([[[1.0, 0.0]], [[3.0, 2.0]]])
    shrunk = shrink(phi, np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([64, 64]))
    np.testing.assert_allclose(shrunk, [[[2.0, 1.0]], [[3.0, 2.0]]])


def test_candidates_by_hand():
    """Layer 1 costs nothing, 0 has gain per loss 4, 3 has 1; 2 has no gain."""
    phi = np.array([[0.4, 0.1], [0.2, -0.3], [-0.1, -0.5], [0.2, 0.2]])
    assert nested_candidates(phi).astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]]
    assert nested_candidates(-np.abs(phi)).tolist() == [[False] * 4]


def test_the_larger_gain_leads_among_equals():
    """Layers 0, 1 cost nothing; 2, 3 have gain per loss 2; what equals in gain too comes by number."""
    phi = np.array([[0.1, 0.0], [0.3, -1.0], [0.2, 0.1], [0.4, 0.2], [0.1, -2.0]])
    entered = [int(np.flatnonzero(b & ~a)[0]) for a, b in pairwise(nested_candidates(phi))]
    assert entered == [1, 0, 4, 3, 2]


def test_what_is_not_a_number_never_enters():
    phi = np.array([[0.5, np.nan], [np.nan, 0.1], [0.2, 0.1]])
    assert nested_candidates(phi).astype(int).tolist() == [[0, 0, 0], [0, 0, 1]]


finite = st.floats(-1, 1, allow_nan=False)


@given(arrays(float, (6, 2), elements=finite), st.floats(0, 50))
def test_candidates_are_nested_and_hold_every_price(phi, price):
    rows = nested_candidates(phi)
    assert not rows[0].any()
    assert all((a <= b).all() and b.sum() == a.sum() + 1 for a, b in pairwise(rows))
    assert not rows[:, phi[:, 0] <= 0].any()
    worth = (phi[:, 0] > 0) & (phi[:, 0] - price * np.maximum(phi[:, 1], 0) > 1e-9)
    clear = np.abs(phi[:, 0] - price * np.maximum(phi[:, 1], 0)) > 1e-9
    if clear.all():  # no layer sits exactly at this price
        assert any(np.array_equal(row, worth) for row in rows)


def test_the_bound_by_hand_and_in_its_limits():
    # 100 pairs, 3 lost, 1 gained: (3.5 - 1.5) / 102 + 1.2816 sqrt((5 - 4 / 102)) / 102
    assert paired_upper_bound(3, 1, 100, 0.9) == pytest.approx(2 / 102 + 1.2815516 * np.sqrt(5 - 4 / 102) / 102)
    assert 0 < paired_upper_bound(0, 0, 50, 0.9) < 0.05  # nothing seen is not nothing known
    assert paired_upper_bound(0, 0, 10, 0.9) > paired_upper_bound(0, 0, 1000, 0.9)
    assert paired_upper_bound(10, 10, 100, 0.9) > paired_upper_bound(0, 0, 100, 0.9)
    assert paired_upper_bound(20, 0, 20, 0.99) == 1.0


@given(lost=st.integers(0, 30), gained=st.integers(0, 30), more=st.integers(1, 20))
def test_the_bound_rises_with_what_is_lost(lost, gained, more):
    n = 100
    assert paired_upper_bound(lost + more, gained, n, 0.9) >= paired_upper_bound(lost, gained, n, 0.9)
    assert paired_upper_bound(lost, gained, n, 0.95) >= paired_upper_bound(lost, gained, n, 0.9)


def wrongly_accepted(n, tolerance, p_gained, confidence=0.9):
    """Exact probability that the bound stays within ``tolerance`` although the true net loss is ``tolerance``."""
    lost, gained = (grid.ravel() for grid in np.mgrid[: n + 1, : n + 1])
    inside = lost + gained <= n
    lost, gained = lost[inside], gained[inside]
    cells = [tolerance + p_gained, p_gained, 1 - tolerance - 2 * p_gained]
    share = stats.multinomial.pmf(np.stack([lost, gained, n - lost - gained], -1), n, cells)
    likely = share > 1e-9
    bounds = [paired_upper_bound(int(b), int(c), n, confidence) for b, c in zip(lost[likely], gained[likely])]
    return share[likely][np.array(bounds) <= tolerance].sum()


@pytest.mark.parametrize(
    ("n", "tolerance", "p_gained", "expected"),
    [
        (60, 0.05, 0.0, 0.192),
        (200, 0.05, 0.0, 0.124),
        (60, 0.05, 0.05, 0.113),
        (200, 0.05, 0.05, 0.105),
        (40, 0.1, 0.0, 0.223),
    ],
)
def test_how_often_the_guard_is_fooled_at_its_tolerance(n, tolerance, p_gained, expected):
    """What the docstring says, summed over all outcomes: nominally 0.1, more where nothing is gained."""
    assert wrongly_accepted(n, tolerance, p_gained) == pytest.approx(expected, abs=1e-3)


def test_a_loss_of_twice_the_tolerance_hardly_ever_passes():
    n, tolerance = 200, 0.05
    passing = [lost for lost in range(n) if paired_upper_bound(lost, 0, n, 0.9) <= tolerance]
    assert stats.binom.cdf(max(passing), n, 2 * tolerance) < 1e-3


@pytest.mark.parametrize(("p_lost", "p_gained"), [(0.02, 0.0), (0.1, 0.05), (0.05, 0.05), (0.3, 0.1)])
@pytest.mark.parametrize("n", [40, 200])
def test_the_bound_covers_the_true_loss(p_lost, p_gained, n):
    rng = np.random.default_rng(0)
    cells = rng.multinomial(n, [p_lost, p_gained, 1 - p_lost - p_gained], size=4000)
    covered = np.mean([paired_upper_bound(b, c, n, 0.9) >= p_lost - p_gained for b, c, _ in cells])
    assert covered > 0.87
