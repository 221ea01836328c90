"""The norms of perturbations: projection onto their balls within [0, 1], directions of ascent, random points, lengths.

Images ``x``, points ``u`` and perturbations ``delta`` are ``[n, 3, H, W]``.
"""

from __future__ import annotations

from typing import ClassVar

from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws

TINY = 1e-12
"""Added to denominators, so that a zero gradient results in a zero step."""

SLACK = 1e-6
"""How much any distance may exceed epsilon because of rounding."""


def flat_norm(v: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm of every image, ``[n, 1, 1, 1]``."""
    lengths: torch.Tensor = v.flatten(1).norm(dim=1)
    return lengths.view(-1, 1, 1, 1)


def scaled_to_one(v: torch.Tensor) -> torch.Tensor:
    """Divide every image by its largest absolute value; an image of zeros stays as it is.

    Of a model that is sure of its answer, a gradient of the cross-entropy may have a norm of 1e-20. Its direction is as
    good as that of any other, and its square would underflow.
    """
    largest = v.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
    return v / torch.where(largest > 0, largest, 1)


class Norm:
    """What the norms have in common.

    Attributes:
        rounding: error of a measured length, relative to the length.
    """

    rounding: ClassVar[float] = 0.0

    def slack(self, epsilon: float) -> float:
        """Return how much a measured length may exceed ``epsilon`` because of rounding."""
        return SLACK + self.rounding * epsilon if self.rounding else SLACK  # an infinite epsilon times 0 is no number


class Linf(Norm):
    """The L-infinity norm, ``max |delta|``."""

    def project(self, u: torch.Tensor, x: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Project ``u`` onto the ball of radius ``epsilon`` around ``x``, then onto the pixel range [0, 1]."""
        return torch.minimum(torch.maximum(u, x - epsilon), x + epsilon).clamp(0, 1)

    def ascent(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the direction of steepest ascent, the unit vector with the largest inner product with ``gradient``."""
        return gradient.sign()

    def inside(self, like: torch.Tensor, draws: ImageDraws, stream_index: int) -> torch.Tensor:
        """Draw a uniform point of the unit ball per image, of the shape of ``like``."""
        return draws.signed(stream_index, like.shape[1:])

    def surface(self, like: torch.Tensor, draws: ImageDraws, stream_index: int) -> torch.Tensor:
        """Draw a point of norm 1 per image: a uniform point of the ball, normalised (as in AutoAttack)."""
        v = self.inside(like, draws, stream_index)
        return v / (v.flatten(1).abs().amax(1).view(-1, 1, 1, 1) + TINY)

    def length(self, delta: torch.Tensor) -> torch.Tensor:
        """Return the norm of every perturbation, ``[n]``."""
        return delta.flatten(1).abs().amax(1)


class L2(Norm):
    """The Euclidean norm of the whole image.

    A length is a sum over all pixels in float32: of 224 x 224 pixels its relative error is up to 1e-6 on a CPU.
    """

    rounding = 1e-5

    def project(self, u: torch.Tensor, x: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See `Linf.project`. Clipping to the pixel range does not increase the norm, because ``x`` is in it."""
        delta = u - x
        return (x + delta * (epsilon / (flat_norm(delta) + TINY)).clamp(max=1)).clamp(0, 1)

    def ascent(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `Linf.ascent`."""
        scaled = scaled_to_one(gradient)
        return scaled / (flat_norm(scaled) + TINY)

    def inside(self, like: torch.Tensor, draws: ImageDraws, stream_index: int) -> torch.Tensor:
        """See `Linf.inside`. With the radius u^(1/d), u uniform, the points are uniform in the d-dimensional ball."""
        radius = draws.uniform(stream_index + (1 << 20), (1, 1, 1)) ** (1 / like[0].numel())
        return self.surface(like, draws, stream_index) * radius

    def surface(self, like: torch.Tensor, draws: ImageDraws, stream_index: int) -> torch.Tensor:
        """See `Linf.surface`."""
        return self.ascent(draws.normal(stream_index, like.shape[1:]))

    def length(self, delta: torch.Tensor) -> torch.Tensor:
        """Return the norm of every perturbation, ``[n]``."""
        return flat_norm(delta).flatten()


class L0(Norm):
    """The number of changed pixels; a pixel counts once, whichever of its channels change."""

    def length(self, delta: torch.Tensor) -> torch.Tensor:
        """Return the norm of every perturbation, ``[n]``."""
        is_changed: torch.Tensor = delta.abs().amax(1) > 0
        return is_changed.flatten(1).sum(1).to(delta.dtype)


LINF = Linf()
NORMS: dict[str, Linf | L2] = {"linf": LINF, "l2": L2()}
"""Norms in which an attack can move."""
LENGTHS: dict[str, Linf | L2 | L0] = {**NORMS, "l0": L0()}
"""Norms in which a perturbation can be measured."""
