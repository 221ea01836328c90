"""The LoRA adapters and heads of C clients on one frozen backbone, in one batched forward pass.

LoRA (Hu et al. 2022) computes ``W x + (alpha / r) B A x`` with ``A [r, d_in]`` and ``B [d_out, r]``. The frozen product
``W x`` is one matrix product over the images of all clients; only the low-rank product is batched over C (as in Punica,
Chen et al. 2024). Each client's logits and gradients are those of its own PEFT model.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import TypeGuard

import numpy as np
import torch
from torch import nn

from sylva_ray.config.experiment import ALL_LINEAR, LoraSection
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ParameterStack
from sylva_ray.core.windows import WindowLimits
from sylva_ray.models.backbone import Backbone, head_companions
from sylva_ray.models.cohort import initial_head
from sylva_ray.models.kernels import AttentionSwitch
from sylva_ray.models.light_timm import LayerNorm, LayerNormFp32, VisionTransformer
from sylva_ray.models.patches import PatchProjection
from sylva_ray.models.peft_format import AdapterLayout
from sylva_ray.models.stacked_layers import (
    StackedConvLora,
    StackedHead,
    StackedLora,
    StackedNorm,
    StackInputs,
)
from sylva_ray.models.windowed import WindowedModel

BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+")
"""The beginning of the name of a module that is in a block."""

HEAD_PLAYER = "head"
"""Name of the head among the players of the layer game."""


class LoraStack(WindowedModel):
    """A `sylva_ray.models.cohort.CohortModel` for LoRA on a frozen backbone.

    Args:
        backbone: the model; its adapted layers and its head are replaced.
        lora: rank, alpha and adapted layers.
        precision: of forward passes.

    Raises:
        UserError: ``lora.target_modules`` matches nothing or something that is not a linear layer of a block; the rank
            exceeds a layer's smaller side.
    """

    def __init__(self, backbone: Backbone, lora: LoraSection, precision: torch.dtype = torch.float32) -> None:
        self.backbone = backbone.requires_grad_(False).eval()
        self.precision = precision
        self.kernels = AttentionKernels()
        self.windows = WindowLimits()
        self._inputs = StackInputs()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._initial: dict[str, np.ndarray] = {}
        model = backbone.model
        for name, layer in trained_layers(backbone, lora).items():
            model.set_submodule(name, self._stacked(name, layer, lora))
        head = backbone.head_name
        self.head_names: tuple[str, ...] = (f"{head}.weight", f"{head}.bias")
        classifier = model.get_submodule(head)
        assert isinstance(classifier, nn.Linear)
        self._shapes[self.head_names[0]] = (classifier.out_features, classifier.in_features)
        self._shapes[self.head_names[1]] = (classifier.out_features,)
        model.set_submodule(head, StackedHead(head, self._inputs))
        self._attention = {torch.float32: AttentionSwitch(model)}
        self._backbones = {torch.float32: self.backbone}

    def _stacked(self, name: str, layer: nn.Module, lora: LoraSection) -> nn.Module:
        """Return the stacked form of a layer, and note the shapes of its parameters."""
        if isinstance(layer, nn.LayerNorm):
            start = {f"{name}.{end}": getattr(layer, end).detach().numpy().copy() for end in ("weight", "bias")}
            self._initial |= start
            self._shapes |= {key: value.shape for key, value in start.items()}
            return StackedNorm(layer, name, self._inputs)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        num_outputs, num_inputs = matrix_shape(layer)
        self._shapes[f"{name}.lora_A"] = (lora.rank, num_inputs)
        self._shapes[f"{name}.lora_B"] = (num_outputs, lora.rank)
        if isinstance(layer, nn.Conv2d):
            return StackedConvLora(layer, name, lora.alpha / lora.rank, self._inputs)
        return StackedLora(layer, name, lora.alpha / lora.rank, self._inputs)

    @property
    def num_attention_layers(self) -> int:
        """See `CohortModel`."""
        return len(self._attention[torch.float32])

    @property
    def image_size(self) -> int:
        """See `CohortModel`."""
        return self.backbone.image_size

    # -- states ------------------------------------------------------------------------------------------------------

    def initial_state(self, rng: torch.Generator) -> dict[str, np.ndarray]:
        """Draw A and the head; B is 0, so that the adapters change nothing at first.

        A is uniform in +-1/sqrt(d_in), as in PEFT (Kaiming-uniform with a = sqrt 5). Trained norms start as those of
        the backbone.
        """
        state = {}
        for name, shape in self._shapes.items():
            if name.endswith("lora_A"):
                state[name] = ((torch.rand(shape, generator=rng) * 2 - 1) / shape[1] ** 0.5).numpy()
            elif name.endswith("lora_B"):
                state[name] = np.zeros(shape, np.float32)
            elif name in self._initial:
                state[name] = self._initial[name].astype(np.float32)
        return state | initial_head(self._shapes[self.head_names[0]], self.head_names, rng)

    def trainable(self, name: str) -> bool:
        """Return whether ``name`` belongs to an adapter, a trained norm or the head."""
        return name in self._shapes

    def training(self) -> AbstractContextManager[None]:
        """See `CohortModel`. The frozen backbone stays in evaluation mode."""
        return nullcontext()

    @property
    def players(self) -> dict[str, tuple[str, ...]]:
        """The players of the layer game, ``{block: its parameter names}``.

        They are in the order of the forward pass, the head last. A block is a block of timm (``blocks.3``,
        ``layers.1.blocks.0``); an adapted layer outside any block is a player alone.
        """
        groups: dict[str, list[str]] = {}
        for name in self._shapes:
            if name not in self.head_names:
                module = name.rsplit(".", 1)[0]
                block = BLOCK.match(module)
                groups.setdefault(block.group() if block else module, []).append(name)
        return {player: tuple(names) for player, names in groups.items()} | {HEAD_PLAYER: self.head_names}

    # -- forward -----------------------------------------------------------------------------------------------------

    def _forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        return _at_least_float32(self._with_inputs(params, owner, x.device)(x))

    def _with_inputs(self, params: ParameterStack, owner: torch.Tensor, device: torch.device) -> Backbone:
        """Return the backbone in the present precision, its stacked layers set to ``params`` and ``owner``."""
        self._inputs.set(params, owner, device)
        return self._backbone()

    def _backbone(self) -> Backbone:
        """Return the backbone in the present precision; its copy in a lower one is made at the first use.

        Weights and activations are in that precision. Layer norms and softmax compute in float32 inside their kernels;
        the head and the logits are float32.
        """
        if self.precision not in self._backbones:
            lower = self.backbone.in_precision(self.precision, shared=self._inputs)
            self._backbones[self.precision] = lower
            self._attention[self.precision] = AttentionSwitch(lower.model)
        self._attention[self.precision].use(self.kernels, self.precision)
        return self._backbones[self.precision]

    # -- the forward pass in pieces, for the layer game ----------------------------------------------------------------

    @property
    def num_blocks(self) -> int | None:
        """Number of transformer blocks, or None if the architecture is not a plain chain of blocks with adapters."""
        model = self.backbone.model
        blocks = [player for player in self.players if player != HEAD_PLAYER]
        is_chain = is_plain_vit(model) and blocks == [f"blocks.{i}" for i in range(len(model.blocks))]
        return len(blocks) if is_chain else None

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the tokens before the first block from pixels (as `VisionTransformer.forward_features` does)."""
        backbone = self._backbone()
        model = backbone.model
        assert isinstance(model, VisionTransformer)
        tokens: torch.Tensor = model._pos_embed(model.patch_embed(backbone.preprocess(x)))
        tokens = model.norm_pre(model.patch_drop(tokens))
        return tokens

    def run_block(self, index: int, params: ParameterStack, tokens: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Apply one transformer block.

        Args:
            index: of the block, from 0.
            params: the parameters of the C clients, each ``[C, ...]``.
            tokens: ``[N, T, d]``, the tokens before the block.
            owner: the client of each image, ``[N]`` in 0..C-1, sorted, on the CPU.

        Returns:
            ``[N, T, d]``, the tokens after the block.
        """
        model = self._with_inputs(params, owner, tokens.device).model
        output: torch.Tensor = model.blocks[index](tokens)  # type: ignore[index, operator]
        return output

    def classify(self, params: ParameterStack, tokens: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Compute the logits from the tokens after the last block."""
        model = self._with_inputs(params, owner, tokens.device).model
        assert isinstance(model, VisionTransformer)
        return _at_least_float32(model.forward_head(model.norm(tokens)))


def is_plain_vit(model: nn.Module) -> TypeGuard[VisionTransformer]:
    """Return whether a model computes what timm's `VisionTransformer` does: subclasses may differ."""
    passes = ("forward", "forward_features", "forward_head")
    return isinstance(model, VisionTransformer) and all(
        getattr(type(model), name) is getattr(VisionTransformer, name) for name in passes
    )


PLAIN_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)
"""Layer norms over the last dimension, without an activation. Other classes of timm inherit from them and differ."""


