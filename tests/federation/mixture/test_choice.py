"""What a client should take: closed forms, the two ends of the shrinkage, and how often the choice is right."""

from __future__ import annotations

import numpy as np
import pytest

from sylva_ray.federation.stages.mixture.choice import Gains, expected_gains, gains_of


def test_the_gain_of_an_image_is_half_a_point_per_outcome() -> None:
    before = np.array([[True, True, False, False], [True, False, False, False]])
    after = np.array([[True, True, True, False], [False, True, True, False]])
    gains = gains_of(before, [after, before], np.array([0, 1, 2, 3]), balance=0)
    np.testing.assert_allclose(gains.total, [-0.5 + 0.5 + 1.0, 0])
    np.testing.assert_allclose(gains.squares, [0.25 + 0.25 + 1.0, 0])
    assert gains.num_images == 4


def test_balanced_gains_are_those_of_class_balanced_accuracy() -> None:
    """Of four images three are of one class, and the candidate mends the fourth."""
    labels = np.array([2, 2, 5, 2])
    before = np.zeros((2, 4), bool)
    after = before.copy()
    after[:, 2] = True
    for balance, expected in ((0.0, 1 / 4), (1.0, 1 / 2)):
        gains = gains_of(before, [after], labels, balance)
        assert gains.total[0] / gains.num_images == pytest.approx(expected)


def reported(gain: float, num_images: int, noise: float = 0.3) -> Gains:
    """A client whose differences have this mean and this standard deviation, exactly, for one candidate."""
    return Gains(np.array([gain * num_images]), np.array([(gain**2 + noise**2) * num_images]), num_images)


def test_a_single_client_and_many_images_are_believed() -> None:
    assert expected_gains([reported(0.02, 5)])[0, 0] == pytest.approx(0.02)
    many = expected_gains([reported(gain, 10**7) for gain in (-0.1, 0.05, 0.2)])[:, 0]
    np.testing.assert_allclose(many, [-0.1, 0.05, 0.2], atol=1e-4)


def test_what_noise_explains_is_the_mean_of_the_fleet() -> None:
    """Twenty images and a standard deviation of 0.3: gains of 0.1 below and above the mean are nothing."""
    few = expected_gains([reported(gain, 20) for gain in (-0.05, 0.05, 0.0, 0.04)])[:, 0]
    np.testing.assert_allclose(few, 0.01)


def test_shrinkage_by_hand() -> None:
    """Two clients of 100 images: v = 0.3^2, v / n = 0.0009, variance of the gains 0.02, so t = 0.0191."""
    variance = 0.09 * 200 / 198  # its unbiased estimate
    noise = variance / 100
    weight = (0.02 - noise) / 0.02
    expected = 0.1 + weight * np.array([-0.1, 0.1])
    np.testing.assert_allclose(expected_gains([reported(0.0, 100), reported(0.2, 100)])[:, 0], expected)


def test_a_candidate_that_changes_nothing_gains_nothing() -> None:
    nothing = Gains(np.zeros(2), np.zeros(2), 8)
    assert not expected_gains([nothing, nothing, nothing]).any()


@pytest.mark.parametrize(("num_images", "spread"), [(20, 0.0), (20, 0.1), (400, 0.1)])
def test_the_mean_true_gain_of_the_choice_is_not_below_those_of_both_extremes(num_images: int, spread: float) -> None:
    """Shrunk, the choice loses to neither "what the fleet prefers" nor "what I measured", up to simulation noise."""
    rng = np.random.default_rng(0)
    achieved = {"shrunk": 0.0, "fleet": 0.0, "own": 0.0}
    for _ in range(300):
        true = 0.02 + spread * rng.normal(size=(10, 3))
        noisy = true + 0.3 * rng.normal(size=true.shape) / np.sqrt(num_images)
        clients = [Gains(g * num_images, (g**2 + 0.09) * num_images, num_images) for g in noisy]
        rules = {"shrunk": expected_gains(clients), "fleet": np.tile(noisy.mean(0), (10, 1)), "own": noisy}
        for name, gains in rules.items():
            best = gains.argmax(1)
            taken = np.where(gains.max(1) > 0, true[np.arange(10), best], 0)
            achieved[name] += taken.mean() / 300
    assert achieved["shrunk"] > max(achieved["fleet"], achieved["own"]) - 0.004
