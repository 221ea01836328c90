"""Shrinking, nested candidates and the guard's bound."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize, stats

from sylva_ray.algorithms.adversarial import class_weights
from sylva_ray.federation.stages.layer_game.client import effective_number, paired
from sylva_ray.federation.stages.layer_game.selection import (
    CHANGING,
    MAX_GUARD_IMAGES,
    images_needed,
    nested_by_score,
    nested_candidates,
    paired_upper_bound,
    shrink,
)


def test_shrinking_by_hand() -> None:
    phi = np.array([[[1.0, 0.0]], [[3.0, 2.0]]])
    mean = np.full((2, 2), 0.5)
    np.testing.assert_allclose(shrink(phi, mean, np.array([64, 64]))[0], [[1.5, 0.5]])
    np.testing.assert_allclose(shrink(phi, mean, np.array([10**9, 1]))[0], phi[0], atol=1e-6)
    np.testing.assert_allclose(shrink(phi, mean, np.array([1, 1]), strength=0), phi)
    np.testing.assert_allclose(shrink(phi, np.eye(2), np.array([1, 1])), phi)


def test_shrinking_reads_the_receivers_row() -> None:
    """Client 0 listens to client 1, who listens to nobody."""
    phi = np.array([[[1.0, 0.0]], [[3.0, 2.0]]])
    shrunk = shrink(phi, np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([64, 64]))
    np.testing.assert_allclose(shrunk, [[[2.0, 1.0]], [[3.0, 2.0]]])


def test_a_client_without_numbers_does_not_spoil_those_of_others() -> None:
    """Also where every client is its own neighbourhood, since 0 times what is no number is none."""
    phi = np.array([[[1.0, 0.0]], [[3.0, 2.0]], [[np.nan, 1.0]]])
    images = np.array([64, 64, 64])
    alone = shrink(phi, np.eye(3), images)
    np.testing.assert_allclose(alone[:2], phi[:2])
    assert np.isnan(alone[2]).all()
    together = shrink(phi, np.full((3, 3), 1 / 3), images)
    np.testing.assert_allclose(together[:2], shrink(phi[:2], np.full((2, 2), 0.5), images[:2]))
    deaf = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(shrink(phi, deaf, images)[0], phi[0])


def test_candidates_by_hand() -> None:
    """Layer 1 costs nothing, 0 has gain per loss 4, 3 has 1; 2 has no gain."""
    phi = np.array([[0.4, 0.1], [0.2, -0.3], [-0.1, -0.5], [0.2, 0.2]])
    assert nested_candidates(phi).astype(int).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]]
    assert nested_candidates(-np.abs(phi)).tolist() == [[False] * 4]


def test_the_larger_gain_leads_among_equals() -> None:
    """Layers 0, 1 cost nothing; 2, 3 have gain per loss 2; what equals in gain too comes by number."""
    phi = np.array([[0.1, 0.0], [0.3, -1.0], [0.2, 0.1], [0.4, 0.2], [0.1, -2.0]])
    entered = [int(np.flatnonzero(b & ~a)[0]) for a, b in pairwise(nested_candidates(phi))]
    assert entered == [1, 0, 4, 3, 2]


def test_what_is_not_a_number_never_enters() -> None:
    phi = np.array([[0.5, np.nan], [np.nan, 0.1], [0.2, 0.1]])
    assert nested_candidates(phi).astype(int).tolist() == [[0, 0, 0], [0, 0, 1]]


finite = st.floats(-1, 1, allow_nan=False)


@given(arrays(float, (6, 2), elements=finite), st.floats(0, 50))
def test_candidates_are_nested_and_hold_every_price(phi: np.ndarray, price: float) -> None:
    rows = nested_candidates(phi)
    assert not rows[0].any()
    assert all((a <= b).all() and b.sum() == a.sum() + 1 for a, b in pairwise(rows))
    assert not rows[:, phi[:, 0] <= 0].any()
    worth = (phi[:, 0] > 0) & (phi[:, 0] - price * np.maximum(phi[:, 1], 0) > 1e-9)
    clear = np.abs(phi[:, 0] - price * np.maximum(phi[:, 1], 0)) > 1e-9
    if clear.all():  # no layer sits exactly at this price
        assert any(np.array_equal(row, worth) for row in rows)


def test_by_score_the_best_come_first_and_the_threshold_is_not_enough() -> None:
    scores = np.array([0.2, 0.9, 0.5, 0.5, np.nan])
    assert nested_by_score(scores, 0.4).astype(int).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
    ]
    assert nested_by_score(scores, 0.9).tolist() == [[False] * 5]
    assert nested_by_score(-scores[:4]).sum(1).tolist() == [0, 1, 2, 3, 4]


@given(arrays(float, 6, elements=finite), st.floats(-1, 1))
def test_by_score_is_nested_and_stops_at_the_threshold(scores: np.ndarray, threshold: float) -> None:
    rows = nested_by_score(scores, threshold)
    assert not rows[0].any()
    assert all((a <= b).all() and b.sum() == a.sum() + 1 for a, b in pairwise(rows))
    assert rows[-1].tolist() == (scores > threshold).tolist()
    assert all(scores[row].min() >= scores[rows[-1] & ~row].max() for row in rows[1:-1])


Z90 = stats.norm.ppf(0.9)


@pytest.mark.parametrize("n", [1, 10, 50, 1000])
def test_the_bound_of_nothing_seen_is_wilsons(n: int) -> None:
    """With lost = gained = 0 the difference solves n d = z sqrt(n d (1 - d)): the bound is above 0 without a flip."""
    assert paired_upper_bound(0, 0, n, 0.9) == pytest.approx(Z90**2 / (n + Z90**2), abs=1e-6)


def test_the_bound_of_losses_alone_is_wilsons() -> None:
    """With gained = 0 a binomial with n trials is left, whose score interval is Wilson's."""
    for lost, n in [(1, 40), (7, 60), (30, 200)]:
        centre, radius = lost + Z90**2 / 2, Z90 * np.sqrt(lost * (n - lost) / n + Z90**2 / 4)
        assert paired_upper_bound(lost, 0, n, 0.9) == pytest.approx((centre + radius) / (n + Z90**2), abs=1e-6)


