"""Optimisers over a stack of C clients: the slice of each client changes exactly as if it were trained alone.

The state of an optimiser is elementwise, so it can be stacked. Clients have unequal numbers of batches, so steps are
counted per client, and a client without data in a step is left unchanged: neither its weights decay nor does its
momentum.

The parameters of all names lie side by side in one matrix ``[C, P]``. A step is then about 35 operations, however many
names and clients there are, and none of them waits for a result of the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sylva_ray.config.training import TrainingSection
from sylva_ray.core.lazy import torch, without_gradients
from sylva_ray.core.types import ParameterStack

MAX_ELEMENTS = 2**26
"""Elements of one matrix, at most, unless a single parameter has more: it bounds the memory of intermediate results."""


def clip_per_client(gradients: Sequence[torch.Tensor], max_norm: float) -> None:
    """Scale the gradient of each client to a norm of at most ``max_norm``, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        gradients: matrices ``[C, P]``, which are changed in place; the norm is that of a client's rows in all of them.
        max_norm: of a client's gradient.
    """
    norms_C = torch.stack([torch.linalg.vector_norm(g_CP, dim=1) for g_CP in gradients]).norm(dim=0)
    scale_C1 = (max_norm / (norms_C + 1e-6)).clamp(max=1.0)[:, None]
    for g_CP in gradients:
        g_CP.mul_(scale_C1)


@dataclass(frozen=True)
class Piece:
    """Where one parameter lies in a matrix.

    Attributes:
        name: of the parameter.
        shape: ``[C, ...]``.
        is_transposed: whether the last two axes are swapped in the matrix, as in the memory of the gradient, which then
            need not be rearranged in every step.
    """

    name: str
    shape: torch.Size
    is_transposed: bool

    @staticmethod
    def of(name: str, gradient: torch.Tensor) -> Piece:
        """Return the piece for a parameter with such gradients."""
        is_transposed = gradient.ndim == 3 and not gradient.is_contiguous() and gradient.mT.is_contiguous()
        return Piece(name, gradient.shape, is_transposed)

    @property
    def num_columns(self) -> int:
        """Elements of one client."""
        return math.prod(self.shape[1:])

    def flat(self, value: torch.Tensor) -> torch.Tensor:
        """Arrange ``[C, ...]`` as columns of the matrix."""
        return (value.mT if self.is_transposed else value).reshape(len(value), -1)

    def view(self, columns: torch.Tensor) -> torch.Tensor:
        """Return columns of the matrix as the parameter ``[C, ...]``, without a copy."""
        if not self.is_transposed:
            return columns.view(self.shape)
        count, rows, width = self.shape
        return columns.view(count, width, rows).mT


class Matrix:
    """Some parameters of C clients and their momenta, each as one matrix ``[C, P]``.

    Args:
        pieces: of the parameters.
        params: whose values in the names of ``pieces`` become views of ``values``.
        masks: ``{name: [C] bool}``, which rows may change; None: all.
        adamw: whether the optimiser needs the mean of the squares.

    Attributes:
        values: of the parameters.
        momentum: the mean of the gradients.
        second: the mean of their squares; empty unless it is needed.
        may_change: ``[C, P] bool``; None: all may.
    """

    def __init__(
        self, pieces: Sequence[Piece], params: ParameterStack, masks: Mapping[str, torch.Tensor] | None, adamw: bool
    ) -> None:
        self.pieces = pieces
        self.values = self.joined(params)
        self.momentum = torch.zeros_like(self.values)
        self.second = torch.zeros_like(self.values) if adamw else self.values.new_zeros(0)
        widths = [piece.num_columns for piece in pieces]
        for piece, columns in zip(pieces, self.values.split(widths, dim=1), strict=True):
            params[piece.name] = piece.view(columns)
        self.may_change: torch.Tensor | None = None
        if masks is not None:
            rows = [masks[p.name][:, None].expand(-1, width) for p, width in zip(pieces, widths, strict=True)]
            self.may_change = torch.cat(rows, dim=1)

    def joined(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Copy ``{name: [C, ...]}`` to a matrix."""
        return torch.cat([piece.flat(values[piece.name]) for piece in self.pieces], dim=1)


