"""Byzantine attacks: what malicious clients upload in place of their own update, array by array.

One class per attack. All of them know every honest update of the round.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Collusion:
    """What the malicious clients of a round know beside the updates.

    Attributes:
        num_clients: n, the clients that upload, honest or not.
        num_byzantine: f, how many of them are malicious.
        rng: for noise.
        strength: ``byzantine.strength``; None: the default of the attack.
    """

    num_clients: int
    num_byzantine: int
    rng: np.random.Generator
    strength: float | None

    def strength_or(self, default: float) -> float:
        """Return the strength, or the default of an attack."""
        return default if self.strength is None else self.strength


class ByzantineAttack(ABC):
    """An attack on the aggregation."""

    name: ClassVar[str]
    """Value of ``byzantine.attack``."""
    takes_strength: ClassVar[bool] = False
    """Whether ``byzantine.strength`` has an effect."""
    flips_labels: ClassVar[bool] = False
    """Whether malicious clients train on flipped labels (`flip_labels`)."""

    @abstractmethod
    def update(self, own: np.ndarray, honest: np.ndarray, collusion: Collusion) -> np.ndarray:
        """Return the malicious update of one array.

        Args:
            own: the update that the client would have uploaded had it been honest.
            honest: the honest updates, ``[m, *own.shape] float64``.
            collusion: what else the malicious clients know.
        """


class SignFlip(ByzantineAttack):
    """-c own, c = 1 by default."""

    name = "sign_flip"
    takes_strength = True

    def update(self, own: np.ndarray, honest: np.ndarray, collusion: Collusion) -> np.ndarray:
        """See `ByzantineAttack.update`."""
        del honest
        return np.asarray(-collusion.strength_or(1.0) * own)


class Gaussian(ByzantineAttack):
    """N(0, (c s)^2), c = 10 by default, s the standard deviation of all honest entries of the array.

    Blanchard et al. 2017 send noise of a fixed, large size.
    """

    name = "gaussian"
    takes_strength = True

    def update(self, own: np.ndarray, honest: np.ndarray, collusion: Collusion) -> np.ndarray:
        """See `ByzantineAttack.update`."""
        return collusion.rng.normal(0, collusion.strength_or(10.0) * honest.std(), own.shape)


class LabelFlip(ByzantineAttack):
    """The update itself is left as it is: the attack is in the training data."""

    name = "label_flip"
    flips_labels = True

    def update(self, own: np.ndarray, honest: np.ndarray, collusion: Collusion) -> np.ndarray:
        """See `ByzantineAttack.update`."""
        del honest, collusion
        return own


class Alie(ByzantineAttack):
    """Mean - z standard deviations per coordinate, which hides among the honest updates; z from `alie_z` by default.

    "A Little Is Enough", Baruch et al. 2019.
    """

    name = "alie"
    takes_strength = True

    def update(self, own: np.ndarray, honest: np.ndarray, collusion: Collusion) -> np.ndarray:
        """See `ByzantineAttack.update`."""
        del own
        z = collusion.strength_or(alie_z(collusion.num_clients, collusion.num_byzantine))
        return np.asarray(honest.mean(0) - z * honest.std(0))


class InnerProductManipulation(ByzantineAttack):
    """-eps mean, eps = 2 by default (Xie et al. 2020, whose subtle value is 0.1).

    It reverses the mean of all updates if ``eps f > n - f``.
    """

    name = "ipm"
    takes_strength = True

    def update(self, own: np.ndarray, honest: np.ndarray, collusion: Collusion) -> np.ndarray:
        """See `ByzantineAttack.update`."""
        del own
        return np.asarray(-collusion.strength_or(2.0) * honest.mean(0))


class Mimic(ByzantineAttack):
    """Every malicious client copies honest client 0, which then outweighs the honest clients that differ from it.

    Karimireddy et al. 2022 choose the copied client by the data.
    """

    name = "mimic"

    def update(self, own: np.ndarray, honest: np.ndarray, collusion: Collusion) -> np.ndarray:
        """See `ByzantineAttack.update`."""
        del own, collusion
        return np.asarray(honest[0])


class NotANumber(ByzantineAttack):
    """NaN in every entry, as from a broken client."""

    name = "nan"

    def update(self, own: np.ndarray, honest: np.ndarray, collusion: Collusion) -> np.ndarray:
        """See `ByzantineAttack.update`."""
        del honest, collusion
        return np.full(own.shape, np.nan)


BYZANTINE_ATTACKS: dict[str, ByzantineAttack] = {
    attack.name: attack()
    for attack in (SignFlip, Gaussian, LabelFlip, Alie, InnerProductManipulation, Mimic, NotANumber)
}
"""The attacks by name; ``byzantine.attack`` lists the same names."""


def alie_z(num_clients: int, num_byzantine: int) -> float:
    """Return by how many standard deviations a malicious update may differ from the mean and still look honest.

    To be in the majority the f attackers need ``s = floor(n/2 + 1) - f`` honest clients that are farther from the mean
    than they are: ``z = Phi^-1((n - f - s) / (n - f))`` (Baruch et al. 2019). This is 1.43 for 24 of 50 clients, but 0
    for 2 of 10. The result is at least 1, because otherwise a small federation would not be attacked at all.
    """
    from scipy.special import ndtri  # only this attack needs scipy

    honest = num_clients - num_byzantine
    supporters = max(1, num_clients // 2 + 1 - num_byzantine)
    return max(1.0, float(ndtri(max(0, honest - supporters) / honest))) if honest else 1.0


def flip_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return ``num_classes - 1 - labels``; the middle class of an odd number is unchanged."""
    return num_classes - 1 - labels
