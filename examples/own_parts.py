"""A data set and a partition of one's own: striped images, of which a client mostly has one class.

sylva-ray run digits --import . dataset.name=examples.own_parts:stripes partition.kind=examples.own_parts:by_class
"""

from __future__ import annotations

import numpy as np

from sylva_ray.config.data import PartitionSection

SIDE, CLASSES = 32, 4


class Stripes:
    """Images of stripes, whose class is their direction; as a `torch.utils.data.Dataset` has pairs (image, label).

    Attributes:
        targets: the classes; with them, no image is made only to read its label.
    """

    classes = ("horizontal", "vertical", "rising", "falling")

    def __init__(self, num_images: int, seed: int) -> None:
        self.targets = np.arange(num_images) % CLASSES
        self._seed = seed

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        draw = np.random.default_rng([self._seed, row])
        y, x = np.mgrid[:SIDE, :SIDE]
        along = (y, x, x + y, x - y)[self.targets[row]]
        waves = 127 + 90 * np.sin(along / draw.uniform(1.5, 3.0) + draw.uniform(0, 6))
        noisy = waves[..., None] + draw.normal(0, 20, (SIDE, SIDE, 3))
        return noisy.clip(0, 255).astype(np.uint8), int(self.targets[row])


def stripes() -> tuple[Stripes, Stripes]:
    """Return the training half and the test half."""
    return Stripes(600, seed=0), Stripes(200, seed=1)


def by_class(labels: np.ndarray, section: PartitionSection, rng: np.random.Generator) -> np.ndarray:
    """Give each client the images of one class in nine of ten cases, and of any class otherwise."""
    own = labels % section.num_clients
    anybody = rng.integers(section.num_clients, size=len(labels))
    return np.where(rng.random(len(labels)) < 0.9, own, anybody)
