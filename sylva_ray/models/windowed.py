"""Forward passes of a cohort model in windows: the base class of both implementations of `CohortModel`.

Every forward over images passes here. Without gradients, windows are computed one after the other. With gradients, the
forward pass keeps nothing but the logits, and the backward pass computes each window again and differentiates it (Chen
et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): the memory of one window instead of that of the batch,
for one more forward pass. Where the memory holds all windows, their activations are kept instead, and the gradients are
the same, bit for bit. So a loss may depend on all images of a client, and no method needs to know of windows.
Attacks have no such loss and divide their images beforehand (`sylva_ray.core.windows.in_windows`), which costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.failures import is_out_of_memory, release_memory
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import ParameterStack
from sylva_ray.core.windows import Pass, Window, WindowLimits, in_windows, joined

if TYPE_CHECKING:
    from sylva_ray.models.backbone import Backbone


class WindowedModel:
    """A cohort model whose forward passes are divided into windows where a batch exceeds them.

    Attributes:
        windows: images in one pass.
    """

    backbone: Backbone
    precision: torch.dtype
    kernels: AttentionKernels
    windows: WindowLimits

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """See `sylva_ray.models.cohort.CohortModel`."""
        counts = torch.bincount(owner, minlength=len(next(iter(params.values())))).tolist()
        by_parameters = torch.is_grad_enabled() and any(value.requires_grad for value in params.values())
        by_images = torch.is_grad_enabled() and x.requires_grad
        kind: Pass = "train" if by_parameters else "attack" if by_images else "forward"
        size = len(counts) * max(counts)
        if size <= self.windows.of(kind):
            self.windows.begin(kind, len(owner), max(counts) if self.couples_images else 1)
            try:
                return self._forward(params, x, owner)
            except Exception as error:
                if self.couples_images or not is_out_of_memory(error):
                    raise
                self.windows.halve(kind, len(owner))
            release_memory()  # after the handler, which keeps the tensors of the failed attempt
        divide = not self.couples_images
        if not (by_parameters or by_images):
            return joined(
                in_windows(counts, self.windows, kind, lambda w: self.forward_window(params, x, owner, w), divide)
            )
        from sylva_ray.models.recompute import in_parts  # it imports torch

        keeps = divide and size <= self.windows.held(kind)
        return in_parts(self, kind, params, x, owner, counts, divide, keeps)

    def _forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Compute the logits of images that fit one window."""
        raise NotImplementedError

    def forward_window(
        self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor, window: Window
    ) -> torch.Tensor:
        """Compute the logits of a window with the parameters of its clients."""
        own = owner[window.rows] - window.clients.start
        return self._forward(window.select(params), x[window.rows], own)

    @property
    def couples_images(self) -> bool:
        """Whether the logits of an image depend on the client's other images, as with batch statistics in training."""
        return False
