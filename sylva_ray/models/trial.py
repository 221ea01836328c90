"""Try a model on a few images before a run, because timm's architectures differ in what an adapter may rely on.

A run of any model first computes a gradient of every trained array. Architectures other than timm's
`VisionTransformer`, for which tests hold the rest, also prove that the clients of a stack do not influence each other,
and that an exported adapter gives the same logits in PEFT. All of it takes a few forward passes of single images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from sylva_ray.config.experiment import BackboneSection, LoraSection
from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import ClientState, stack_states
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import CohortModel, repeat_owner, to_parameters
from sylva_ray.models.lora import LoraStack, adapter_layout, is_plain_vit
from sylva_ray.models.peft_format import load_in_peft, save_adapter

TOLERANCE = 1e-3
"""Largest difference between logits that should be equal, relative to the largest logit."""


def try_model(
    model: CohortModel,
    state: ClientState,
    image_size: int,
    backbone: BackboneSection,
    lora: LoraSection,
    weights: Mapping[str, np.ndarray],
) -> None:
    """Check that a model can be trained, stacked and exported.

    Args:
        model: in float32, on the CPU.
        state: what a client starts from.
        image_size: side of the data set's images in pixels.
        backbone: the timm model.
        lora: its adapters.
        weights: the state_dict of the timm model.

    Raises:
        UserError: it cannot; names the layer or the architecture's complaint.
    """
    rng = generator(0, "trial")
    x = torch.rand(3, 3, image_size, image_size, generator=rng)
    _check_gradients(model, state, x[:2], backbone.name)
    if isinstance(model, LoraStack) and not is_plain_vit(model.backbone.model):
        first, second = _moved(state, rng), _moved(state, rng)
        alone = _logits(model, [second], x[1:])
        _compare(
            _logits(model, [first, second], x, [1, 2])[1:],
            alone,
            UserError("backbone.name", backbone.name, "mixes the images of a batch, so clients cannot be stacked"),
        )
        exported = _logits_in_peft(second, x[1:], backbone, lora, model.head_names, weights)
        fix = "its adapters do not give the same logits in PEFT, so they cannot be exported"
        _compare(exported, alone, UserError("backbone.name", backbone.name, fix))


def _check_gradients(model: CohortModel, state: ClientState, x: torch.Tensor, name: str) -> None:
    """Check that every trained array of one client gets a gradient."""
    params = to_parameters(stack_states([state]), "cpu", torch.float32)
    leaves = {key: value.requires_grad_() for key, value in params.items() if model.trainable(key)}
    try:
        with model.training():
            loss = model.forward(params, x, repeat_owner([len(x)])).square().sum()
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    except UserError:
        raise
    except Exception as error:  # the code of any architecture
        raise UserError("backbone.name", name, f"cannot be trained here: {_one_line(error)}") from error
    for key, gradient in zip(leaves, gradients, strict=True):
        if gradient is None and key.endswith(".lora_B"):
            fix = f"{name} does not use {key.removesuffix('.lora_B')}, so an adapter there has no effect: leave it out"
            raise UserError("lora.target_modules", key.removesuffix(".lora_B"), fix)
        if gradient is None and not key.endswith(".lora_A"):
            way = (
                "set lora.train_norms=false" if isinstance(model, LoraStack) else "freeze it with requires_grad_(False)"
            )
            raise UserError("backbone.name", name, f"does not use its parameter {key}: remove it, or {way}")


def _moved(state: ClientState, rng: torch.Generator) -> dict[str, np.ndarray]:
    """Return a state in which everything differs from the start, where every B and the bias of the head are 0."""
    return {name: value + 0.05 * torch.randn(value.shape, generator=rng).numpy() for name, value in state.items()}


def _logits(
    model: CohortModel, states: list[dict[str, np.ndarray]], x: torch.Tensor, counts: list[int] | None = None
) -> torch.Tensor:
    params = to_parameters(stack_states(states), "cpu", torch.float32)
    with torch.no_grad():
        return model.forward(params, x, repeat_owner(counts or [len(x)]))


def _logits_in_peft(
    state: ClientState,
    x: torch.Tensor,
    backbone: BackboneSection,
    lora: LoraSection,
    head_names: tuple[str, ...],
    weights: Mapping[str, np.ndarray],
) -> torch.Tensor:
    """Return the logits of an exported client, loaded by PEFT."""
    plain = create_backbone(backbone, len(state[head_names[1]]), weights)
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_adapter(state, Path(folder), backbone, lora, adapter_layout(plain, lora))
            loaded = load_in_peft(plain.model, Path(folder))
        except Exception as error:  # PEFT refuses architectures in many ways
            fix = f"its adapters cannot be loaded by PEFT: {_one_line(error)}"
            raise UserError("backbone.name", backbone.name, fix) from error
        with torch.no_grad():
            logits: torch.Tensor = loaded(plain.preprocess(x))
    return logits


def _compare(found: torch.Tensor, expected: torch.Tensor, error: UserError) -> None:
    if not float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()):
        raise error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"
