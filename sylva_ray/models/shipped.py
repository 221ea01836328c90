"""The backbones whose weights are part of this package.

They are small, so that everything runs where nothing can be downloaded. A model card lies beside every file of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

VIT_MICRO: Mapping[str, object] = MappingProxyType(
    {
        "model_name": "vit_tiny_patch16_224",
        "img_size": 32,
        "patch_size": 8,
        "depth": 6,
        "embed_dim": 192,
        "num_heads": 3,
    }
)
"""A small vision transformer for images of 32 pixels."""


@dataclass(frozen=True)
class ShippedBackbone:
    """A backbone of this package.

    Attributes:
        file: name of its files without their suffix.
        architecture: arguments of ``timm.create_model``. Pixels are normalised with ImageNet's mean and standard
            deviation.
    """

    file: str
    architecture: Mapping[str, object]

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
    "vit_micro_patch8_32": ShippedBackbone("vit_micro", VIT_MICRO),  # its name in run folders of version 0.1
}
"""The backbones of this package by name."""
