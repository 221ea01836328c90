"""The work of a client without a framework: PGD adversarial fine-tuning of LoRA adapters and a personal head.

timm, PEFT and torch alone; the plain loop and the Flower app use it alike. It is what `sylva_ray` does with a client in
a round of ``sylva_paper_like``: rank 8 on the linear layers of attention, a fresh AdamW, one local epoch in batches of
32, gradients clipped to norm 1, on one thread. The environment variable ``PEERS_PRECISION`` is that of the passes:
float32, or bfloat16 by autocasting.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

EPSILON, LR, BATCH = 4 / 255, 0.01, 32

Arrays = list[np.ndarray]

torch.set_num_threads(1)


class PixelModel(nn.Module):
    """A model that takes pixels in [0, 1]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits of ``[n, 3, H, W]`` pixels, in float32."""
        low = os.environ["PEERS_PRECISION"] == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits: torch.Tensor = self.model((pixels - self.mean) / self.std)
        return logits.float()


@dataclass
class Client:
    """A model with the names of what travels, and of what stays with a client."""

    model: PixelModel
    adapters: list[str]
    head: list[str]

    def arrays(self, names: Sequence[str]) -> Arrays:
        """Return copies of parameters."""
        own = dict(self.model.named_parameters())
        return [own[name].detach().numpy().copy() for name in names]

    @torch.no_grad()
    def load(self, names: Sequence[str], arrays: Arrays) -> None:
        """Overwrite parameters."""
        own = dict(self.model.named_parameters())
        for name, array in zip(names, arrays, strict=True):
            own[name].copy_(torch.from_numpy(np.array(array)))


def build_client() -> Client:
    """Build the backbone that the environment variable ``PEERS_BACKBONE`` describes, with adapters."""
    torch.manual_seed(0)  # so that every process begins with the same adapters and head
    backbone = json.loads(os.environ["PEERS_BACKBONE"])
    model = timm.create_model(**backbone["options"], num_classes=10)
    weights = {name: value.float() for name, value in load_file(backbone["file"]).items()}
    own_head = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
    model.load_state_dict(weights | own_head)
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules=r".*attn\.(qkv|proj)", modules_to_save=["head"]
    )
    pixel_model = PixelModel(get_peft_model(model, lora), backbone["mean"], backbone["std"]).eval()
    trained = [name for name, parameter in pixel_model.named_parameters() if parameter.requires_grad]
    adapters = [name for name in trained if "lora_" in name]
    return Client(pixel_model, adapters, [name for name in trained if name not in adapters])


@cache
def _data() -> tuple[np.ndarray, np.ndarray]:
    with np.load(os.environ["PEERS_DATA"]) as file:
        return file["images"], file["labels"]


def train(client: Client, number: int, num_images: int, steps: int) -> None:
    """Train for one local epoch on the images of a client.

    Args:
        client: its model.
        number: of the client.
        num_images: that it has.
        steps: of PGD; 0: benign.
    """
    torch.manual_seed(number)
    images, labels = (values[number * num_images : (number + 1) * num_images] for values in _data())
    trained = [parameter for parameter in client.model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LR, weight_decay=1e-4)
    for rows in np.split(torch.randperm(num_images).numpy(), range(BATCH, num_images, BATCH)):
        x, y = torch.from_numpy(images[rows]).float() / 255, torch.from_numpy(labels[rows])
        optimiser.zero_grad()
        F.cross_entropy(client.model(_attacked(client.model, x, y, steps) if steps else x), y).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()


def _attacked(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> torch.Tensor:
    found = (x + EPSILON * (torch.rand_like(x) * 2 - 1)).clamp(0, 1)
    for _ in range(steps):
        found.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(found), y, reduction="sum"), found)
        found = found.detach() + min(EPSILON, 2.5 * EPSILON / steps) * gradient.sign()
        found = torch.minimum(torch.maximum(found, x - EPSILON), x + EPSILON).clamp(0, 1)
    return found


@dataclass(frozen=True)
class Rounds:
    """What a system is to do, and the file for the marks of when its rounds begin."""

    num_clients: int
    num_images: int
    steps: int
    rounds: int
    marks: Path


def parse_arguments(description: str | None) -> Rounds:
    """Read the command line of a system."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, meaning in (("clients", ""), ("images", "of a client"), ("steps", "of PGD; 0: benign"), ("rounds", "")):
        parser.add_argument(name, type=int, help=meaning)
    parser.add_argument("marks", type=Path, help="when every round began, as JSON, is written here")
    given = parser.parse_args()
    return Rounds(given.clients, given.images, given.steps, given.rounds, given.marks)


def mark() -> dict[str, Any]:
    """Return the time, and the CPU seconds that the whole machine has worked since it was started."""
    busy = psutil.cpu_times()
    return {"time": time.time(), "cpu": busy.user + busy.nice + busy.system}
