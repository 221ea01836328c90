"""Export trained clients to files that other programs read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ClientState
from sylva_ray.models.backbone import backbone_arrays, create_backbone
from sylva_ray.models.lora import adapter_layout
from sylva_ray.models.peft_format import save_adapter, save_merged
from sylva_ray.storage.run_folder import adapter_folder


def export_clients(
    config: ExperimentConfig,
    states: Sequence[ClientState],
    clients: Iterable[int],
    folder: Path,
    merged: bool = False,
    changed: Sequence[str] = (),
) -> list[Path]:
    """Write one PEFT adapter per client to ``folder/client_000/``.

    Args:
        config: the experiment.
        states: the states of all clients.
        clients: which of them to export.
        folder: the folder of the clients' folders.
        merged: also write each client's whole model as ``model.safetensors``.
        changed: weights that are not those of the run, in words; ``README.md`` says so.

    Returns:
        The clients' folders.

    Raises:
        UserError: the run trained full models, which have no adapters.
    """
    probe = create_backbone(config.backbone, num_classes=2)
    backbone = create_backbone(config.backbone, num_classes=len(states[0][f"{probe.head_name}.bias"]))
    if not any(name.endswith(".lora_A") for name in states[0]):
        raise UserError("algorithm.model", "full", "has no adapters to export")
    layout = adapter_layout(backbone, config.lora)
    folders = []
    for client in clients:
        target = adapter_folder(folder, client)
        save_adapter(states[client], target, config.backbone, config.lora, layout)
        if merged:
            if changed:
                text = f"`model.safetensors` was merged with other weights than the run had: {', '.join(changed)}.\n"
                (target / "README.md").write_text(text)
            save_merged(states[client], target, backbone_arrays(backbone), config.lora)
        folders.append(target)
    return folders
