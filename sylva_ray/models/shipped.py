"""The backbones whose weights are part of this package.

They are small, so that everything runs where nothing can be downloaded. A model card lies beside every file of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class Architecture:
    """A timm model, and how pixels are normalised for it.

    Attributes:
        arguments: of ``timm.create_model``.
        mean: of each channel, in pixel units.
        std: of each channel, in pixel units.
    """

    arguments: Mapping[str, object]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_SIZES = {"img_size": 32, "depth": 6, "embed_dim": 192, "num_heads": 3}

VIT_MICRO = Architecture(
    MappingProxyType({"model_name": "vit_tiny_r_s16_p8_224", "patch_size": 2, **_SIZES}),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
"""A small vision transformer on the features of a convolutional stem, for images of 32 pixels."""

VIT_MICRO_PATCH8 = Architecture(
    MappingProxyType({"model_name": "vit_tiny_patch16_224", "patch_size": 8, **_SIZES}),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
"""A small vision transformer on patches of 8 pixels; normalised like ImageNet."""


@dataclass(frozen=True)
class ShippedBackbone:
    """A backbone of this package.

    Attributes:
        file: name of its files without their suffix.
        architecture: of its model.
    """

    file: str
    architecture: Architecture

    @property
    def checkpoint(self) -> Path:
        """The weights: a safetensors file of the model's state_dict in half precision."""
        return Path(str(files("sylva_ray") / "assets" / f"{self.file}.safetensors"))

    @property
    def card(self) -> Path:
        """The model card: data, recipe, cost and accuracies."""
        return self.checkpoint.with_suffix(".md")


SHIPPED = {
    "vit_micro": ShippedBackbone("vit_micro", VIT_MICRO),
    "vit_micro_robust": ShippedBackbone("vit_micro_robust", VIT_MICRO),
}
"""The backbones of this package by name."""

RETIRED: Mapping[str, Architecture] = MappingProxyType({"vit_micro_patch8_32": VIT_MICRO_PATCH8})
"""The architectures, by name, of backbones whose weights were part of earlier versions, and are no longer."""
