"""The interface for models of many clients in one forward pass.

Attacks, losses, clipping, the optimiser, the layer game and evaluation use a `CohortModel` and nothing else. It has two
implementations:

* `sylva_ray.models.lora.LoraStack`, the fast one: a frozen backbone with C stacked adapters and heads;
* `FunctionalStack` here, for any timm module: every parameter belongs to the client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import ClientState, ParameterStack
from sylva_ray.core.windows import WindowLimits
from sylva_ray.models.kernels import AttentionSwitch
from sylva_ray.models.windowed import WindowedModel

if TYPE_CHECKING:
    from sylva_ray.models.backbone import Backbone


class CohortModel(Protocol):
    """A model of C clients, each of whose parameters affect the client's own images only.

    Attributes:
        head_names: names of the classifier's weight and bias.
        precision: of forward passes: float32, as the parameters are, or bfloat16. Logits and losses are float32 in
            either.
        kernels: the attention kernel of each precision.
    """

    head_names: tuple[str, ...]
    precision: torch.dtype
    kernels: AttentionKernels

    @property
    def num_attention_layers(self) -> int:
        """Number of layers with a choice of kernel."""
        ...

    @property
    def image_size(self) -> int:
        """Side in pixels of what the model sees; images of another size are resized."""
        ...

    def initial_state(self, rng: torch.Generator) -> dict[str, np.ndarray]:
        """Return the state that every client starts from, its random part drawn from ``rng``."""
        ...

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Compute the logits of every image by its owner's parameters.

        Args:
            params: ``{name: [C, ...]}``.
            x: ``[N, 3, H, W] in [0, 1]``.
            owner: ``[N]`` in 0..C-1, sorted, on the CPU. Clients may own different numbers of images, or none.

        Returns:
            ``[N, num_classes] float32`` (float64 if the parameters are).
        """
        ...

    def trainable(self, name: str) -> bool:
        """Return whether the optimiser may change this entry; running statistics of a BatchNorm are not trained."""
        ...

    def training(self) -> AbstractContextManager[None]:
        """Return a context in which forward passes are training steps.

        A BatchNorm then uses batch statistics and updates the running ones in ``params``.
        """
        ...


