"""Which candidate a client should take, from how much its held-out score rose.

A client has few held-out images, and a fleet has many. What a client measured is therefore shrunk towards the mean of
the fleet, the more the fewer images it has: with few, all clients take what is best for the fleet; with many, each
takes what is best for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Gains:
    """What one client reports: by how much the scores of m candidates exceed the score of its present model.

    Attributes:
        means: ``[m]``, of the differences over the images.
        num_images: held-out images.
    """

    means: np.ndarray
    num_images: int


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
    differences = np.stack([(after.astype(float) - before).mean(0) for after in candidates])
    return Gains(differences @ (weights / weights.sum()), len(labels))


def shrunk_gains(reported: Sequence[Gains], strength: float) -> np.ndarray:
    """Return the gains of every client and candidate, shrunk towards the means over clients, ``[K, m]``.

    Args:
        reported: by every client.
        strength: number of images at which the client's gain and the mean have equal weights.
    """
    gains: np.ndarray = np.stack([own.means for own in reported])
    n = np.array([own.num_images for own in reported], float)[:, None]
    weight = n / (n + strength)
    return np.asarray(weight * gains + (1 - weight) * gains.mean(0))
