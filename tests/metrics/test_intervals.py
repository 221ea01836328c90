"""Confidence intervals against scipy's, and check S4 on few images."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from sylva_ray.metrics.checks import unbounded_attack
from sylva_ray.metrics.intervals import fleet_interval, wilson_interval


@pytest.mark.parametrize(("hits", "images"), [(0, 8), (3, 8), (50, 100), (999, 1000), (40, 40)])
def test_wilson_is_scipys(hits: int, images: int) -> None:
    expected = binomtest(hits, images).proportion_ci(0.95, method="wilson")
    assert wilson_interval(hits / images, images) == pytest.approx((expected.low, expected.high))


def test_clients_with_as_many_images_are_one_sample_and_small_clients_widen_the_interval() -> None:
    assert fleet_interval(0.4, [25, 25, 25, 25]) == pytest.approx(wilson_interval(0.4, 100))
    even, uneven = fleet_interval(0.4, [50, 50]), fleet_interval(0.4, [90, 10])
    assert uneven[0] < even[0] < even[1] < uneven[1]


def test_s4_knows_the_error_of_few_images() -> None:
    """13 % of 64 images may be chance, 13 % of 6,400 are not; 40 % of 64 are not either."""
    few = unbounded_attack({0: 0.13, 1: 0.13}, 10, [32, 32])
    assert few.passed
    assert "error of so few images" in few.meaning
    assert not unbounded_attack({0: 0.13, 1: 0.13}, 10, [3200, 3200]).passed
    assert not unbounded_attack({0: 0.4, 1: 0.4}, 10, [32, 32]).passed
    assert "at most chance" in unbounded_attack({0: 0.05, 1: 0.05}, 10, [32, 32]).meaning


def test_s4_finds_the_one_client_that_no_attack_reaches() -> None:
    masked = unbounded_attack(dict.fromkeys(range(9), 0.0) | {12: 1.0}, 10, [32] * 10)
    assert not masked.passed
    assert masked.value == pytest.approx(0.1)
    assert "client 12" in masked.meaning
    assert "up to 100.0%" in masked.meaning
    assert unbounded_attack(dict.fromkeys(range(10), 0.1), 10, [32] * 10).passed


def test_s4_names_the_first_of_many_clients() -> None:
    standing = unbounded_attack({client: float(client % 12 == 0) for client in range(1200)}, 10, [32] * 1200)
    assert not standing.passed
    assert "clients 0, 12, 24" in standing.meaning
    assert "and 80 more" in standing.meaning
    assert len(standing.meaning) < 500


def test_s4_fails_a_fleet_of_honest_clients_by_chance_in_a_few_percent_at_most() -> None:
    """All have exactly chance, the worst case of an honest fleet."""
    rng = np.random.default_rng(0)
    fleets = rng.binomial(32, 0.1, size=(1000, 50)) / 32
    failed = [not unbounded_attack(dict(enumerate(fleet)), 10, [32] * 50).passed for fleet in fleets]
    assert np.mean(failed) < 0.06  # the mean's interval fails 2.5 %, those of single clients as many


def test_images_that_clients_share_are_counted_once() -> None:
    """Fifty clients with one model and 100 of the same 360 images: the interval covers in 95 % of the cases."""
    rng, accuracy, covered, draws = np.random.default_rng(0), 0.6, 0, 400
    for _ in range(draws):
        hits = rng.random(360) < accuracy
        mean = float(np.mean([hits[rng.choice(360, 100, replace=False)].mean() for _ in range(50)]))
        low, high = fleet_interval(mean, [100] * 50, distinct=360)
        covered += low <= accuracy <= high
    assert covered / draws == pytest.approx(0.95, abs=0.03)
    assert fleet_interval(0.5, [10, 10], distinct=20) == fleet_interval(0.5, [10, 10])
