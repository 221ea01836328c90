"""Bytes by arithmetic and by payload: what a client uploads per round, against the full model in fp32.

The arithmetic counts float32 parameters from the layers' shapes; the payload is the length of the safetensors buffer that
would travel. They differ by the header alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.numpy import save

from sylva_ray.config import BackboneSection, LoraSection
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import full_model_bytes
from sylva_ray.models.lora import LoraStack


@dataclass(frozen=True)
class UploadRow:
    """One way of sharing: ``arithmetic`` and ``payload`` bytes per client and round; ``ratio`` is full model / arithmetic."""

    method: str
    rank: int | None
    arithmetic: int
    payload: int
    ratio: float


def upload_table(
    backbone: BackboneSection, lora: LoraSection, ranks: Sequence[int], num_classes: int
) -> list[UploadRow]:
    """Uploads of full-model training, of LoRA (A and B, with and without the head) and of LoRA-FA (B alone).

    Raises:
        UserError: unknown backbone, targets that match nothing, a rank that does not fit.
    """
    shapes_only = backbone.model_copy(update={"pretrained": False})
    rows: list[UploadRow] = []
    for rank in ranks:
        model = create_backbone(shapes_only, num_classes)
        full = full_model_bytes(model)
        if not rows:
            payload = len(save({n: p.detach().numpy() for n, p in model.model.named_parameters()}))
            rows.append(UploadRow("full model", None, full, payload, 1.0))
        stack = LoraStack(model, lora.model_copy(update={"rank": rank}))
        state = stack.initial_state(torch.Generator())
        adapters = {name: value for name, value in state.items() if name not in stack.head_names}
        factors_b = {name: value for name, value in adapters.items() if name.endswith("lora_B")}
        for method, upload in (("LoRA + head", state), ("LoRA", adapters), ("LoRA-FA", factors_b)):
            arithmetic = sum(4 * value.size for value in upload.values())
            rows.append(UploadRow(method, rank, arithmetic, len(save(upload)), full / arithmetic))
    return rows