def score(difference: float, lost: int, gained: int, n: int) -> float:
    """Compute Tango's statistic by its definition: observed minus ``difference``, in standard errors.

    The nuisance fraction of gained pairs is where the multinomial likelihood is largest, which is found numerically.
    """

    def minus_log_likelihood(share: float) -> float:
        cells = np.array([share + difference, share, 1 - 2 * share - difference])
        return float(-np.sum(np.array([lost, gained, n - lost - gained]) * np.log(np.maximum(cells, 1e-300))))

    lowest, highest = max(0.0, -difference), (1 - difference) / 2
    found = optimize.minimize_scalar(
        minus_log_likelihood, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-12}
    ).x
    share = min((lowest, found, highest), key=minus_log_likelihood)
    return float((lost - gained - n * difference) / np.sqrt(n * (2 * share + difference - difference**2)))


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(3, 1, 100), (0, 2, 50), (5, 5, 40), (1, 6, 30), (12, 4, 200), (2, 0, 20)]
)
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_the_bound_is_where_the_score_test_starts_to_reject(lost: int, gained: int, n: int, confidence: float) -> None:
    bound = paired_upper_bound(lost, gained, n, confidence)
    assert (lost - gained) / n < bound < 1
    assert score(bound, lost, gained, n) == pytest.approx(-stats.norm.ppf(confidence), abs=1e-4)


def test_the_bound_in_its_limits() -> None:
    assert paired_upper_bound(10, 10, 100, 0.9) > paired_upper_bound(0, 0, 100, 0.9)
    assert paired_upper_bound(20, 0, 20, 0.99) == 1.0
    assert -1 < paired_upper_bound(0, 20, 20, 0.9) < 0
    assert paired_upper_bound(300, 100, 10**6, 0.9) == pytest.approx(
        2e-4 + Z90 * 20 / 1e6, rel=0.02
    )  # Wald's, with many


