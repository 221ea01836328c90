"""Values of coalitions S: the layers in S take their adapters from theta^b, the others from theta^r.

The adapters of a layer change only what comes after it, so coalitions that agree on the first l layers share all
activations up to there. Evaluating the tree of prefixes takes 2^(L+1) - 2 block evaluations for all 2^L coalitions of L
blocks instead of L 2^L. Siblings run as one stack. A stack of more than ``max_stack`` images is split and evaluated
depth first, which bounds the memory and does not change the values: no tokens are kept that are not needed any more, so
that at most L + 1 stacks of tokens exist at once, besides those of the images themselves.
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
        max_stack: images times coalitions in one forward; images beyond it are evaluated in turn.
        block_evaluations: after `run`, blocks times prefixes that were evaluated, which are the same for every image.
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
        parts = []
        for first in range(0, len(self.y), self.max_stack):
            rows = slice(first, first + self.max_stack)
            self.block_evaluations = 0
            parts.append(self._evaluate(self.x[rows], self.y[rows]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _evaluate(self, x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
        """Evaluate images that fit a stack."""
        probabilities = np.zeros((len(self.coalitions), len(y)))
        if self.model.num_blocks is None:
            self._whole_forwards(x, y, probabilities)
            return probabilities
        fits = max(1, self.max_stack // len(y))
        path = [_Prefixes(0, self.model.embed(x)[None], [np.arange(len(self.coalitions))], self.coalitions, fits)]
        while path:
            node = path[-1]
            bits, groups, flat = node.next_stack()
            if not node.children:  # its tokens are not needed any more
                path.pop()
            owner = repeat_owner([len(y) * bits.count(False), len(y) * bits.count(True)])
            if node.level == self.model.num_blocks:
                logits = self.model.classify(self.pair, flat, owner)
                p = true_class_probability(logits, y.repeat(len(groups))).view(len(groups), len(y))
                for group, row in zip(groups, p.double().cpu().numpy(), strict=True):
                    probabilities[group] = row
                continue
            level = node.level
            del node
            after = self.model.run_block(level, self.pair, flat, owner)
            del flat
            self.block_evaluations += len(groups)
            tokens = after.reshape(len(groups), len(y), *after.shape[1:])
            del after
            path.append(_Prefixes(level + 1, tokens, groups, self.coalitions, fits))
            del tokens
        return probabilities

    def _whole_forwards(self, x: torch.Tensor, y: torch.Tensor, probabilities: np.ndarray) -> None:
        """Evaluate coalitions as a stack of whole models, for architectures that are not a plain chain of blocks."""
        players = self.model.players
        num_images = len(y)
        for first in range(0, len(self.coalitions), max(1, self.max_stack // num_images)):
            rows = self.coalitions[first : first + max(1, self.max_stack // num_images)]
            stacked = {name: value[:, None].expand(2, len(rows), *value.shape[1:]) for name, value in self.pair.items()}
            mixed = mix({k: v[0] for k, v in stacked.items()}, {k: v[1] for k, v in stacked.items()}, rows, players)
            logits = self.model.forward(mixed, x.repeat(len(rows), 1, 1, 1), repeat_owner([num_images] * len(rows)))
            p = true_class_probability(logits, y.repeat(len(rows))).view(len(rows), num_images)
            probabilities[first : first + len(rows)] = p.double().cpu().numpy()
            self.block_evaluations += len(rows) * (len(players) - 1)


class _Prefixes:
    """Prefixes of coalitions that have passed the same blocks.

    Args:
        level: number of blocks that the prefixes have passed.
        tokens: of P prefixes after these blocks, ``[P, N, T, d]``.
        members: the coalitions that begin with each prefix.
        coalitions: all of them, ``[m, n] bool``.
        fits: children in one stack.

    Attributes:
        children: those that were not evaluated yet, ``(bit, prefix, coalitions)``.
    """

    def __init__(
        self, level: int, tokens: torch.Tensor, members: Sequence[np.ndarray], coalitions: np.ndarray, fits: int
    ) -> None:
        self.level, self.tokens_PNTd, self.fits = level, tokens, fits
        self.children = [
            (bit, parent, own)
            for bit in (False, True)
            for parent, group in enumerate(members)
            if len(own := group[coalitions[group, level] == bit])
        ]

    def next_stack(self) -> tuple[list[bool], list[np.ndarray], torch.Tensor]:
        """Return the next children: their bits, their coalitions, and copies of their prefixes' tokens, flat."""
        stack, self.children = self.children[: self.fits], self.children[self.fits :]
        bits, parents, groups = zip(*stack, strict=True)
        return list(bits), list(groups), self.tokens_PNTd[list(parents)].flatten(0, 1)
