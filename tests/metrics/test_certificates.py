"""Randomised smoothing against closed forms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.stats import beta, norm

from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import ClientImages
from sylva_ray.metrics.certificates import ABSTAINS, certificates, certified_accuracy, lower_bound
from sylva_ray.metrics.smoothing import votes
from tests.attacks.models import LinearCohort, gap, linear_batch


def test_the_bound_is_clopper_pearsons() -> None:
    assert lower_bound(990, 1000, 0.001) == pytest.approx(beta.ppf(0.001, 990, 11))
    assert lower_bound(1000, 1000, 0.001) == pytest.approx(0.001 ** (1 / 1000))
    assert lower_bound(0, 1000, 0.001) == 0


def test_certificates_by_hand() -> None:
    classes, radii = certificates(np.array([3, 1, 2]), np.array([1000, 505, 900]), 1000, 0.25, 0.001)
    assert classes.tolist() == [3, ABSTAINS, 2]
    assert radii[0] == pytest.approx(0.25 * norm.ppf(0.001**0.001))
    assert radii[1] == 0
    assert certified_accuracy(classes, radii, np.array([3, 1, 0]), [0, 0.1, 9]) == pytest.approx([1 / 3, 1 / 3, 0])


def test_a_linear_model_is_certified_almost_to_its_boundary_and_never_beyond() -> None:
    """Smoothing does not change a linear classifier; its exact radius is the distance to the boundary."""
    params, x, y, owner = linear_batch(n=60)
    margins, w = gap(params, x, y, owner)
    exact = (margins / w.norm(dim=1)).numpy()
    sigma, num_draws = 0.1, 2000
    images = ClientImages(x, y, owner, 2)
    guess, hits = votes(LinearCohort(), params, images, sigma, num_draws, ImageDraws(torch.arange(60)))
    classes, radii = certificates(guess.numpy(), hits.numpy(), num_draws, sigma, 0.001)
    certain = classes != ABSTAINS
    assert (classes[certain] == y.numpy()[certain]).all()
    assert (radii <= exact + 1e-9).all()
    reachable = np.minimum(
        exact, sigma * norm.ppf(0.001 ** (1 / num_draws))
    )  # the largest radius that so many draws can show
    assert (radii[certain] >= 0.6 * reachable[certain] - 0.01).all()


def test_guess_and_certificate_use_different_draws() -> None:
    stream_indices = []

    class RecordingDraws(ImageDraws):
        def normal(self, stream_index: int, shape: Sequence[int]) -> torch.Tensor:
            stream_indices.append(stream_index)
            return super().normal(stream_index, shape)

    params, x, y, owner = linear_batch(n=4)
    votes(LinearCohort(), params, ClientImages(x, y, owner, 2), 0.1, 50, RecordingDraws(torch.arange(4)))
    assert stream_indices == list(range(150))
