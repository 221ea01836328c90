"""Mean and standard deviation of a quantity over runs that differ only by their seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SeedMean:
    """A quantity over several seeds.

    Attributes:
        mean: mean over the seeds.
        std: sample standard deviation; None for a single seed.
        num_seeds: number of seeds, at least 1.
    """

    mean: float
    std: float | None
    num_seeds: int

    @classmethod
    def from_values(cls, values: Iterable[float | None]) -> SeedMean | None:
        """Summarise one value per seed.

        Args:
            values: None where a seed has no value; it does not count.

        Returns:
            None if no seed has a value.

        >>> SeedMean.from_values([1.0, None, 3.0])
        SeedMean(mean=2.0, std=1.4142135623730951, num_seeds=2)
        """
        known = np.array([value for value in values if value is not None], float)
        if not len(known):
            return None
        return cls(float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else None, len(known))
