"""Values of coalitions for one client, benign and robust, in windows that fit the memory."""

from __future__ import annotations

import numpy as np

from sylva_ray.core.failures import is_out_of_memory, release_memory
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import at_precision
from sylva_ray.core.types import ParameterStack
from sylva_ray.core.windows import WindowLimits
from sylva_ray.federation.stages.layer_game.client import Phase2Client, SelectionImages
from sylva_ray.federation.stages.layer_game.coalitions import CoalitionWalk


def coalition_values(
    player: Phase2Client,
    benign: ParameterStack,
    coalitions: np.ndarray,
    images: SelectionImages,
    client: int,
    precision: torch.dtype,
) -> tuple[np.ndarray, int]:
    """Evaluate coalitions of one client.

    Args:
        player: phase 2 of the cohort.
        benign: theta^b of the C clients.
        coalitions: ``[m, n] bool``.
        images: of the C clients.
        client: its position among them.
        precision: of the forwards.

    Returns:
        The mean probabilities of the true class, weighted, ``[m, 2]``: on benign images, and the smaller one of the two
        attacked copies of an image; and the blocks that were run per set of images.
    """
    is_own = (images.owner == client).to(images.x.device)
    pair = {name: torch.stack([value[client], benign[name][client]]) for name, value in player.robust.items()}
    walks = [
        CoalitionWalk(player.model, pair, coalitions, pixels[is_own], images.y[is_own], player.phase2.max_stack)
        for pixels in (images.x, *images.against)
    ]
    with at_precision(player.model, precision):
        clean, on_robust, on_benign = (_in_memory(walk, player.model.windows) for walk in walks)
    weights = images.weights[is_own].cpu().numpy()
    values = np.stack(
        [np.average(p, axis=1, weights=weights) for p in (clean, np.minimum(on_robust, on_benign))], axis=-1
    )
    return values, walks[0].block_evaluations


def _in_memory(walk: CoalitionWalk, limits: WindowLimits) -> np.ndarray:
    """Run a walk with stacks that fit the memory; if they do not, again with halves of its largest."""
    while True:
        walk.max_stack = min(walk.max_stack, limits.of("walk"))
        largest = min(walk.max_stack, len(walk.y) * len(walk.coalitions))
        limits.begin("walk", largest)
        try:
            return walk.run()
        except Exception as error:
            if not is_out_of_memory(error) or largest == 1:
                raise
        release_memory()
        limits.halve("walk", largest)
