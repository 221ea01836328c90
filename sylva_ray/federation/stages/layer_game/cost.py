"""What the layer game costs against phase 1, counted in blocks that one image passes.

A forward pass of one image costs as many as the model has blocks, a gradient twice as many. Counts instead of seconds
are the same on every machine, so that the choice of the coalitions is, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.federation.method import Method

IMAGE_SETS = 3
"""Sets of images on which coalitions are evaluated: benign, and attacked against theta^r and against theta^b."""


def crafting_steps(config: ExperimentConfig, algorithm: Method) -> int:
    """Return the gradients that the attack on a training image takes; 0 if nothing is attacked."""
    return config.attack.spec().steps if algorithm.is_adversarial and config.attack.epsilon > 0 else 0


def phase1_cost(config: ExperimentConfig, algorithm: Method, sizes: Sequence[int], num_blocks: int) -> int:
    """Return the cost of training all clients in phase 1.

    Args:
        config: the experiment.
        algorithm: the method.
        sizes: training images of the K clients.
        num_blocks: of the model.
    """
    training, parameters, images = config.training, algorithm.parameters, sum(sizes)
    attended = (training.clients_per_round or len(sizes)) / len(sizes)
    epochs = training.rounds * training.local_epochs * attended + parameters.final_local_epochs
    gradients = 1 + crafting_steps(config, algorithm)
    return round(images * num_blocks * (2 * gradients * epochs + 2 * parameters.head_warmup_epochs))


def game_cost(coalitions: np.ndarray, num_images: Sequence[int], is_chain: bool) -> int:
    """Return the cost of evaluating coalitions for all clients.

    Args:
        coalitions: ``[m, n] bool``, the head last.
        num_images: selection images of the K clients.
        is_chain: whether coalitions that begin alike share the blocks of their beginning.
    """
    return IMAGE_SETS * sum(num_images) * block_evaluations(coalitions, is_chain)


def block_evaluations(coalitions: np.ndarray, is_chain: bool) -> int:
    """Return how many blocks an image passes: one per different beginning of the coalitions.

    >>> block_evaluations(np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 1]], bool), is_chain=True)
    5
    """
    num_blocks = int(coalitions.shape[1]) - 1
    if not is_chain:
        return len(coalitions) * num_blocks
    return sum(len(np.unique(coalitions[:, :level], axis=0)) for level in range(1, num_blocks + 1))
