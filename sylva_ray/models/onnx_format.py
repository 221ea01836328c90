"""Write a whole model as ONNX, with resizing and normalisation inside, for runtimes without PyTorch."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sylva_ray.core.errors import UserError
from sylva_ray.core.version import __version__
from sylva_ray.models.backbone import Backbone

ONNX, OPSET = "model.onnx", 18
"""Name of the file, and the version of its operators."""


class Deployed(nn.Module):
    """The model from pixels to logits; images of any size are resized.

    Args:
        backbone: with the weights of a client.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model, self.size = backbone.model, backbone.image_size
        self.register_buffer("mean", backbone.mean)
        self.register_buffer("std", backbone.std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits ``[N, num_classes]`` of ``images [N, 3, H, W] in [0, 1]``."""
        resized = nn.functional.interpolate(images, size=(self.size, self.size), mode="bilinear")
        logits: torch.Tensor = self.model((resized - self.mean) / self.std)
        return logits


def save_onnx(backbone: Backbone, folder: Path, classes: Sequence[str]) -> Path:
    """Write ``model.onnx``: input ``images [N, 3, H, W] float32 in [0, 1]``, output ``logits [N, num_classes]``.

    The file's metadata says so, too, and has ``opset`` and ``classes``, a JSON list of the names of the logits.

    Args:
        backbone: with the weights of a client.
        folder: where to write it.
        classes: names of the classes, in the order of the logits.

    Returns:
        The file.

    Raises:
        UserError: the packages onnx and onnxscript are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("--format", "onnx", f"needs {error.name}: pip install 'sylva-ray[onnx]'") from None
    path, size = folder / ONNX, backbone.image_size
    sizes = {0: torch.export.Dim("N"), 2: torch.export.Dim("H"), 3: torch.export.Dim("W")}
    example = torch.rand(2, 3, size + 3, size + 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            copy.deepcopy(Deployed(backbone)).eval(),
            (example,),
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes={"images": sizes},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(
        opset=str(OPSET),
        classes=json.dumps(list(classes)),
        images="float32 [N, 3, H, W], RGB in [0, 1]; the model resizes and normalises them",
        exported_by=f"sylva_ray {__version__}",
    )
    program.save(str(path), external_data=False)
    return path
