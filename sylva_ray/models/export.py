"""Export trained clients to files that other programs read: PEFT adapters, whole timm models, ONNX.

::

    FOLDER/
        load.py                     loads any client with timm and PEFT alone
        base.safetensors            the frozen backbone, where timm cannot fetch it by name
        client_000/
            adapter_model.safetensors, adapter_config.json     PEFT's files, or
            model.safetensors                                  the whole model
            model.onnx                                         the same for ONNX Runtime: takes pixels in [0, 1]
            README.md                                          the model card
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ClientState
from sylva_ray.models.backbone import backbone_arrays, create_backbone
from sylva_ray.models.load_script import BASE, SCRIPT, base_file, load_script
from sylva_ray.models.lora import adapter_layout
from sylva_ray.models.onnx_format import ONNX, save_onnx
from sylva_ray.models.peft_format import ADAPTER_CONFIG, MERGED, WEIGHTS, save_adapter, save_merged
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.run_folder import adapter_folder

CARD = "README.md"
"""Name of a client's model card."""


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
    on_client: Callable[[int, Path], None] | None = None,
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
        on_client: called with a client and its folder, after the folder was written.

    Returns:
        The clients' folders.

    Raises:
        UserError: ONNX is asked for, and its packages are not installed; or the folder holds other clients of another
            export, which could not be loaded any more.
    """
    options = options or ExportOptions()
    if not class_names:
        head = create_backbone(config.backbone, num_classes=2).head_name
        class_names = [str(number) for number in range(len(states[0][f"{head}.bias"]))]
    backbone = create_backbone(config.backbone, len(class_names), weights)
    has_adapters = any(name.endswith(".lora_A") for name in states[0])
    has_base = has_adapters and not (config.backbone.pretrained and config.backbone.checkpoint is None)
    own = config.backbone.name.partition(":")[0] if ":" in config.backbone.name else None
    clients, folder = list(clients), Path(folder)
    shared = {SCRIPT: load_script(backbone, class_names, has_adapters, has_base, own).encode()}
    if has_base:
        shared[BASE] = base_file(backbone)
    _check_same_export(folder, clients, shared)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in shared.items():
        write_atomically(folder / name, content)
    layout = adapter_layout(backbone, config.lora) if has_adapters else None
    arrays = backbone_arrays(deepcopy(backbone) if options.onnx else backbone)  # it gets the weights of every client
    written = {WEIGHTS, ADAPTER_CONFIG} if has_adapters else set()
    written |= {MERGED} if options.merged or options.onnx or not has_adapters else set()
    written |= {ONNX} if options.onnx else set()
    folders = []
    for client in clients:
        target = adapter_folder(folder, client)
        target.mkdir(parents=True, exist_ok=True)
        if layout is not None:
            save_adapter(states[client], target, config.backbone, config.lora, layout)
        if MERGED in written:
            whole = save_merged(states[client], target, arrays, config.lora)
            if options.onnx:
                backbone.model.load_state_dict(load_file(whole))
                save_onnx(backbone, target, class_names)
        for name in {WEIGHTS, ADAPTER_CONFIG, MERGED, ONNX, CARD} - written:  # of an earlier export
            (target / name).unlink(missing_ok=True)
        folders.append(target)
        if on_client is not None:
            on_client(client, target)
    return folders


def _check_same_export(folder: Path, clients: Sequence[int], shared: Mapping[str, bytes]) -> None:
    """Refuse a folder with other clients that need another script or backbone than this export writes.

    Args:
        folder: of the export.
        clients: that are exported.
        shared: the files that all clients of the folder use, ``{name: content}``.

    Raises:
        UserError: there are such clients.
    """
    own = {adapter_folder(folder, client) for client in clients}
    others = sorted(path.name for path in folder.glob("client_*") if path not in own)
    differs = any((folder / name).exists() and (folder / name).read_bytes() != new for name, new in shared.items())
    if others and differs:
        fix = f"has clients of another export ({others[0]}), whose load.py or backbone differs: name another folder"
        raise UserError("--to", str(folder), fix)