class StackedOptimizer:
    """AdamW (Loshchilov and Hutter 2019), or SGD with momentum 0.9 and decoupled decay, as computed by `torch.optim`.

    Args:
        params: of C clients, changed in place: in the first step, the values in the dictionary become views of the
            optimiser's matrices.
        training: names the optimiser, its weight decay and the largest norm of a client's gradient.
        lr: learning rate.
        masks: ``{name: [C] bool}``, the parameters of clients that may change; the others keep their bits and do not
            count in the norm. None: all may.
    """

    BETAS = (0.9, 0.999)
    EPS = 1e-8
    MOMENTUM = 0.9

    def __init__(
        self,
        params: ParameterStack,
        training: TrainingSection,
        lr: float,
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.params, self.training, self.lr, self.masks = params, training, lr, masks
        self.adamw = training.optimizer == "adamw"
        first = next(iter(params.values()))
        self.steps_C1 = torch.zeros(len(first), 1, dtype=torch.float64, device=first.device)
        self.matrices: list[Matrix] = []

    @without_gradients
    def step(self, gradients: Mapping[str, torch.Tensor], active_C: torch.Tensor) -> None:
        """Update parameters in place.

        Args:
            gradients: of the parameters to update, ``{name: [C, ...]}``, in every step the same names.
            active_C: the clients to update, ``[C] bool``, on the device of the parameters.
        """
        if not self.matrices:
            self.matrices = [Matrix(pieces, self.params, self.masks, self.adamw) for pieces in _grouped(gradients)]
        assert len(gradients) == sum(len(matrix.pieces) for matrix in self.matrices), "other names than before"
        active_C1 = active_C[:, None]
        joined = [matrix.joined(gradients) for matrix in self.matrices]
        for matrix, g_CP in zip(self.matrices, joined, strict=True):
            # A gradient of zero, not one that is multiplied by zero: it may be infinite where nothing may change.
            g_CP.masked_fill_(~(active_C1 if matrix.may_change is None else active_C1 & matrix.may_change), 0.0)
        if self.training.clip_norm is not None:
            clip_per_client(joined, self.training.clip_norm)
        self.steps_C1 += active_C1
        for matrix, g_CP in zip(self.matrices, joined, strict=True):
            moved_C1 = active_C1.to(g_CP.dtype)
            moved = moved_C1 if matrix.may_change is None else moved_C1 * matrix.may_change
            matrix.values.mul_(1 - self.lr * self.training.weight_decay * moved)
            if self.adamw:
                self._adamw(matrix, g_CP, moved_C1)
            else:
                matrix.momentum.mul_(self.MOMENTUM**moved_C1).add_(g_CP)
                matrix.values.addcmul_(matrix.momentum, moved_C1, value=-self.lr)

    def _adamw(self, matrix: Matrix, g_CP: torch.Tensor, moved_C1: torch.Tensor) -> None:
        """Move by AdamW the clients where ``moved_C1`` is 1; where it is 0, values and momenta keep their bits."""
        beta1, beta2 = self.BETAS
        steps_C1 = self.steps_C1.clamp(min=1)
        correction_C1 = (1 - beta2**steps_C1).sqrt().to(g_CP.dtype)
        rate_C1 = (self.lr / (1 - beta1**steps_C1)).to(g_CP.dtype) * moved_C1
        matrix.momentum.lerp_(g_CP, (1 - beta1) * moved_C1)
        matrix.second.mul_(beta2**moved_C1).addcmul_(g_CP, g_CP, value=1 - beta2)
        denominator = matrix.second.sqrt().div_(correction_C1).add_(self.EPS)
        matrix.values.sub_(torch.div(matrix.momentum, denominator, out=denominator).mul_(rate_C1))


def _grouped(gradients: Mapping[str, torch.Tensor]) -> list[list[Piece]]:
    """Divide the parameters among matrices of at most `MAX_ELEMENTS`, in the order of their names."""
    groups: list[list[Piece]] = []
    total = MAX_ELEMENTS + 1
    for name, gradient in gradients.items():
        total += gradient.numel()
        if total > MAX_ELEMENTS:
            groups.append([])
            total = gradient.numel()
        groups[-1].append(Piece.of(name, gradient))
    return groups
