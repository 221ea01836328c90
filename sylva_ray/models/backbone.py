"""timm models as frozen backbones that take pixels in [0, 1].

Resizing and normalisation are part of the model, so every attack and every epsilon in this project is in the pixel
space of the data set. Parameter names are timm's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from sylva_ray.config.experiment import BackboneSection
from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.locations import local_path
from sylva_ray.core.own_code import load_attribute
from sylva_ray.core.types import stack_digest
from sylva_ray.models.availability import check_available, check_safetensors, unknown_model
from sylva_ray.models.light_timm import DropPath, resample_abs_pos_embed, resolve_model_data_config, timm
from sylva_ray.models.patches import project_patches
from sylva_ray.models.resize import Resize
from sylva_ray.models.shipped import RETIRED, SHIPPED

INITIAL_SEED = 0
"""Seed of weights that come from nowhere else, so that every command builds the same model."""


class Backbone(nn.Module):
    """A timm classifier behind resizing and normalisation: ``x [N, 3, H, W] in [0, 1] -> logits [N, num_classes]``.

    Bilinear resizing is a convex combination of pixels, so an epsilon at the data's native size is at most epsilon at
    the model's size.

    Args:
        model: a timm model; its patch embedding is replaced by a matrix product (`project_patches`).
        arguments: with which ``timm.create_model`` built it, without those of its weights and its head.

    Attributes:
        model: the timm model.
        arguments: as above; an export tells its reader to build the same model.
        image_size: side in pixels of what the model sees.
        input_dtype: what the model takes; None: what normalisation gives. Pixels are normalised before they are
            rounded.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        project_patches(model)
        self.model, self.arguments = model, dict(arguments or {})
        self.input_dtype: torch.dtype | None = None
        data = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        self.image_size = int(data["input_size"][-1])
        self.resize = Resize(self.image_size)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1), persistent=False)

    def preprocess(self, x: torch.Tensor) -> torch.Tensor:
        """Resize ``x [N, 3, H, W] in [0, 1]`` to the model's size and normalise it."""
        with torch.autocast(x.device.type, enabled=False):
            normalised: torch.Tensor = (self.resize(x) - self.mean) / self.std
        return normalised if self.input_dtype is None else normalised.to(self.input_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[N, num_classes]`` of ``x [N, 3, H, W] in [0, 1]``."""
        logits: torch.Tensor = self.model(self.preprocess(x))
        return logits

    def in_precision(self, precision: torch.dtype, shared: object) -> Backbone:
        """Return a copy whose weights and activations are in ``precision``, except for the patch embedding.

        Patches are embedded in this backbone's own precision and rounded afterwards. The signs of input gradients in
        bfloat16 then agree with those in float32 on 99.5 % of the pixels of the digits; on 98.3 % if pixels are rounded
        first. A model without a patch embedding takes pixels in ``precision``.

        Args:
            precision: of the copy.
            shared: an object that the modules of the copy share with those of this backbone.
        """
        lower = copy.deepcopy(self, {id(shared): shared})
        lower.model.to(precision)
        embedding = getattr(self.model, "patch_embed", None)
        if isinstance(embedding, nn.Module):
            lower.model.patch_embed = copy.deepcopy(embedding, {id(shared): shared})
            lower.model.patch_embed.register_forward_hook(lambda _module, _inputs, tokens: _rounded(tokens, precision))
        else:
            lower.input_dtype = precision
        return lower

    @property
    def classifier(self) -> nn.Module:
        """The final layer, as timm names it."""
        classifier: nn.Module = self.model.get_classifier()  # type: ignore[operator]
        return classifier

    @property
    def head_name(self) -> str:
        """Name of the final linear layer, e.g. ``head``; empty if there is none."""
        classifier = self.classifier
        return next((name for name, module in self.model.named_modules() if module is classifier), "")


def _rounded(output: Any, precision: torch.dtype) -> Any:
    """Round the tokens of a patch embedding; some architectures return them in a tuple, with the size of their grid."""
    if isinstance(output, torch.Tensor):
        return output.to(precision)
    return tuple(_rounded(part, precision) for part in output) if isinstance(output, tuple) else output


def create_backbone(
    section: BackboneSection, num_classes: int, weights: Mapping[str, np.ndarray] | None = None
) -> Backbone:
    """Build the backbone in eval mode with a fresh head of ``num_classes`` outputs.

    Args:
        section: which model; where its weights come from.
        num_classes: outputs of the new head. The head of a checkpoint is dropped unless it has as many.
        weights: a state_dict as numpy arrays (from `backbone_arrays`); with it, nothing is read from disk or hub.

    Raises:
        UserError: the model is unknown or its classifier is not one linear layer; a checkpoint is missing, corrupt or
            does not fit; or the hub cannot be reached.
    """
    if weights is None:
        check_available(section)
    model, arguments = _architecture(section, num_classes, pretrained=section.pretrained and weights is None)
    _check_patches(section, model)
    backbone = Backbone(model, arguments)
    if not isinstance(backbone.classifier, nn.Linear):
        raise UserError("backbone.name", section.name, "needs a model whose classifier is one linear layer")
    if backbone.classifier.bias is None:  # clients train one, which PEFT could not load
        raise UserError("backbone.name", section.name, "needs a model whose classifier has a bias")
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    elif section.checkpoint is not None:
        _load_checkpoint(backbone, local_path("backbone.checkpoint", section.checkpoint), "backbone.checkpoint")
    elif section.name in SHIPPED:
        _load_checkpoint(backbone, SHIPPED[section.name].checkpoint, "backbone.name")
    return backbone.eval()


def own_model(name: str) -> str:
    """Import the module of a model of the user's own, which registers it with timm, and return timm's name of it.

    Args:
        name: ``package.module:function``, a function decorated with ``timm.models.register_model``.

    Raises:
        UserError: it cannot be imported, or is not registered.
    """
    load_attribute("backbone.name", name)
    model_name = name.partition(":")[2]
    if not timm.is_model(model_name):
        raise UserError("backbone.name", name, "must be a function decorated with timm.models.register_model")
    return model_name


def checkpoint_classes(section: BackboneSection) -> int | None:
    """Return the number of classes of the backbone's own weights, or None if they include no trained head.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    if section.checkpoint is None and section.name not in SHIPPED:
        name = own_model(section.name) if ":" in section.name else section.name
        known = timm.get_pretrained_cfg_value(name, "num_classes") if section.pretrained else None
        return int(known) if known else None
    checkpoint = section.checkpoint
    path = SHIPPED[section.name].checkpoint if checkpoint is None else local_path("backbone.checkpoint", checkpoint)
    head = create_backbone(section, num_classes=2).head_name
    with safe_open(path, "pt") as file:
        name = f"{head}.bias"
        return int(file.get_slice(name).get_shape()[0]) if name in file.keys() else None  # noqa: SIM118


def backbone_arrays(backbone: Backbone) -> dict[str, np.ndarray]:
    """Return the timm model's state_dict as numpy arrays, as it is sent to workers."""
    return {name: value.detach().cpu().numpy() for name, value in backbone.model.state_dict().items()}


def digest_weights(arrays: Mapping[str, np.ndarray], head_name: str) -> str:
    """Return a digest of a backbone's weights without its head, which every run replaces.

    Args:
        arrays: as of `backbone_arrays`.
        head_name: of the backbone.
    """
    return stack_digest({name: value for name, value in arrays.items() if not name.startswith(f"{head_name}.")}).hex()


def head_companions(backbone: Backbone) -> dict[str, np.ndarray]:
    """Return the arrays of the modules whose names end like that of the classifier, ``{name: array}``.

    PEFT finds the modules that an adapter's file replaces by the ends of their names: in VOLO, ``head`` is also the end
    of ``aux_head``, which has as many outputs.
    """
    head = backbone.head_name
    names = [name for name, _ in backbone.model.named_modules() if name.endswith(head) and name != head]
    arrays = backbone_arrays(backbone)
    return {key: value for key, value in arrays.items() if key.rpartition(".")[0] in names}


def _architecture(section: BackboneSection, num_classes: int, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Return a timm model and the arguments that it was built with."""
    arguments: dict[str, Any]
    own = {name: shipped.architecture for name, shipped in SHIPPED.items()} | dict(RETIRED)
    if section.name in own:
        architecture = own[section.name]
        arguments = dict(architecture.arguments)
        overlay = {"input_size": (3, arguments["img_size"], arguments["img_size"])}
        arguments["pretrained_cfg_overlay"] = overlay | {"mean": architecture.mean, "std": architecture.std}
    elif ":" in section.name:
        arguments = {"model_name": own_model(section.name)}
    elif timm.is_model(section.name.split(".")[0]):
        arguments = {"model_name": section.name}
    else:
        raise unknown_model("backbone.name", section.name, timm.list_models())
    if section.image_size is not None:
        arguments["img_size"] = section.image_size
        arguments["pretrained_cfg_overlay"] = arguments.get("pretrained_cfg_overlay", {}) | {
            "input_size": (3, section.image_size, section.image_size)
        }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(INITIAL_SEED)
            try:
                model = timm.create_model(**arguments, num_classes=num_classes, pretrained=pretrained)
            except TypeError:  # a convolutional network has no image size; `Backbone` resizes for it
                arguments.pop("img_size", None)
                model = timm.create_model(**arguments, num_classes=num_classes, pretrained=pretrained)
            return without_dropout(model), arguments
    except Exception as error:
        reason = reason_of(error)
        if pretrained:
            fix = f"the weights could not be fetched from the hub ({reason}); set backbone.checkpoint to a local file"
            raise UserError("backbone.pretrained", True, fix) from error
        if section.image_size is None:
            raise UserError("backbone.name", section.name, f"timm cannot build it ({reason})") from error
        side = _side_of_patches(section)
        fix = f"must be a multiple of {side}" if side else f"{section.name} refuses it ({reason})"
        raise UserError("backbone.image_size", section.image_size, fix) from error


def without_dropout(model: nn.Module) -> nn.Module:
    """Set all dropout and stochastic depth of a model to 0, and return it.

    Some models of timm have such defaults. Their masks come from torch's global generator, so that a result would
    depend on what a process has computed before.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
        if isinstance(getattr(module, "drop_rate", None), float):
            vars(module)["drop_rate"] = 0.0
    return model


def _side_of_patches(section: BackboneSection) -> int | None:
    """Return how many pixels of the model's usual image a token covers per side, behind a stem too; None: unknown."""
    model, _ = _architecture(section.model_copy(update={"image_size": None}), 1, False)
    embedding = getattr(model, "patch_embed", None)
    sizes = [getattr(embedding, name, None) for name in ("img_size", "grid_size")]
    return sizes[0][0] // sizes[1][0] if all(isinstance(size, tuple) for size in sizes) else None  # type: ignore[index]


def _check_patches(section: BackboneSection, model: nn.Module) -> None:
    """Refuse an image size of the user's that patches do not divide: timm drops the pixels of the rest."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    if section.image_size is not None and isinstance(side, int) and section.image_size % side:
        fix = f"must be a multiple of {side}, the side of this model's patches: the pixels beyond would not be seen"
        raise UserError("backbone.image_size", section.image_size, fix)


def _resampled(positions: torch.Tensor, own: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Return positions ``[1, T, d]`` of another image size at the size of a model; any others unchanged.

    Args:
        positions: of a checkpoint.
        own: of the model.
        model: the timm model; of an architecture without a grid of patches no positions can be resampled.
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or positions.ndim != 3 or own.ndim != 3 or positions.shape[::2] != own.shape[::2]:
        return positions
    num_prefix_tokens = own.shape[1] - math.prod(grid)
    patches = positions.shape[1] - num_prefix_tokens
    if positions.shape == own.shape or patches < 1 or math.isqrt(patches) ** 2 != patches:
        return positions
    resampled: torch.Tensor = resample_abs_pos_embed(
        positions.float(), new_size=list(grid), num_prefix_tokens=num_prefix_tokens
    )
    return resampled


def _load_checkpoint(backbone: Backbone, path: Path, key: str) -> None:
    check_safetensors(path, key)
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(key, str(path), f"is not a readable safetensors file ({error})") from None
    own = backbone.model.state_dict()
    head = backbone.head_name
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in state and name in own and state[name].shape != own[name].shape:
            del state[name]
        state.setdefault(name, own[name])
    if "pos_embed" in own and "pos_embed" in state:
        state["pos_embed"] = _resampled(state["pos_embed"], own["pos_embed"], backbone.model)
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    foreign = [name for name in state if name not in own]
    if wrong or foreign:
        detail = f"{len(wrong)} tensors missing or of another shape" if wrong else f"{len(foreign)} unknown tensors"
        raise UserError(key, str(path), f"does not fit this model: {detail}, first {(wrong or foreign)[0]!r}")
    backbone.model.load_state_dict({name: value.float() for name, value in state.items()})
