"""The two balls that gradient attacks move in, inside the pixel box [0, 1]; and how long a perturbation is in each norm."""

from __future__ import annotations

from sylva_ray.core.lazy import torch
from sylva_ray.core.seeding import ImageDraws

TINY = 1e-12
"""Keeps a division by a vanishing gradient finite: the step is then zero."""


def flat_norm(v: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of every image, ``[n, 1, 1, 1]``."""
    return v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


class Linf:
    """``max |delta|``."""

    def project(self, u: torch.Tensor, x: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Onto the ball around ``x``, then onto the pixel range."""
        return torch.minimum(torch.maximum(u, x - epsilon), x + epsilon).clamp(0, 1)

    def ascent(self, gradient: torch.Tensor) -> torch.Tensor:
        """The direction of length 1 along which a linear function rises most."""
        return gradient.sign()

    def inside(self, like: torch.Tensor, draws: ImageDraws, stream_index: int) -> torch.Tensor:
        """Uniform in the unit ball."""
        return 2 * draws.uniform(stream_index, like.shape[1:]) - 1

    def surface(self, like: torch.Tensor, draws: ImageDraws, stream_index: int) -> torch.Tensor:
        """On the unit sphere: what AutoAttack starts from."""
        v = self.inside(like, draws, stream_index)
        return v / (v.flatten(1).abs().amax(1).view(-1, 1, 1, 1) + TINY)

    def length(self, delta: torch.Tensor) -> torch.Tensor:
        """``[n]``."""
        return delta.flatten(1).abs().amax(1)


class L2:
    """Euclidean. Clipping to the pixel range never lengthens a perturbation, because ``x`` lies in it."""

    def project(self, u: torch.Tensor, x: torch.Tensor, epsilon: float) -> torch.Tensor:
        """See `Linf.project`."""
        delta = u - x
        return (x + delta * (epsilon / (flat_norm(delta) + TINY)).clamp(max=1)).clamp(0, 1)

    def ascent(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `Linf.ascent`."""
        return gradient / (flat_norm(gradient) + TINY)

    def inside(self, like: torch.Tensor, draws: ImageDraws, stream_index: int) -> torch.Tensor:
        """See `Linf.inside`: a radius of u^(1/d) makes it uniform in the volume."""
        radius = draws.uniform(stream_index + (1 << 20), (1, 1, 1)) ** (1 / like[0].numel())
        return self.surface(like, draws, stream_index) * radius

    def surface(self, like: torch.Tensor, draws: ImageDraws, stream_index: int) -> torch.Tensor:
        """See `Linf.surface`."""
        return self.ascent(draws.normal(stream_index, like.shape[1:]))

    def length(self, delta: torch.Tensor) -> torch.Tensor:
        """``[n]``."""
        return delta.flatten(1).norm(dim=1)


class L0:
    """How many pixels (not channels) moved."""

    def length(self, delta: torch.Tensor) -> torch.Tensor:
        """``[n]``."""
        return (delta.abs().amax(1) > 0).flatten(1).sum(1).to(delta.dtype)


LINF, L2_NORM = Linf(), L2()
NORMS: dict[str, Linf | L2] = {"linf": LINF, "l2": L2_NORM}
LENGTHS: dict[str, Linf | L2 | L0] = {**NORMS, "l0": L0()}
