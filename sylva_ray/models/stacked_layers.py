"""Layers of C models in one: what differs between clients is batched over C, what is frozen is computed once.

A layer finds the parameters of the C clients and the layout of the images in `StackInputs`, which all layers share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ParameterStack
from sylva_ray.models.cohort import num_clients


@dataclass(frozen=True)
class OwnerLayout:
    """How a flat batch, sorted by owner, becomes ``[C, rows, d]``.

    It is a view if all clients own equally many images, and padded with zeros otherwise.

    Attributes:
        num_clients: C.
        widest: images of the client with the most.
        slots: ``[N]``, each image's place in the padded batch; None if nothing is padded.
    """

    num_clients: int
    widest: int
    slots: torch.Tensor | None

    @staticmethod
    def from_owner(owner: torch.Tensor, num_clients: int, device: torch.device) -> OwnerLayout:
        """Make the layout of a sorted owner vector ``[N]``, which is on the CPU; ``device`` is the images'."""
        owners = owner.numpy()
        counts = np.bincount(owners, minlength=num_clients)
        widest = int(counts.max())
        if int(counts.min()) == widest:
            return OwnerLayout(num_clients, widest, None)
        first = counts.cumsum() - counts
        slots = torch.from_numpy(owners * widest + np.arange(len(owners)) - first[owners])
        return OwnerLayout(num_clients, widest, slots.to(device, non_blocking=True))

    def pad(self, x_Nd: torch.Tensor) -> torch.Tensor:
        """Arrange ``[N, ..., d]`` as ``[C, rows, d]``."""
        if self.slots is not None:
            padded = x_Nd.new_zeros((self.num_clients * self.widest, *x_Nd.shape[1:]))
            x_Nd = padded.index_copy(0, self.slots, x_Nd)
        return x_Nd.reshape(self.num_clients, -1, x_Nd.shape[-1])

    def unpad(self, x_Crd: torch.Tensor, inner: tuple[int, ...]) -> torch.Tensor:
        """Arrange ``[C, rows, d]`` as ``[N, *inner, d]``, without the padding."""
        flat = x_Crd.reshape(self.num_clients * self.widest, *inner, x_Crd.shape[-1])
        return flat if self.slots is None else flat.index_select(0, self.slots)