def trained_layers(backbone: Backbone, lora: LoraSection) -> dict[str, nn.Module]:
    """Return the layers of `target_layers` and, if ``lora.train_norms``, the layer norms of all blocks.

    They are in the order of the forward pass.
    """
    targets = target_layers(backbone, lora)
    norms = {
        name: module
        for name, module in backbone.model.named_modules()
        if lora.train_norms and type(module) in PLAIN_NORMS and module.elementwise_affine and BLOCK.match(name)
    }
    return {name: m for name, m in backbone.model.named_modules() if name in targets or name in norms}


def adapter_layout(backbone: Backbone, lora: LoraSection) -> AdapterLayout:
    """Return what the file of a client's adapter holds beside its factors."""
    layers = trained_layers(backbone, lora)
    whole = [backbone.head_name, *(name for name, layer in layers.items() if isinstance(layer, nn.LayerNorm))]
    kernels = {name: tuple(layer.weight.shape) for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    names = tuple(f"{name}.{end}" for name in whole for end in ("weight", "bias"))
    return AdapterLayout(names, kernels, head_companions(backbone))


def target_layers(backbone: Backbone, lora: LoraSection) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that ``lora.target_modules`` names, in the order of the forward pass.

    A name matches as in PEFT: it is the layer's whole name, or its end after a dot. ``all_linear`` matches the linear
    layers of all blocks. A convolution, as of the patch embedding, can be named, too.

    Args:
        backbone: the model.
        lora: rank and target modules.

    Raises:
        UserError: a name matches no layer, or one that is neither linear nor a plain convolution, or the classifier;
            or the rank exceeds the smaller side of a layer's matrix.
    """
    modules = dict(backbone.model.named_modules())
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for target in lora.target_modules:
        if target == ALL_LINEAR:
            matches = [name for name, module in modules.items() if isinstance(module, nn.Linear) and BLOCK.match(name)]
        else:
            matches = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matches:
            raise _no_such_layer(backbone, target, lora)
        adaptable = {name for name in matches if _is_adaptable(modules[name]) and name != backbone.head_name}
        for name in matches:
            layer = modules[name]
            if name not in adaptable:
                fix = f"also matches {name}" if adaptable else f"matches {name}"
                advice = f"; write {', '.join(sorted(map(_tail, adaptable)))}" if adaptable else ""
                kind = "the classifier" if name == backbone.head_name else f"a {type(layer).__name__}"
                needed = "an adapter needs a linear layer or a plain convolution"
                raise UserError("lora.target_modules", target, f"{fix}, {kind}: {needed}{advice}")
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            num_outputs, num_inputs = matrix_shape(layer)
            if lora.rank > (smaller := min(num_inputs, num_outputs)):
                fix = f"must be at most {smaller}; {name} is {num_inputs} to {num_outputs}"
                raise UserError("lora.rank", lora.rank, fix)
            found[name] = layer
    return {name: found[name] for name in modules if name in found}  # forward order


def matrix_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Return outputs and inputs of the weight as a matrix; the inputs of a convolution are the pixels of its kernel."""
    return layer.weight.shape[0], layer.weight[0].numel()


def _is_adaptable(layer: nn.Module) -> bool:
    """Return whether a low-rank update of the layer's weight is what PEFT computes.

    Subclasses of the convolution may compute with other weights than theirs, e.g. standardised ones.
    """
    if isinstance(layer, nn.Linear):
        return True
    is_plain = type(layer) in (nn.Conv2d, PatchProjection)
    return is_plain and isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"


def _no_such_layer(backbone: Backbone, target: str, lora: LoraSection) -> UserError:
    """Return the error for a name that matches no layer; if it is a default, its cause is the backbone."""
    modules = dict(backbone.model.named_modules())
    linear = sorted({_tail(n) for n, m in modules.items() if isinstance(m, nn.Linear) and n != backbone.head_name})
    if linear:
        return UserError("lora.target_modules", target, f"matches no layer; this model has {', '.join(linear)}")
    known = "this model has no linear layer but its head"
    convolutions = [name for name, module in modules.items() if isinstance(module, nn.Conv2d) and _is_adaptable(module)]
    example = f", e.g. lora.target_modules=[{convolutions[-1]}]" if convolutions else ""
    if lora.target_modules != LoraSection().target_modules:
        return UserError("lora.target_modules", target, f"matches no layer; {known}: name convolutions{example}")
    name = backbone.arguments.get("model_name", type(backbone.model).__name__)
    fix = f"{known}, where adapters are by default: use a vision transformer, or name convolutions{example}"
    return UserError("backbone.name", name, fix)


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Convert logits to float32, in which losses and metrics are computed; float64, of tests, is kept."""
    return logits if logits.dtype == torch.float64 else logits.float()
