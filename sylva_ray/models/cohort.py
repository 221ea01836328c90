"""The one seam for compute: many clients in one forward.

Attacks, losses, clipping, optimiser, layer game and evaluation know only `CohortModel`. Behind it are

* `sylva_ray.models.lora.LoraStack`, the fast path: frozen backbone, C stacked adapters and heads;
* `FunctionalStack` here, for any timm module: every parameter belongs to the client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import torch
from torch.func import functional_call

from sylva_ray.config.experiment import AttentionKernels
from sylva_ray.core.types import ClientState, ParameterStack
from sylva_ray.models.backbone import Backbone
from sylva_ray.models.kernels import AttentionSwitch


class CohortModel(Protocol):
    """``forward(params {name: [C, ...]}, x [N, 3, H, W] in [0, 1], owner [N]) -> logits [N, num_classes] float32``.

    ``owner[i]`` in 0..C-1 says whose model sees image i. It lives on the CPU and is sorted; clients may own unequal numbers
    of images, or none. Nothing of one client's parameters reaches another client's images.
    """

    head_names: tuple[str, ...]
    precision: torch.dtype
    """Of the forwards: float32 (the arrays' own), or bfloat16. Logits and losses are float32 in either."""
    kernels: AttentionKernels
    """The attention kernel of each precision."""

    @property
    def num_attention_layers(self) -> int:
        """Layers that have a choice of kernel."""
        ...

    @property
    def image_size(self) -> int:
        """Side in pixels of what the model sees, whatever the images' own."""
        ...

    def initial_state(self, rng: torch.Generator) -> dict[str, np.ndarray]:
        """The state that every client starts from."""
        ...

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Logits of every image under its owner's parameters."""
        ...

    def trainable(self, name: str) -> bool:
        """Whether the optimiser may change this entry (running statistics of a BatchNorm are state, not parameters)."""
        ...

    def training(self) -> AbstractContextManager[None]:
        """Inside, forwards are those of a training step (BatchNorm uses and updates batch statistics, in ``params``)."""
        ...


def to_parameters(stack: Mapping[str, np.ndarray], device: torch.device | str, dtype: torch.dtype) -> ParameterStack:
    """``{name: [C, ...]}`` of numpy arrays (possibly read-only, from an object store) -> tensors of our own."""
    return {name: torch.tensor(value, device=device, dtype=dtype) for name, value in stack.items()}


def to_arrays(params: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The way back: detached float32 arrays that own their memory."""
    return {name: np.array(value.detach().cpu().float().numpy()) for name, value in params.items()}


class FunctionalStack:
    """Every parameter of any timm module, once per client (full-model baselines, CNN students).

    A loop over owners around `torch.func.functional_call`: exact by construction, and with full models the matrix products
    cannot be shared between clients anyway. Floating-point buffers (BatchNorm statistics) travel with the client.
    """

    def __init__(self, backbone: Backbone, precision: torch.dtype = torch.float32) -> None:
        self.backbone = backbone
        self.precision = precision
        self.kernels = AttentionKernels()
        self._attention = AttentionSwitch(backbone.model)
        head = backbone.head_name
        self.head_names: tuple[str, ...] = (f"{head}.weight", f"{head}.bias")
        self._parameters = dict(backbone.model.named_parameters())
        self._template = self._parameters | {
            name: buffer for name, buffer in backbone.model.named_buffers() if buffer.is_floating_point()
        }

    @property
    def num_attention_layers(self) -> int:
        """See `CohortModel`."""
        return len(self._attention)

    @property
    def image_size(self) -> int:
        """See `CohortModel`."""
        return self.backbone.image_size

    def initial_state(self, rng: torch.Generator) -> dict[str, np.ndarray]:
        """The backbone's weights with a freshly drawn head."""
        state: dict[str, np.ndarray] = {
            name: np.array(value.detach().cpu().numpy()) for name, value in self._template.items()
        }
        return state | initial_head(state[self.head_names[0]].shape, self.head_names, rng)

    def trainable(self, name: str) -> bool:
        """Parameters are; buffers are not."""
        return name in self._parameters

    @contextmanager
    def training(self) -> Iterator[None]:
        """Attacks, teachers and evaluation stay outside, in evaluation mode."""
        self.backbone.train()
        try:
            yield
        finally:
            self.backbone.eval()

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """See `CohortModel`."""
        pieces = []
        self._attention.use(self.kernels, self.precision)
        with torch.autocast(x.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            inputs = self.backbone.preprocess(x)
            counts = torch.bincount(owner, minlength=len(next(iter(params.values())))).tolist()
            rows = {name: params[name].unbind() for name in self._template}  # one gradient buffer for all, not one each
            for client, piece in enumerate(torch.split(inputs, counts)):
                if len(piece):
                    own = {name: row[client] for name, row in rows.items()}
                    lone = self.backbone.training and len(piece) == 1  # one image has no batch statistics
                    if lone:
                        self.backbone.eval()
                    pieces.append(functional_call(self.backbone.model, own, (piece,)))
                    if lone:
                        self.backbone.train()
        logits = torch.cat(pieces)
        return logits if logits.dtype == torch.float64 else logits.float()


def initial_head(
    shape: tuple[int, ...], names: tuple[str, ...], rng: torch.Generator, std: float = 0.01
) -> dict[str, np.ndarray]:
    """A small random head: not zero, so that the first attack and the first adapter gradient are not zero either."""
    weight = torch.randn(shape, generator=rng) * std
    return {names[0]: weight.numpy(), names[1]: np.zeros(shape[0], np.float32)}


def broadcast_clients(values_C: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[C]`` shaped and typed to broadcast against ``[C, ...]``."""
    value = values_C if values_C.dtype == torch.bool else values_C.to(like.dtype)
    return value.view(-1, *[1] * (like.ndim - 1))


def num_clients(params: Mapping[str, torch.Tensor]) -> int:
    """C of a parameter stack."""
    return len(next(iter(params.values())))


def repeat_owner(counts: list[int]) -> torch.Tensor:
    """``[n_0, n_1, ...]`` images per client -> the sorted owner vector."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def select_clients(params: ParameterStack, clients: list[int]) -> ParameterStack:
    """The rows of some clients."""
    return {name: value[clients] for name, value in params.items()}


def full_model_bytes(backbone: Backbone) -> int:
    """Bytes of the whole model with its head in fp32: what full-model federated training would upload."""
    return sum(4 * value.numel() for value in backbone.model.parameters())


def as_client(state: ClientState) -> dict[str, np.ndarray]:
    """A single client as a stack of one."""
    return {name: value[None] for name, value in state.items()}