class StackInputs:
    """What the stacked layers read during a forward pass.

    Attributes:
        params: ``{name: [C, ...]}``.
        layout: of the images.
        num_images: N.
    """

    def __init__(self) -> None:
        self.params: ParameterStack = {}
        self.layout: OwnerLayout | None = None
        self.num_images = 0
        self._layout_of: tuple[torch.Tensor, int, torch.device] | None = None
        self._prepared: dict[tuple[str, torch.dtype], tuple[torch.Tensor, int, torch.Tensor]] = {}

    def set(self, params: ParameterStack, owner: torch.Tensor, device: torch.device) -> None:
        """Set what the next forward reads; the layout of the same owners, as in the steps of an attack, is kept."""
        self.params, self.num_images = params, len(owner)
        clients = num_clients(params)
        known = self._layout_of
        if known is None or known[0] is not owner or known[1:] != (clients, device):
            self.layout = OwnerLayout.from_owner(owner, clients, device)
            self._layout_of = owner, clients, device

    def prepared(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return a factor in a precision, with its last two axes exchanged.

        What needs no gradient, as all factors during an attack, is prepared once and kept until it changes.
        """
        value = self.params[name]
        key = name, dtype
        known = self._prepared.get(key)
        if known is not None and known[0] is value and known[1] == value._version:
            return known[2]
        prepared = value.to(dtype).mT
        if value.requires_grad:
            self._prepared.pop(key, None)
        else:
            self._prepared[key] = value, value._version, prepared
        return prepared

    def in_forward(self) -> OwnerLayout:
        """Return the layout of the images of the present forward pass."""
        assert self.layout is not None, "a stacked layer was called outside LoraStack"
        return self.layout


class StackedUpdate(nn.Module):
    """A frozen layer plus C low-rank updates of its weight.

    Args:
        base: the frozen layer.
        name: its name in the model.
        scaling: alpha / r.
        inputs: parameters and layout, shared by all stacked layers.
    """

    def __init__(self, base: nn.Module, name: str, scaling: float, inputs: StackInputs) -> None:
        super().__init__()
        self.base = base
        self.name, self.scaling, self.inputs = name, scaling, inputs

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B transposed, ``[C, d_in, r]`` and ``[C, r, d_out]``."""
        a_Cdr, b_Crd = (self.inputs.prepared(f"{self.name}.lora_{factor}", dtype) for factor in "AB")
        return a_Cdr, b_Crd


class StackedLora(StackedUpdate):
    """A frozen linear layer plus C low-rank updates."""

    @property
    def weight(self) -> torch.Tensor:
        """The weight of a linear layer, which does not exist here: it differs from client to client.

        Raises:
            UserError: always. The attention of BEiT, for example, reads this weight instead of calling the layer, so
                that an adapter has no effect, in PEFT neither.
        """
        fix = (
            "the model reads the weights of this layer instead of calling it, so an adapter has no effect: leave it out"
        )
        raise UserError("lora.target_modules", self.name, fix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer for rows of all images."""
        layout, base = self.inputs.in_forward(), self.base
        assert isinstance(base, nn.Linear)
        a_Cdr, b_Crd = self.factors(x.dtype)
        # Windowed attention puts windows into the batch; the rows of an image stay together, so they can be regrouped.
        rows = x.reshape(self.inputs.num_images, -1, x.shape[-1])
        if type(base).forward is nn.Linear.forward:
            y: torch.Tensor = LinearWithUpdates.apply(rows, base.weight, base.bias, a_Cdr, b_Crd, self.scaling, layout)
            return y.reshape(*x.shape[:-1], -1)
        frozen: torch.Tensor = base(x)  # a subclass, which may compute something else
        update = layout.unpad(layout.pad(rows) @ a_Cdr @ b_Crd, (rows.shape[1],)).reshape(frozen.shape)
        return torch.add(frozen, update, alpha=self.scaling)


class LinearWithUpdates(torch.autograd.Function):
    """A frozen linear layer plus C low-rank updates of its weight: ``x W^T + bias + s (x A) B``.

    The low-rank product is added in place to the output, and to the gradient of the images: without padding inside the
    kernel that computes and scales it. Composed of torch's functions, both would need further passes over tensors of
    the size of the activations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_Ntd: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a_Cdr: torch.Tensor,
        b_Crd: torch.Tensor,
        scaling: float,
        layout: OwnerLayout,
    ) -> torch.Tensor:
        """Return ``[N, t, d_out]``.

        Args:
            ctx: keeps what the gradients need.
            x_Ntd: ``[N, t, d_in]``, t rows of every image.
            weight: ``[d_out, d_in]``, without a gradient.
            bias: ``[d_out]``, likewise.
            a_Cdr: ``[C, d_in, r]``.
            b_Crd: ``[C, r, d_out]``.
            scaling: s.
            layout: of the images.
        """
        low_rank = layout.pad(x_Ntd) @ a_Cdr
        by_a, by_b = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(x_Ntd if by_a else None, weight, a_Cdr, b_Crd, low_rank if by_b else None)
        ctx.scaling, ctx.layout = scaling, layout
        return _add_product(F.linear(x_Ntd, weight, bias), low_rank, b_Crd, scaling, layout)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of images and factors, as far as they are needed."""
        (gradient,) = gradients
        x_Ntd, weight, a_Cdr, b_Crd, low_rank = ctx.saved_tensors
        by_x, _, _, by_a, by_b, *_ = ctx.needs_input_grad
        scaling, layout = ctx.scaling, ctx.layout
        padded = layout.pad(gradient)
        by_low_rank = padded @ b_Crd.mT
        return (
            _add_product(gradient @ weight, by_low_rank, a_Cdr.mT, scaling, layout) if by_x else None,
            None,
            None,
            _scaled_product(layout.pad(x_Ntd).mT, by_low_rank, scaling) if by_a else None,
            _scaled_product(low_rank.mT, padded, scaling) if by_b else None,
            None,
            None,
        )


def _add_product(
    sums_Ntd: torch.Tensor, low_rank: torch.Tensor, factor: torch.Tensor, scaling: float, layout: OwnerLayout
) -> torch.Tensor:
    """Add ``scaling low_rank factor`` of C clients, ``[C, rows, r]`` and ``[C, r, d]``, to contiguous ``[N, t, d]``."""
    if layout.slots is None:
        sums_Ntd.view(*low_rank.shape[:2], -1).baddbmm_(low_rank, factor, alpha=scaling)
        return sums_Ntd
    return sums_Ntd.add_(layout.unpad(low_rank @ factor, sums_Ntd.shape[1:2]), alpha=scaling)


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return ``scaling a b`` of two stacks of matrices, in one kernel."""
    nothing = a.new_empty(a.shape[0], a.shape[1], b.shape[2])  # not read, since beta is 0
    return torch.baddbmm(nothing, a, b, beta=0, alpha=scaling)


class StackedConvLora(StackedUpdate):
    """A frozen convolution plus C low-rank updates, which PEFT computes as two convolutions.

    The first has the kernel, stride and padding of the frozen one and r output channels (A), the second is one by one
    (B). A is ``[r, in_channels * height * width]`` here, so that ``B A`` is the update of the kernel as a matrix.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer for all images ``[N, in_channels, H, W]``."""
        layout, base = self.inputs.in_forward(), self.base
        assert isinstance(base, nn.Conv2d)
        frozen: torch.Tensor = base(x)
        patches = F.unfold(x, base.kernel_size, base.dilation, base.padding, base.stride)  # type: ignore[arg-type]
        rows = patches.transpose(1, 2)
        a_Cdr, b_Crd = self.factors(x.dtype)
        update = layout.unpad(layout.pad(rows) @ a_Cdr @ b_Crd, (rows.shape[1],))
        return torch.add(frozen, update.transpose(1, 2).reshape(frozen.shape), alpha=self.scaling)


class StackedNorm(nn.Module):
    """A layer normalisation with C weights and biases, computed in their precision.

    Args:
        base: the layer normalisation, whose own weight and bias are not used.
        name: its name in the model.
        inputs: parameters and layout, shared by all stacked layers.
    """

    def __init__(self, base: nn.LayerNorm, name: str, inputs: StackInputs) -> None:
        super().__init__()
        self.shape, self.eps = base.normalized_shape, base.eps
        self.name, self.inputs = name, inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of rows of all images."""
        layout = self.inputs.in_forward()
        weight_Cd, bias_Cd = self.inputs.params[f"{self.name}.weight"], self.inputs.params[f"{self.name}.bias"]
        rows = F.layer_norm(x, self.shape, eps=self.eps).reshape(self.inputs.num_images, -1, x.shape[-1])
        scaled = layout.pad(rows).to(weight_Cd.dtype) * weight_Cd[:, None] + bias_Cd[:, None]
        return layout.unpad(scaled, (rows.shape[1],)).reshape(x.shape).to(x.dtype)


class StackedHead(nn.Module):
    """C linear classifiers, computed in the precision of their parameters.

    Args:
        name: of the classifier in the model.
        inputs: parameters and layout, shared by all stacked layers.
    """

    def __init__(self, name: str, inputs: StackInputs) -> None:
        super().__init__()
        self.name, self.inputs = name, inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[N, num_classes]`` of features ``[N, d]``."""
        layout = self.inputs.in_forward()
        weight, bias = self.inputs.params[f"{self.name}.weight"], self.inputs.params[f"{self.name}.bias"]
        return layout.unpad(layout.pad(x.to(weight.dtype)) @ weight.transpose(1, 2) + bias[:, None], ())
