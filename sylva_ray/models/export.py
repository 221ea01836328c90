"""Export trained clients to files that other programs read: PEFT adapters, whole timm models, ONNX.

::

    FOLDER/
        load.py                     loads any client with timm and PEFT alone
        base.safetensors            the frozen backbone, where timm cannot fetch it by name
        client_000/
            adapter_model.safetensors, adapter_config.json     PEFT's files, or
            model.safetensors                                  the whole model
            model.onnx                                         the same for ONNX Runtime: takes pixels in [0, 1]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.types import ClientState
from sylva_ray.models.backbone import backbone_arrays, create_backbone
from sylva_ray.models.load_script import BASE, SCRIPT, base_file, load_script
from sylva_ray.models.lora import adapter_layout
from sylva_ray.models.peft_format import save_adapter, save_merged
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.run_folder import adapter_folder


@dataclass(frozen=True)
class ExportOptions:
    """What is written beside PEFT's files.

    Attributes:
        merged: each client's whole model as ``model.safetensors``. A method that trains whole models has no other form.
        onnx: the same as ``model.onnx``.
    """

    merged: bool = False
    onnx: bool = False


def export_clients(
    config: ExperimentConfig,
    states: Sequence[ClientState],
    clients: Iterable[int],
    folder: Path,
    class_names: Sequence[str] | None = None,
    options: ExportOptions | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
) -> list[Path]:
    """Write clients to ``folder/client_000/`` and so on, and a script that loads them.

    Args:
        config: the experiment.
        states: the states of all clients.
        clients: which of them to export.
        folder: the folder of the clients' folders.
        class_names: in the order of the logits; None: they are numbered.
        options: see `ExportOptions`; None: the defaults.
        weights: of the backbone; None: they are read again from where the experiment has them.

    Returns:
        The clients' folders.

    Raises:
        UserError: ONNX is asked for, and its packages are not installed.
    """
    options = options or ExportOptions()
    if not class_names:
        head = create_backbone(config.backbone, num_classes=2).head_name
        class_names = [str(number) for number in range(len(states[0][f"{head}.bias"]))]
    backbone = create_backbone(config.backbone, len(class_names), weights)
    has_adapters = any(name.endswith(".lora_A") for name in states[0])
    has_base = has_adapters and not (config.backbone.pretrained and config.backbone.checkpoint is None)
    own = config.backbone.name.partition(":")[0] if ":" in config.backbone.name else None
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SCRIPT, load_script(backbone, class_names, has_adapters, has_base, own))
    if has_base:
        write_atomically(folder / BASE, base_file(backbone))
    layout, arrays = adapter_layout(backbone, config.lora) if has_adapters else None, backbone_arrays(backbone)
    folders = []
    for client in clients:
        target = adapter_folder(folder, client)
        target.mkdir(parents=True, exist_ok=True)
        if layout is not None:
            save_adapter(states[client], target, config.backbone, config.lora, layout)
        if options.merged or options.onnx or layout is None:
            whole = save_merged(states[client], target, arrays, config.lora)
            if options.onnx:
                from sylva_ray.models.onnx_format import save_onnx

                backbone.model.load_state_dict(load_file(whole))
                save_onnx(backbone, target)
        folders.append(target)
    return folders
