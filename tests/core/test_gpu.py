"""The check of a machine's GPUs, with a made-up `nvidia-smi`: a worker that cannot compute ends with one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sylva_ray.cli import app
from sylva_ray.core import gpu
from sylva_ray.core.errors import UserError


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `nvidia-smi` that prints what a test writes into it; the only program on the path."""
    path = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    return path


def says(path: Path, text: str, code: int = 0) -> None:
    path.write_text(f"#!/bin/sh\necho '{text}'\nexit {code}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "code", "parts"),
    [
        ("NVIDIA L4, 570.86.15, 23034", 0, ["570.86.15", "CUDA 13.2 needs R580 or newer", "metadata.image"]),
        ("NVIDIA L4, 580.95.05, 23034\nTesla T4, 525.1, 15360", 0, ["525.1", "R580"]),
        ("NVIDIA-SMI has failed because it could not communicate with the driver", 9, ["could not communicate"]),
        ("No devices were found", 0, ["No devices were found"]),
        ("", 0, ["it lists none"]),
    ],
)
def test_what_is_wrong_is_one_line_that_says_what_to_do(smi: Path, text: str, code: int, parts: list[str]) -> None:
    says(smi, text, code)
    result = CliRunner().invoke(app, ["cluster", "gpu"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert all(part in result.stderr for part in parts), result.stderr


def test_a_machine_without_a_driver(smi: Path) -> None:
    assert not smi.exists()
    with pytest.raises(UserError, match="nvidia-smi is not there"):
        gpu.check_gpus()


def test_a_wheel_without_cuda(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(smi, "NVIDIA L4, 580.95.05, 23034")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="built without CUDA"):
        gpu.check_gpus()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_card_that_cannot_compute(smi: Path) -> None:
    says(smi, "NVIDIA L4, 580.95.05, 23034")
    with pytest.raises(UserError, match="cannot compute on it"):
        gpu.check_gpus()


def test_every_card_is_named(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says(smi, "NVIDIA L4, 580.95.05, 23034\nNVIDIA L4, 580.95.05, 23034")
    devices, ones = [], torch.ones

    def on_the_cpu(size: int, device: str) -> torch.Tensor:
        devices.append(device)
        return ones(size)

    monkeypatch.setattr(torch, "ones", on_the_cpu)
    assert gpu.check_gpus() == ["NVIDIA L4, 22.5 GiB, driver 580.95.05, CUDA 13.2"] * 2
    assert devices == ["cuda:0", "cuda:1"]


def test_the_driver_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DRIVER_FILE", tmp_path / "version")
    assert gpu.driver_version() is None
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)\n"
    (tmp_path / "version").write_text(line + "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n")
    assert gpu.driver_version() == "580.95.05"
    assert gpu.device_title(torch.device("cpu")) is None
