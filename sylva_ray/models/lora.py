"""The LoRA adapters and heads of C clients on one frozen backbone, in one batched forward pass.

LoRA (Hu et al. 2022) computes ``W x + (alpha / r) B A x`` with ``A [r, d_in]`` and ``B [d_out, r]``. The frozen product
``W x`` is one matrix product over the images of all clients; only the low-rank product is batched over C (as in Punica,
Chen et al. 2024). Each client's logits and gradients are those of its own PEFT model.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from sylva_ray.config.experiment import ALL_LINEAR, AttentionKernels, LoraSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ParameterStack
from sylva_ray.models.backbone import Backbone
from sylva_ray.models.cohort import initial_head, num_clients
from sylva_ray.models.kernels import AttentionSwitch

BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+")
"""The beginning of the name of a module that is in a block."""

HEAD_PLAYER = "head"
"""Name of the head among the players of the layer game."""


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
        counts = torch.bincount(owner, minlength=num_clients)
        widest = int(counts.max())
        if int(counts.min()) == widest:
            return OwnerLayout(num_clients, widest, None)
        first = torch.cumsum(counts, 0) - counts
        slots = owner * widest + torch.arange(len(owner)) - first[owner]
        return OwnerLayout(num_clients, widest, slots.to(device))

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


class StackedLora(nn.Module):
    """A frozen linear layer plus C low-rank updates.

    Args:
        base: the frozen layer.
        name: its name in the model.
        scaling: alpha / r.
        inputs: parameters and layout, shared by all stacked layers.
    """

    def __init__(self, base: nn.Linear, name: str, scaling: float, inputs: StackInputs) -> None:
        super().__init__()
        self.base = base
        self.name, self.scaling = name, scaling
        self.inputs = inputs

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
        layout = self.inputs.layout
        assert layout is not None, "a stacked layer was called outside LoraStack"
        a_Crd, b_Cdr = self.inputs.params[f"{self.name}.lora_A"], self.inputs.params[f"{self.name}.lora_B"]
        # Windowed attention puts windows into the batch; the rows of an image stay together, so they can be regrouped.
        rows = x.reshape(self.inputs.num_images, -1, x.shape[-1])
        low_rank = layout.pad(rows) @ a_Crd.to(x.dtype).transpose(1, 2) * self.scaling
        b_Crd = b_Cdr.to(x.dtype).transpose(1, 2)
        frozen: torch.Tensor = self.base(x)
        if layout.slots is None:  # without padding, one kernel adds the two products
            return torch.baddbmm(frozen.reshape(*low_rank.shape[:2], -1), low_rank, b_Crd).reshape(frozen.shape)
        return frozen + layout.unpad(low_rank @ b_Crd, (rows.shape[1],)).reshape(frozen.shape)


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
        layout = self.inputs.layout
        assert layout is not None, "a stacked layer was called outside LoraStack"
        weight, bias = self.inputs.params[f"{self.name}.weight"], self.inputs.params[f"{self.name}.bias"]
        return layout.unpad(layout.pad(x.to(weight.dtype)) @ weight.transpose(1, 2) + bias[:, None], ())


class LoraStack:
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
        self._inputs = StackInputs()
        self._shapes: dict[str, tuple[int, ...]] = {}
        model = backbone.model
        for name, layer in target_layers(backbone, lora).items():
            model.set_submodule(name, StackedLora(layer, name, lora.alpha / lora.rank, self._inputs))
            self._shapes[f"{name}.lora_A"] = (lora.rank, layer.in_features)
            self._shapes[f"{name}.lora_B"] = (layer.out_features, lora.rank)
        head = backbone.head_name
        self.head_names: tuple[str, ...] = (f"{head}.weight", f"{head}.bias")
        classifier = model.get_submodule(head)
        assert isinstance(classifier, nn.Linear)
        self._shapes[self.head_names[0]] = (classifier.out_features, classifier.in_features)
        self._shapes[self.head_names[1]] = (classifier.out_features,)
        model.set_submodule(head, StackedHead(head, self._inputs))
        self._attention = {torch.float32: AttentionSwitch(model)}
        self._backbones = {torch.float32: self.backbone}

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

        A is uniform in +-1/sqrt(d_in), as in PEFT (Kaiming-uniform with a = sqrt 5).
        """
        state = {}
        for name, shape in self._shapes.items():
            if name.endswith("lora_A"):
                state[name] = ((torch.rand(shape, generator=rng) * 2 - 1) / shape[1] ** 0.5).numpy()
            elif name.endswith("lora_B"):
                state[name] = np.zeros(shape, np.float32)
        return state | initial_head(self._shapes[self.head_names[0]], self.head_names, rng)

    def trainable(self, name: str) -> bool:
        """Return whether ``name`` belongs to an adapter or the head."""
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

    def forward(self, params: ParameterStack, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """See `CohortModel`."""
        return _at_least_float32(self._with_inputs(params, owner, x.device)(x))

    def _with_inputs(self, params: ParameterStack, owner: torch.Tensor, device: torch.device) -> Backbone:
        """Return the backbone in the present precision, its stacked layers set to ``params`` and ``owner``."""
        self._inputs.params = params
        self._inputs.layout = OwnerLayout.from_owner(owner, num_clients(params), device)
        self._inputs.num_images = len(owner)
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
        is_chain = isinstance(model, VisionTransformer) and blocks == [f"blocks.{i}" for i in range(len(model.blocks))]
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


def target_layers(backbone: Backbone, lora: LoraSection) -> dict[str, nn.Linear]:
    """Return the layers that ``lora.target_modules`` names, in the order of the forward pass.

    A name matches as in PEFT: it is the layer's whole name, or its end after a dot. ``all_linear`` matches the linear
    layers of all blocks.

    Args:
        backbone: the model.
        lora: rank and target modules.

    Raises:
        UserError: a name matches no layer, or one that is not a linear layer of a block; or the rank exceeds a
            layer's smaller side.
    """
    modules = dict(backbone.model.named_modules())
    found: dict[str, nn.Linear] = {}
    for target in lora.target_modules:
        if target == ALL_LINEAR:
            matches = [name for name, module in modules.items() if isinstance(module, nn.Linear) and BLOCK.match(name)]
        else:
            matches = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matches:
            linear = sorted({_tail(name) for name, m in modules.items() if isinstance(m, nn.Linear) and "." in name})
            known = f"this model has {', '.join(linear)}" if linear else "this model has no linear layer but its head"
            raise UserError("lora.target_modules", target, f"matches no layer; {known}")
        for name in matches:
            layer = modules[name]
            if not isinstance(layer, nn.Linear) or name == backbone.head_name:
                near = sorted(
                    {_tail(n) for n in matches if isinstance(modules[n], nn.Linear) and n != backbone.head_name}
                )
                fix = f"also matches {name}" if near else f"matches {name}"
                advice = f"; write {', '.join(near)}" if near else ""
                raise UserError("lora.target_modules", target, f"{fix}, which is not a linear layer of a block{advice}")
            smaller = min(layer.in_features, layer.out_features)
            if lora.rank > smaller:
                raise UserError(
                    "lora.rank",
                    lora.rank,
                    f"must be at most {smaller}; {name} is {layer.in_features} to {layer.out_features}",
                )
            found[name] = layer
    return {name: found[name] for name in modules if name in found}  # forward order


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Convert logits to float32, in which losses and metrics are computed; float64, of tests, is kept."""
    return logits if logits.dtype == torch.float64 else logits.float()
