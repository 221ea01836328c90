"""Read and write adapters in the format of PEFT, without importing peft, except to prove that it loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load_file, save

from sylva_ray.config.experiment import BackboneSection, LoraSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ClientState
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.run_folder import ADAPTER_FILES

if TYPE_CHECKING:
    from torch import nn

PREFIX = "base_model.model."
WEIGHTS, ADAPTER_CONFIG = ADAPTER_FILES
MERGED = "model.safetensors"


@dataclass(frozen=True)
class AdapterLayout:
    """What an adapter's file holds beside the factors of linear layers.

    Attributes:
        whole: names of the parameters that are saved as they are: the classifier's weight and bias, and trained norms.
        kernels: shapes of the weights of adapted convolutions, ``{module: (out, in, height, width)}``.
        companions: `sylva_ray.models.backbone.head_companions`, which PEFT expects in the file, too.
    """

    whole: tuple[str, ...]
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    companions: Mapping[str, np.ndarray] = field(default_factory=dict)


def save_adapter(
    state: ClientState,
    folder: Path,
    backbone: BackboneSection,
    lora: LoraSection,
    layout: AdapterLayout,
) -> Path:
    """Write one client as an adapter that ``PeftModel.from_pretrained(timm_model, folder)`` loads.

    The head and trained norms are part of the file (``modules_to_save``). Equal states write equal bytes: there is no
    time or path in them.

    Args:
        state: the client's state.
        folder: the adapter's folder; made if it does not exist.
        backbone: the model that the adapter belongs to.
        lora: rank, alpha and adapted layers.
        layout: which arrays the file has beside the factors, and in what shapes.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {  # without the probe of a teacher
        name: value for name, value in state.items() if name.endswith((".lora_A", ".lora_B")) or name in layout.whole
    }
    saved = {**adapter, **layout.companions}
    for module, (_, *inputs) in layout.kernels.items():
        saved[f"{module}.lora_A"] = saved[f"{module}.lora_A"].reshape(-1, *inputs)
        saved[f"{module}.lora_B"] = saved[f"{module}.lora_B"][:, :, None, None]
    arrays = {_peft_name(name): np.ascontiguousarray(value) for name, value in sorted(saved.items())}
    write_atomically(folder / WEIGHTS, save(arrays))
    modules = sorted({name.rsplit(".", 1)[0] for name in adapter if name not in layout.whole})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": backbone.name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": modules,  # full names: PEFT's suffix rule then matches exactly these
        "modules_to_save": sorted({name.rsplit(".", 1)[0] for name in layout.whole}),
        "bias": "none",
        "inference_mode": True,
    }
    write_atomically(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def save_merged(state: ClientState, folder: Path, backbone: Mapping[str, np.ndarray], lora: LoraSection) -> Path:
    """Write the client's whole model as ``model.safetensors``, which loads into the timm model.

    Args:
        state: the client's state.
        folder: where to write it.
        backbone: the frozen weights W; the file holds W + (alpha / r) B A.
        lora: rank and alpha.

    Returns:
        The file.
    """
    merged = {name: np.array(value) for name, value in backbone.items()}
    for name, value in state.items():
        if name.endswith(".lora_A"):
            module = name.removesuffix(".lora_A")
            update = lora.alpha / lora.rank * state[f"{module}.lora_B"].astype(np.float64) @ value
            merged[f"{module}.weight"] = (
                merged[f"{module}.weight"] + update.reshape(merged[f"{module}.weight"].shape)
            ).astype(np.float32)
        elif name in merged:
            merged[name] = value
    arrays = {name: np.asarray(value, order="C") for name, value in sorted(merged.items())}
    return write_atomically(folder / MERGED, save(arrays))


def load_adapter(folder: Path) -> dict[str, np.ndarray]:
    """Read an adapter that `save_adapter` or PEFT wrote.

    Returns:
        ``{parameter name: float32 array}``, named as in a client's state.

    Raises:
        UserError: the folder holds no adapter, or its file is corrupt.
    """
    try:
        raw = load_file(folder / WEIGHTS)
    except Exception as error:
        raise UserError("adapter", str(folder), f"has no readable {WEIGHTS} ({error})") from None
    return {
        name: np.asarray(value, np.float32).reshape(len(value), -1)
        if "lora_" in name
        else np.asarray(value, np.float32)
        for name, value in ((_state_name(name), value) for name, value in raw.items())
    }


def load_in_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Return a timm model with an adapter that PEFT itself has loaded, in evaluation mode.

    PEFT takes 2 s and 70 MB to import; nothing else here needs it.
    """
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


def _peft_name(name: str) -> str:
    return f"{PREFIX}{name}.weight" if name.endswith(("lora_A", "lora_B")) else f"{PREFIX}{name}"


def _state_name(name: str) -> str:
    name = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".modules_to_save", "")
    for factor in ("lora_A", "lora_B"):
        name = name.replace(f".{factor}.default.weight", f".{factor}").replace(f".{factor}.weight", f".{factor}")
    return name
