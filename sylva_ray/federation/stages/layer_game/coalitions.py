"""Values of coalitions S: the layers in S take their adapters from theta^b, the others from theta^r.

The adapters of a layer change only what comes after it, so coalitions that agree on the first l layers share all
activations up to there. Evaluating the tree of prefixes takes 2^(L+1) - 2 block evaluations for all 2^L coalitions of L
blocks instead of L 2^L. Siblings run as one stack. A stack of more than ``max_stack`` images is split and evaluated
depth first, which bounds the memory and does not change the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sylva_ray.attacks.losses import true_class_probability
from sylva_ray.core.lazy import torch, without_gradients
from sylva_ray.core.types import ParameterStack
from sylva_ray.models.cohort import repeat_owner

if TYPE_CHECKING:
    from sylva_ray.models.lora import LoraStack


def mix(
    robust: ParameterStack, benign: ParameterStack, coalitions: np.ndarray, players: dict[str, tuple[str, ...]]
) -> ParameterStack:
    """Return theta_S of C clients: the players in S come from theta^b, the others from theta^r.

    Values are copied: the empty coalition is theta^r and the full one theta^b, bit for bit.

    Args:
        robust: theta^r, each parameter ``[C, ...]``.
        benign: theta^b, likewise.
        coalitions: ``[C, n] bool``, the S of each client.
        players: ``{player: its parameter names}``, n in all.

    Returns:
        The parameters of the players, each ``[C, ...]``.
    """
    mixed = {}
    for player, names in enumerate(players.values()):
        chosen = torch.from_numpy(coalitions[:, player])
        for name in names:
            rows = chosen.to(robust[name].device).view(-1, *[1] * (robust[name].ndim - 1))
            mixed[name] = torch.where(rows, benign[name], robust[name])
    return mixed


@dataclass
class CoalitionWalk:
    """The evaluation of one client's coalitions on one set of images.

    Attributes:
        model: of the client.
        pair: theta^r and theta^b as a stack of two.
        coalitions: ``[m, n] bool``.
        x: images ``[N, 3, H, W]``.
        y: labels ``[N]``.
        max_stack: images times coalitions in one forward.
        block_evaluations: after `run`, blocks times prefixes that were evaluated.
    """

    model: LoraStack
    pair: ParameterStack
    coalitions: np.ndarray
    x: torch.Tensor
    y: torch.Tensor
    max_stack: int
    block_evaluations: int = 0

    @without_gradients
    def run(self) -> np.ndarray:
        """Return the probability of the true class for every coalition and image, ``[m, N] float64``."""
        self.probabilities = np.zeros((len(self.coalitions), len(self.y)))
        if self.model.num_blocks is None:
            self._whole_forwards()
        else:
            tokens = self.model.embed(self.x)
            self._descend(0, tokens[None], [np.arange(len(self.coalitions))])
        return self.probabilities

    def _descend(self, level: int, tokens_PNTd: torch.Tensor, members: Sequence[np.ndarray]) -> None:
        """Evaluate coalitions from the tokens of P prefixes after ``level`` blocks; ``members[p]`` share prefix p."""
        children = [
            (bit, parent, own)
            for bit in (False, True)
            for parent, group in enumerate(members)
            if len(own := group[self.coalitions[group, level] == bit])
        ]
        num_images = len(self.y)
        fits = max(1, self.max_stack // num_images)
        for first in range(0, len(children), fits):
            bits, parents, groups = zip(*children[first : first + fits], strict=True)
            counts = [num_images * bits.count(False), num_images * bits.count(True)]
            flat = tokens_PNTd[list(parents)].flatten(0, 1)
            if level == self.model.num_blocks:
                logits = self.model.classify(self.pair, flat, repeat_owner(counts))
                p = true_class_probability(logits, self.y.repeat(len(groups))).view(len(groups), num_images)
                for group, row in zip(groups, p.double().cpu().numpy(), strict=True):
                    self.probabilities[group] = row
            else:
                after = self.model.run_block(level, self.pair, flat, repeat_owner(counts))
                self.block_evaluations += len(groups)
                self._descend(level + 1, after.reshape(len(groups), num_images, *after.shape[1:]), groups)

    def _whole_forwards(self) -> None:
        """Evaluate coalitions as a stack of whole models, for architectures that are not a plain chain of blocks."""
        players = self.model.players
        num_images = len(self.y)
        for first in range(0, len(self.coalitions), max(1, self.max_stack // num_images)):
            rows = self.coalitions[first : first + max(1, self.max_stack // num_images)]
            stacked = {name: value[:, None].expand(2, len(rows), *value.shape[1:]) for name, value in self.pair.items()}
            mixed = mix({k: v[0] for k, v in stacked.items()}, {k: v[1] for k, v in stacked.items()}, rows, players)
            logits = self.model.forward(
                mixed, self.x.repeat(len(rows), 1, 1, 1), repeat_owner([num_images] * len(rows))
            )
            p = true_class_probability(logits, self.y.repeat(len(rows))).view(len(rows), num_images)
            self.probabilities[first : first + len(rows)] = p.double().cpu().numpy()
            self.block_evaluations += len(rows) * (len(players) - 1)
