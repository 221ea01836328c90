"""Which candidate a client should take, from how much its held-out score rose and how sure that is.

A client has few held-out images, and a fleet has many. What a client measured is therefore shrunk towards the mean of
the fleet, by as much as its own noise exceeds the differences between clients (empirical Bayes, as in James and Stein
1961): with few images all clients take what is best for the fleet, with many each takes what is best for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gains:
    """What one client reports: by how much the scores of m candidates exceed the score of its present model.

    Attributes:
        total: ``[m]``, sums over the images of the differences of the scores.
        squares: ``[m]``, sums of the squares of these differences.
        num_images: held-out images.
    """

    total: np.ndarray
    squares: np.ndarray
    num_images: int

    @property
    def num_bytes(self) -> int:
        """What the client uploads."""
        return self.total.nbytes + self.squares.nbytes


def gains_of(before: np.ndarray, candidates: Sequence[np.ndarray], labels: np.ndarray, balance: float) -> Gains:
    """Compare candidates with the present model on the held-out images of one client.

    The score of an image is the mean of its two outcomes, benign and attacked.

    Args:
        before: outcomes of the present model, ``[2, n] bool``.
        candidates: those of every candidate.
        labels: ``[n]``.
        balance: images of a class count n_class^-balance each; 0: all images count the same, 1: all classes do.
    """
    weights = np.bincount(labels)[labels].astype(float) ** -balance
    weights *= len(labels) / weights.sum()
    differences = np.stack([(after.astype(float) - before).mean(0) for after in candidates]) * weights
    return Gains(differences.sum(1), (differences**2).sum(1), len(labels))


def expected_gains(reported: Sequence[Gains]) -> np.ndarray:
    """Return the expected gain of every client and candidate, ``[K, m]``.

    With g the mean difference of a client, v the variance of a difference of one image in the whole fleet, n the images
    of the client, mu the mean of g over clients, and t the variance of g over clients that v / n does not explain, it
    is mu + t / (t + v / n) (g - mu). A fleet of one client has nothing to shrink to.
    """
    n = np.array([own.num_images for own in reported], float)[:, None]
    gain: np.ndarray = np.stack([own.total for own in reported]) / n
    if len(reported) == 1:
        return gain
    squares = np.stack([own.squares for own in reported])
    mean = gain.mean(0)
    variance = np.maximum(squares.sum(0) - (n * gain**2).sum(0), 0) / np.maximum(n.sum() - len(reported), 1)
    noise = variance / n
    between = np.maximum(gain.var(0, ddof=1) - noise.mean(0), 0.0)
    weight = np.divide(between, between + noise, out=np.zeros_like(gain), where=between + noise > 0)
    return np.asarray(mean + weight * (gain - mean))
