"""A process limits itself to its share of a GPU."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch.cuda._utils import _get_device_index

from sylva_ray.config.cluster import ClusterSection
from sylva_ray.models.device_memory import (
    GPU_PROCESS_BYTES,
    can_be_resident,
    enforce_share,
    use_expandable_segments,
)

TOTAL = 24 * 10**9


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"gpus_per_actor": 0.5}, TOTAL / 2),
        ({"gpus_per_actor": 0.5, "memory_per_actor": "8 GB"}, 8e9),
        ({"gpus_per_actor": 2.0}, TOTAL),
        ({"pool": "in_process"}, TOTAL),
    ],
)
def test_the_share_of_the_current_gpu_is_limited(
    settings: dict[str, object], allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own rules for the device hold here: one without an index is refused."""
    limits = []

    def limit(fraction: float, device: torch.device | int | None = None) -> None:
        if device is not None:
            _get_device_index(device)
        limits.append(fraction)

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=TOTAL))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    enforce_share(torch.device("cuda"), ClusterSection.model_validate(settings))
    assert limits == [pytest.approx((allowed - GPU_PROCESS_BYTES) / TOTAL)]


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_what_a_user_configures_of_the_allocator_stands(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its two variables, torch reads the one with CUDA first, and then not the other."""
    environment = {name: "max_split_size_mb:64"} if name else {}
    monkeypatch.setattr("os.environ", dict(environment))
    use_expandable_segments()
    assert os.environ == (environment or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


def test_on_a_cpu_nothing_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: pytest.fail("there is no GPU"))
    enforce_share(torch.device("cpu"), ClusterSection())


def test_images_stay_on_a_gpu_where_they_take_a_tenth_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * 10**9, TOTAL))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.25)  # 6 GB, less than what is free
    gpu = torch.device("cuda")
    assert can_be_resident(600_000_000, gpu)
    assert not can_be_resident(600_000_001, gpu)
    assert not can_be_resident(1, torch.device("cpu"))
