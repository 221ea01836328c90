"""What a client should take: closed forms, and the two ends of the shrinkage."""

from __future__ import annotations

import numpy as np
import pytest

from sylva_ray.federation.stages.mixture.choice import Gains, gains_of, shrunk_gains


def test_the_gain_of_an_image_is_half_a_point_per_outcome() -> None:
    before = np.array([[True, True, False, False], [True, False, False, False]])
    after = np.array([[True, True, True, False], [False, True, True, False]])
    gains = gains_of(before, [after, before], np.array([0, 1, 2, 3]), balance=0)
    np.testing.assert_allclose(gains.means, [(-0.5 + 0.5 + 1.0) / 4, 0])
    assert gains.num_images == 4


@pytest.mark.parametrize(("balance", "expected"), [(0.0, 1 / 4), (1.0, 1 / 2), (0.5, 1 / (1 + 3**0.5))])
def test_balanced_gains_are_those_of_class_balanced_accuracy(balance: float, expected: float) -> None:
    """Of four images three are of one class, and the candidate mends the fourth."""
    labels = np.array([2, 2, 5, 2])
    before = np.zeros((2, 4), bool)
    after = before.copy()
    after[:, 2] = True
    assert gains_of(before, [after], labels, balance).means[0] == pytest.approx(expected)


def test_shrinkage_by_hand_and_at_its_ends() -> None:
    """With as many images as the strength, half of the gain is the client's."""
    reported = [Gains(np.array([0.0, 0.3]), 16), Gains(np.array([0.2, 0.1]), 48)]
    np.testing.assert_allclose(shrunk_gains(reported, 16), [[0.05, 0.25], [0.175, 0.125]])
    np.testing.assert_allclose(shrunk_gains(reported, 0), [[0.0, 0.3], [0.2, 0.1]])
    np.testing.assert_allclose(shrunk_gains(reported, 1e12), [[0.1, 0.2]] * 2)