def client_gradients(
    params: ParameterStack, names: Sequence[str], losses: Callable[[ParameterStack], torch.Tensor]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Differentiate the sum of the clients' losses, so that the gradient of each client is that of training alone.

    Args:
        params: ``{name: [C, ...]}``.
        names: the parameters to differentiate by.
        losses: returns the loss of every client, ``[C]``, for some parameters.

    Returns:
        The gradients ``{name: [C, ...]}`` and the losses ``[C]``.
    """
    leaves = {name: params[name].detach().requires_grad_() for name in names}
    losses_C = losses({**params, **leaves})
    gradients = torch.autograd.grad(losses_C.sum(), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True)), losses_C.detach()


def to_parameters(stack: Mapping[str, np.ndarray], device: torch.device | str, dtype: torch.dtype) -> ParameterStack:
    """Copy ``{name: [C, ...]}`` of numpy arrays, which may be read-only, to tensors."""
    return {name: torch.tensor(value, device=device, dtype=dtype) for name, value in stack.items()}


def to_arrays(params: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Copy tensors, of any layout, to float32 arrays in C order that own their memory."""
    return {name: np.array(value.detach().cpu().float().numpy(), order="C") for name, value in params.items()}


class FunctionalStack(WindowedModel):
    """A `CohortModel` in which every parameter of a timm module exists once per client.

    It serves baselines that train the full model, and students that are CNNs. Clients are computed one after the other
    by `torch.func.functional_call`: full models have no matrix product in common. Floating-point buffers (BatchNorm
    statistics) are part of a client's state.

    Args:
        backbone: the model.
        precision: of forward passes; None: float32.
    """

    def __init__(self, backbone: Backbone, precision: torch.dtype | None = None) -> None:
        from sylva_ray.models.heads import keep_head_exact  # it imports torch, which this module does not need yet

        self.backbone = backbone
        self.precision = precision or torch.float32
        self.kernels = AttentionKernels()
        self.windows = WindowLimits()
        self._attention = AttentionSwitch(backbone.model)
        batch_norm = torch.nn.modules.batchnorm._BatchNorm
        self._has_batch_statistics = any(isinstance(layer, batch_norm) for layer in backbone.modules())
        head = backbone.head_name
        keep_head_exact(backbone.model, head)
        self.head_names: tuple[str, ...] = (f"{head}.weight", f"{head}.bias")
        parameters = dict(backbone.model.named_parameters())
        self._trainable = {name for name, value in parameters.items() if value.requires_grad}
        kept = backbone.model.state_dict().keys()  # without constants that the model computes, such as masks of windows
        self._template = parameters | {
            name: buffer
            for name, buffer in backbone.model.named_buffers()
            if buffer.is_floating_point() and name in kept
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
        """Return the backbone's weights and a random head."""
        state: dict[str, np.ndarray] = {
            name: np.array(value.detach().cpu().numpy()) for name, value in self._template.items()
        }
        return state | initial_head(state[self.head_names[0]].shape, self.head_names, rng)

    def trainable(self, name: str) -> bool:
        """Return whether ``name`` is a parameter, not a buffer, which the architecture has not frozen."""
        return name in self._trainable

    @contextmanager
    def training(self) -> Iterator[None]:
        """See `CohortModel`. Attacks, teachers and evaluation run outside of it, in evaluation mode."""
        self.backbone.train()
        try:
            yield
        finally:
            self.backbone.eval()

    @property
    def couples_images(self) -> bool:
        """See `WindowedModel`: a BatchNorm in training."""
        return self._has_batch_statistics and self.backbone.training

    def _forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        pieces = []
        self._attention.use(self.kernels, self.precision)
        with torch.autocast(x.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            inputs = self.backbone.preprocess(x)
            counts = np.bincount(owner.numpy(), minlength=num_clients(params)).tolist()
            rows = {
                name: params[name].unbind() for name in self._template
            }  # one gradient buffer instead of one per client
            for client, piece in enumerate(torch.split(inputs, counts)):
                if len(piece):
                    own = {name: row[client] for name, row in rows.items()}
                    single = self.backbone.training and len(piece) == 1  # one image has no batch statistics
                    if single:
                        self.backbone.eval()
                    pieces.append(torch.func.functional_call(self.backbone.model, own, (piece,)))
                    if single:
                        self.backbone.train()
        logits = torch.cat(pieces)
        return logits if logits.dtype == torch.float64 else logits.float()


HEAD_STD = 0.01
"""Standard deviation of the weights that a head begins with."""


def initial_head(shape: tuple[int, ...], names: tuple[str, ...], rng: torch.Generator) -> dict[str, np.ndarray]:
    """Draw a small random head; with zeros, the first attack and the first gradient of the adapters would be zero.

    Args:
        shape: ``(num_classes, width)``.
        names: of the weight and the bias.
        rng: source of the random numbers.
    """
    weight = torch.randn(shape, generator=rng) * HEAD_STD
    return {names[0]: weight.numpy(), names[1]: np.zeros(shape[0], np.float32)}


def broadcast_clients(values_C: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Make ``[C]`` broadcast against ``like [C, ...]``, in the type of ``like`` unless it is a mask."""
    value = values_C if values_C.dtype == torch.bool else values_C.to(like.dtype)
    return value.view(-1, *[1] * (like.ndim - 1))


def num_clients(params: Mapping[str, torch.Tensor]) -> int:
    """Return the number C of clients in ``{name: [C, ...]}``."""
    return len(next(iter(params.values())))


def repeat_owner(counts: list[int]) -> torch.Tensor:
    """Return the sorted owners ``[N]`` of the images of clients that own ``counts`` images each."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def select_clients(params: ParameterStack, clients: list[int]) -> ParameterStack:
    """Return the parameters of some clients."""
    return {name: value[clients] for name, value in params.items()}


def full_model_bytes(backbone: Backbone) -> int:
    """Return the bytes of the whole model in float32: what full-model federated training would upload."""
    return sum(4 * value.numel() for value in backbone.model.parameters())


def as_client(state: ClientState) -> dict[str, np.ndarray]:
    """Return the state of one client as a stack ``{name: [1, ...]}``."""
    return {name: value[None] for name, value in state.items()}
