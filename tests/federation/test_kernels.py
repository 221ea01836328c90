"""A training step asks a device for few operations, and waits for none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from benchmarks.kernels import KernelCounter, step_counts
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.config.training import TrainingSection
from sylva_ray.federation.client.optim import StackedOptimizer

METHODS: list[Mapping[str, Any]] = [
    {"name": "sylva"},
    {"name": "sylva", "loss": "trades", "benign_weight": 0.5, "class_balance": 0.9},
    {"name": "lorica"},
    {"name": "dbfat"},
]


def config(steps: int = 1, method: Mapping[str, Any] | None = None, **sections: Any) -> ExperimentConfig:
    given: dict[str, Any] = {
        "algorithm": method or {"name": "sylva"},
        "attack": {"steps": steps},
        "training": {"batch_size": 2, "precision": "float32", "attention": "fused", "augment": "flip_crop"},
        "partition": {"num_clients": 3},
    }
    return build(ExperimentConfig, given | sections)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_training_step_waits_for_nothing(method: Mapping[str, Any], ragged: bool) -> None:
    counter = step_counts(config(method=method), 3, ragged)
    assert not +counter.synchronisations
    assert counter.kernels.total() > 100


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("masked", [False, True])
def test_an_optimiser_step_is_few_operations_however_many_parameters_there_are(name: str, masked: bool) -> None:
    """ViT-B has 98 adapted matrices and parameters of the head."""
    params = {f"p{i}": torch.ones(2, 4, 3) for i in range(98)}
    gradients = {key: torch.ones(2, 3, 4).mT for key in params}  # as adapters have them
    masks = {key: torch.tensor([True, False]) for key in params} if masked else None
    optimizer = StackedOptimizer(params, TrainingSection(optimizer=name), 0.1, masks)
    active = torch.tensor([True, True])
    optimizer.step(gradients, active)
    with KernelCounter() as counter:
        optimizer.step(gradients, active)
    assert counter.kernels.total() <= 60, counter.kernels
    assert not counter.synchronisations


@pytest.mark.parametrize(
    ("precision", "most"), [("float32", 5000), pytest.param("bfloat16", 5500, marks=pytest.mark.slow)]
)
def test_a_pgd10_step_of_vit_base(precision: str, most: int) -> None:
    """Two clients with adapters on the attention; ViT-Ti has the same 12 blocks, and sizes do not change the number."""
    sections: dict[str, Any] = {
        "backbone": {"name": "vit_tiny_patch16_224", "image_size": 32},
        "lora": {"target_modules": ["attn.qkv", "attn.proj"]},
        "training": {"batch_size": 1, "precision": precision, "attention": "fused"},
    }
    counter = step_counts(config(10, **sections), 2)
    assert not +counter.synchronisations
    assert 1000 < counter.kernels.total() <= most


def test_the_counter_knows_what_waits() -> None:
    x = torch.arange(4.0)
    with KernelCounter() as counter:
        float(x.sum())
        x[x > 1]
        x[torch.tensor([1, 2])]
        (x > 1).nonzero()
        bool(x.sum() > 3)
        x.view(2, 2).mT.detach()
    assert counter.synchronisations.total() == 4
    assert counter.kernels == {"sum": 2, "gt": 3, "index": 1}
