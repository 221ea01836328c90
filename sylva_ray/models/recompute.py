"""The gradient of a forward pass in windows: what is not kept is computed again, window by window.

Kept or not, the gradient of every window is computed alone, and they are added in the same order: the bits are equal.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.autograd.function import once_differentiable

from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.failures import is_out_of_memory, release_memory
from sylva_ray.core.types import ParameterStack
from sylva_ray.core.windows import Pass, Window, WindowLimits, in_windows, joined, split_windows

T = TypeVar("T")


class Recomputable(Protocol):
    """What is needed of a model; see `sylva_ray.models.windowed.WindowedModel`."""

    backbone: Any
    precision: torch.dtype
    kernels: AttentionKernels
    windows: WindowLimits

    def forward_window(
        self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor, window: Window
    ) -> torch.Tensor:
        """Compute the logits of a window."""
        ...


def in_parts(
    model: Recomputable,
    kind: Pass,
    params: ParameterStack,
    x: torch.Tensor,
    owner: torch.Tensor,
    counts: list[int],
    divide_clients: bool,
    keeps: bool,
) -> torch.Tensor:
    """Compute logits in windows.

    Args:
        model: computes a window.
        kind: of the pass.
        params: ``{name: [C, ...]}``.
        x: ``[N, 3, H, W]``.
        owner: ``[N]``, sorted.
        counts: images of the C clients.
        divide_clients: see `sylva_ray.core.windows.split_windows`.
        keeps: whether the activations of all windows fit the memory; otherwise the backward pass computes them again.

    Returns:
        ``[N, num_classes]``, differentiable once with respect to ``x`` and ``params``.
    """
    call = Call(model, kind, list(params), owner, counts, Setting.of(model), divide_clients, keeps)
    logits: torch.Tensor = _InParts.apply(call, x, *params.values())  # type: ignore[no-untyped-call]
    return logits


@dataclass(frozen=True)
class Setting:
    """How a model computes; it is restored when a window is computed again."""

    precision: torch.dtype
    kernels: AttentionKernels
    is_training: bool

    @staticmethod
    def of(model: Recomputable) -> Setting:
        """Return the present one."""
        return Setting(model.precision, model.kernels, model.backbone.training)

    @contextmanager
    def applied(self, model: Recomputable) -> Iterator[None]:
        """Set it inside the ``with`` block."""
        before = Setting.of(model)
        self._apply(model)
        try:
            yield
        finally:
            before._apply(model)

    def _apply(self, model: Recomputable) -> None:
        model.precision, model.kernels = self.precision, self.kernels
        if model.backbone.training != self.is_training:
            model.backbone.train(self.is_training)


@dataclass(frozen=True)
class Call:
    """A forward pass that is computed in windows, and where they are not kept again in the backward pass."""

    model: Recomputable
    kind: Pass
    names: list[str]
    owner: torch.Tensor
    counts: list[int]
    setting: Setting
    divide_clients: bool
    keeps: bool

    def in_windows(self, run: Callable[[Window], T]) -> list[T]:
        """Call a function for every window of the pass."""
        return in_windows(self.counts, self.model.windows, self.kind, run, self.divide_clients)


class _InParts(torch.autograd.Function):
    """Logits of all windows; the gradients are those of windows that were kept or are computed again."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        ctx.call = call
        ctx.tensors = (x.detach(), *(value.detach() for value in values))
        ctx.kept = _kept_graphs(ctx) if call.keeps else {}
        if ctx.kept:
            return joined([graph.logits.detach() for graph in ctx.kept.values()])
        params = dict(zip(call.names, ctx.tensors[1:], strict=True))
        return joined(call.in_windows(lambda w: call.model.forward_window(params, ctx.tensors[0], call.owner, w)))

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: Call = ctx.call
        x, *values = ctx.tensors
        _, for_x, *for_values = ctx.needs_input_grad
        wanted = [name for name, needed in zip(call.names, for_values, strict=True) if needed]
        params = dict(zip(call.names, values, strict=True))
        for_images = torch.zeros_like(x) if for_x else None
        sums = {name: torch.zeros_like(params[name]) for name in wanted}

        def differentiate(window: Window) -> None:
            graph = ctx.kept.pop((window.rows.start, window.rows.stop), None) or _graph(ctx, window)
            inputs = [*([graph.images] if for_x else []), *graph.leaves.values()]
            found = list(torch.autograd.grad(graph.logits, inputs, gradient[window.rows], allow_unused=True))
            if for_images is not None:
                own_gradient = found.pop(0)
                if own_gradient is not None:
                    for_images[window.rows] = own_gradient
            for name, value in zip(graph.leaves, found, strict=True):
                if value is not None:
                    sums[name][window.clients] += value

        def run(window: Window) -> None:
            try:
                differentiate(window)
                return
            except Exception as error:
                if not ctx.kept or not is_out_of_memory(error):
                    raise
                ctx.kept.clear()  # they fill the memory that the gradients need
                call.model.windows.keep_less(call.kind, sum(call.counts))
            release_memory()  # after the handler, which keeps the tensors of the failed attempt
            differentiate(window)

        call.in_windows(run)
        return (None, for_images, *(sums.get(name) for name in call.names))


@dataclass(frozen=True)
class _Graph:
    """The activations of a window, and what its gradient is computed with respect to."""

    images: torch.Tensor
    leaves: dict[str, torch.Tensor]
    logits: torch.Tensor


def _graph(ctx: Any, window: Window) -> _Graph:
    """Compute a window and keep its activations."""
    call: Call = ctx.call
    x, *values = ctx.tensors
    _, for_x, *for_values = ctx.needs_input_grad
    own = window.select(dict(zip(call.names, values, strict=True)))
    needed = [name for name, is_needed in zip(call.names, for_values, strict=True) if is_needed]
    leaves = {name: own[name].detach().requires_grad_() for name in needed}
    others = {name: value for name, value in own.items() if name not in leaves}
    if not call.divide_clients:  # batch statistics were updated in the forward pass; here a copy of them is
        others = {name: value.clone() for name, value in others.items()}
    images = x[window.rows].detach().requires_grad_(for_x)
    whole = Window(slice(0, window.num_images), slice(0, window.clients.stop - window.clients.start))
    owner = call.owner[window.rows] - window.clients.start
    with torch.enable_grad(), call.setting.applied(call.model):
        logits = call.model.forward_window({**others, **leaves}, images, owner, whole)
    return _Graph(images, leaves, logits)


def _kept_graphs(ctx: Any) -> dict[tuple[int, int], _Graph]:
    """Compute all windows, ``{rows: graph}``; none if their activations do not fit the memory after all."""
    call: Call = ctx.call
    limits = call.model.windows
    limits.begin(call.kind, sum(call.counts))
    try:
        windows = split_windows(call.counts, limits.of(call.kind), call.divide_clients)
        return {(window.rows.start, window.rows.stop): _graph(ctx, window) for window in windows}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        limits.keep_less(call.kind, sum(call.counts))
    release_memory()  # after the handler, which keeps the tensors of the failed attempt
    return {}
