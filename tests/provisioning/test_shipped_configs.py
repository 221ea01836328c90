"""The configurations for cloud GPUs build and are planned without a network: their weights are random here."""

from __future__ import annotations

from pathlib import Path

import pytest

from sylva_ray.config.experiment import ExperimentConfig, load_config
from sylva_ray.execution.ray.launcher import RayLauncher
from sylva_ray.provisioning.demand import Demand, estimate_demand
from sylva_ray.provisioning.launcher_file import load_launcher_file

ROOT = Path(__file__).parents[2]


def planned(name: str) -> tuple[ExperimentConfig, Demand]:
    """The configuration, and what it asks of the shipped cluster."""
    config = load_config(ROOT / "configs" / f"{name}.yaml", ["cluster.gpus_per_actor=1"])
    launcher = RayLauncher()
    return config, estimate_demand(config, load_launcher_file(ROOT / "cluster.yaml", launcher), launcher)


@pytest.mark.parametrize(
    ("name", "parameters", "width"), [("vit_base", 85_806_346, 768), ("vit_small", 21_669_514, 384)]
)
def test_a_configuration_for_a_cloud_gpu(name: str, parameters: int, width: int) -> None:
    """Rank 8 on four layers of twelve blocks (16 widths of rows and columns in all), and a head for ten classes."""
    config, demand = planned(name)
    assert config.backbone.pretrained
    assert (config.partition.num_clients, demand.config.training.device) == (100, "cuda")
    assert demand.traffic.backbone_bytes == 4 * parameters
    assert demand.traffic.data_bytes > 60_000 * 3 * 32 * 32
    assert demand.traffic.state_bytes == 4 * (12 * 8 * 16 * width + 10 * width + 10)
    assert sum(demand.nodes.values()) >= 1
    assert demand.waiting == 0
