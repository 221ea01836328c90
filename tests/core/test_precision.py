"""A precision that the machine is not made for is allowed, and said to be slow."""

from __future__ import annotations

import platform

import pytest
import torch

from sylva_ray.core.errors import UserError
from sylva_ray.core.precision import precision_notices
from sylva_ray.preparation import resolve

LOW = {"training.precision": "bfloat16", "evaluation.precision": "float32"}


def processor(monkeypatch: pytest.MonkeyPatch, machine: str, has_bfloat16: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_a_processor_without_instructions_for_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, "x86_64", has_bfloat16=False)
    (notice,) = precision_notices(LOW, "cpu")
    assert notice.startswith("training.precision = bfloat16: slow")
    assert "\n" not in notice
    (notice,) = precision_notices(dict.fromkeys(LOW, "bfloat16"), "cpu")
    assert notice.startswith("training.precision and evaluation.precision = bfloat16: slow")
    assert not precision_notices(dict.fromkeys(LOW, "float32"), "cpu")


@pytest.mark.parametrize(("machine", "has_bfloat16"), [("x86_64", True), ("aarch64", False)])
def test_others_are_not(machine: str, has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, machine, has_bfloat16)
    assert not precision_notices(LOW, "cpu")


@pytest.mark.parametrize(("capability", "is_slow"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_gpus_have_them_since_ampere(
    capability: tuple[int, int], is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert bool(precision_notices(LOW, "cuda")) == is_slow


def test_nothing_is_said_of_a_gpu_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not precision_notices(LOW, "cuda")


@pytest.mark.parametrize(
    ("driver", "says"), [(None, "this machine has no GPU"), ("470.1", "cannot use the GPU with driver 470.1")]
)
def test_a_driver_that_is_too_old_is_not_called_no_gpu(
    driver: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(resolve, "driver_version", lambda: driver)
    with pytest.raises(UserError, match=says):
        resolve.local_device("cuda")