@given(lost=st.integers(0, 30), gained=st.integers(0, 30), more=st.integers(1, 20))
def test_the_bound_rises_with_what_is_lost(lost: int, gained: int, more: int) -> None:
    n = 100
    assert paired_upper_bound(lost + more, gained, n, 0.9) >= paired_upper_bound(lost, gained, n, 0.9)
    assert paired_upper_bound(lost, gained, n, 0.95) >= paired_upper_bound(lost, gained, n, 0.9)


def likely_outcomes(n: int, p_lost: float, p_gained: float) -> tuple[np.ndarray, list[int], list[int]]:
    """Probability, lost and gained of all outcomes of n pairs that are not next to impossible."""
    lost, gained = (grid.ravel() for grid in np.mgrid[: n + 1, : n + 1])
    inside = lost + gained <= n
    lost, gained = lost[inside], gained[inside]
    share = stats.multinomial.pmf(
        np.stack([lost, gained, n - lost - gained], -1), n, [p_lost, p_gained, 1 - p_lost - p_gained]
    )
    likely = share > 1e-9
    return share[likely], lost[likely].tolist(), gained[likely].tolist()


def wrongly_accepted(n: int, tolerance: float, p_gained: float, confidence: float = 0.9) -> float:
    """Exact probability that the bound stays within ``tolerance`` although the true net loss is ``tolerance``."""
    share, lost, gained = likely_outcomes(n, tolerance + p_gained, p_gained)
    bounds = np.array([paired_upper_bound(b, c, n, confidence) for b, c in zip(lost, gained, strict=True)])
    return float(share[bounds <= tolerance].sum())


@pytest.mark.parametrize(
    ("n", "tolerance", "p_gained", "expected"),
    [
        (40, 0.05, 0.0, 0.129),
        (40, 0.05, 0.05, 0.091),
        (40, 0.1, 0.0, 0.080),
        (60, 0.05, 0.0, 0.046),
        (60, 0.1, 0.0, 0.137),
        (60, 0.05, 0.05, 0.098),
        (200, 0.05, 0.0, 0.124),
        (200, 0.05, 0.05, 0.098),
    ],
)
def test_how_often_the_guard_is_fooled_at_its_tolerance(
    n: int, tolerance: float, p_gained: float, expected: float
) -> None:
    """What the docstring says, over all outcomes: nominally 0.1, between 0.05 and 0.14 as outcomes are counts."""
    assert wrongly_accepted(n, tolerance, p_gained) == pytest.approx(expected, abs=1e-3)


def test_a_loss_of_twice_the_tolerance_hardly_ever_passes() -> None:
    n, tolerance = 200, 0.05
    passing = [lost for lost in range(n) if paired_upper_bound(lost, 0, n, 0.9) <= tolerance]
    assert stats.binom.cdf(max(passing), n, 2 * tolerance) < 1e-3


@pytest.mark.parametrize(("p_lost", "p_gained"), [(0.02, 0.0), (0.1, 0.05), (0.05, 0.05), (0.3, 0.1)])
@pytest.mark.parametrize("n", [40, 200])
def test_the_bound_covers_the_true_loss(p_lost: float, p_gained: float, n: int) -> None:
    share, lost, gained = likely_outcomes(n, p_lost, p_gained)
    bounds = np.array([paired_upper_bound(b, c, n, 0.9) for b, c in zip(lost, gained, strict=True)])
    assert share[bounds >= p_lost - p_gained].sum() > 0.86


@pytest.mark.parametrize(("tolerance", "confidence"), [(0.05, 0.9), (0.1, 0.9), (0.05, 0.8)])
def test_with_the_images_needed_a_harmless_change_mostly_passes(tolerance: float, confidence: float) -> None:
    """By the exact distribution of outcomes; with a third of the images it passes far less often."""

    def passes(n: int) -> float:
        share, lost, gained = likely_outcomes(n, CHANGING, CHANGING)
        bounds = np.array([paired_upper_bound(b, c, n, confidence) for b, c in zip(lost, gained, strict=True)])
        return float(share[bounds <= tolerance].sum())

    n = images_needed(tolerance, confidence)
    assert passes(n) == pytest.approx(confidence, abs=0.05)
    assert passes(n // 3) < confidence - 0.1


def test_images_needed_are_bounded() -> None:
    assert images_needed(0.05, 0.9) == 227
    assert images_needed(0.1, 0.9) == 66
    assert images_needed(0.0, 0.9) == MAX_GUARD_IMAGES
    assert images_needed(1.0, 0.9) < 10


# -- images with weights ------------------------------------------------------------------------------------------


def test_outcomes_of_equal_images_are_counts() -> None:
    before = np.array([[True, True, False, False], [True, False, False, True]])
    after = np.array([[True, False, True, True], [False, False, True, True]])
    (found,) = paired([[before], [after]], [np.ones(4)])
    assert found.lost.tolist() == [[0, 0], [1, 1]]
    assert found.gained.tolist() == [[0, 0], [2, 1]]
    assert found.num_samples == 4


def test_a_weighted_share_is_that_of_the_weights_and_images_count_less() -> None:
    """Weights 1, 1 and 4: (1 + 1 + 4)^2 / (1 + 1 + 16) = 2 effective images, of which the last one is 4/6."""
    before, after = np.array([[True, True, True]] * 2), np.array([[True, True, False], [False, True, True]])
    for scale in (1.0, 7.0):
        (found,) = paired([[before], [after]], [scale * np.array([1.0, 1.0, 4.0])])
        assert found.num_samples == pytest.approx(2)
        np.testing.assert_allclose(found.lost[1] / found.num_samples, [4 / 6, 1 / 6])


@given(arrays(float, 6, elements=st.floats(0.01, 10)))
def test_weights_never_make_images_more(weights: np.ndarray) -> None:
    right = np.ones((2, 6), bool)
    (found,) = paired([[right], [~right]], [weights])
    assert found.num_samples <= 6 + 1e-9
    np.testing.assert_allclose(found.lost[1], found.num_samples)


def test_a_client_without_images_has_none() -> None:
    nothing = np.zeros((2, 0), bool)
    (found,) = paired([[nothing], [nothing]], [np.ones(0)])
    assert found.num_samples == 0
    assert not found.lost.any()


@pytest.mark.parametrize(
    ("beta", "training", "guard", "on_the_rarest", "on_all"),
    [
        (0.99, (800, 200, 20), (157, 39, 4), 0.13, 0.08),
        (0.99, (160, 40, 4), (40, 10, 1), 0.28, 0.07),
    ],
)
def test_a_loss_of_the_heaviest_images_alone_passes_more_often(
    beta: float, training: tuple[int, ...], guard: tuple[int, ...], on_the_rarest: float, on_all: float
) -> None:
    """Kish's number is that of losses that do not depend on the weights. docs/choices.md states these figures."""
    rng, tolerance = np.random.default_rng(0), 0.05
    by_class = class_weights(torch.tensor([training]), beta)[0].double().numpy()
    weights = np.repeat(by_class, guard)
    weights /= weights.mean()
    pool = math.ceil(images_needed(tolerance, 0.9) / effective_number(weights))
    rare = np.arange(len(weights)) >= len(weights) - guard[-1]
    concentrated = np.where(rare, tolerance * weights.sum() / weights[rare].sum(), 0.0)

    def passes(chances: np.ndarray) -> bool:
        lost, number = 0.0, 0.0
        for _ in range(pool):
            before = np.ones((2, len(weights)), bool)
            after = before.copy()
            after[1] = rng.random(len(weights)) >= chances
            (own,) = paired([[before], [after]], [weights])
            lost, number = lost + float(own.lost[-1, 1]), number + own.num_samples
        return paired_upper_bound(lost, 0.0, number, 0.9) <= tolerance

    for chances, expected in ((concentrated, on_the_rarest), (np.full(len(weights), tolerance), on_all)):
        found = np.mean([passes(chances) for _ in range(600)])
        assert abs(found - expected) < 0.05  # three standard errors
