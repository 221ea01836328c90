"""GPUs of this machine: which there are, with which driver, and whether PyTorch can compute on them."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.lazy import torch

MIN_DRIVER = {12: 525, 13: 580}
"""The first branch of NVIDIA's driver that runs programs of a major version of CUDA, e.g. R580 for CUDA 13."""

DRIVER_FILE = Path("/proc/driver/nvidia/version")
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
TIMEOUT_S = 60.0

UPDATE = "update the driver, or start from a newer image (metadata.image of cluster.yaml)"


@dataclass(frozen=True)
class Gpu:
    """A GPU, as `nvidia-smi` describes it.

    Attributes:
        name: e.g. ``NVIDIA L4``.
        driver: version of NVIDIA's driver, e.g. ``580.95.05``.
        memory_bytes: in all.
    """

    name: str
    driver: str
    memory_bytes: int


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver that the kernel has loaded; None where there is none."""
    try:
        found = re.search(r"\s(\d+\.\d[\d.]*)\s", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found[1] if found else None


def device_title(device: torch.device) -> str | None:
    """Return the name of a GPU with its driver and CUDA, on all of which bits depend; None for a CPU."""
    if device.type != "cuda":
        return None
    driver = driver_version() or "unknown"
    return f"{torch.cuda.get_device_name(device)}, driver {driver}, CUDA {torch.version.cuda}"


def check_gpus() -> list[str]:
    """Check that PyTorch can compute on every GPU of this machine: first the driver, then one tensor.

    Returns:
        One line per GPU.

    Raises:
        UserError: there is no driver or no GPU, the driver is too old for this PyTorch, or a GPU cannot be used; says
            what to do.
    """
    gpus = _installed_gpus()
    built_for = torch.version.cuda
    if built_for is None:
        fix = (
            "was built without CUDA: install PyPI's wheel, e.g. `uv pip install --torch-backend auto torch torchvision`"
        )
        raise UserError("PyTorch", torch.__version__, fix)
    needed = MIN_DRIVER.get(int(built_for.partition(".")[0]), max(MIN_DRIVER.values()))
    for gpu in gpus:
        if int(gpu.driver.partition(".")[0]) < needed:
            raise UserError(
                "GPU driver", gpu.driver, f"PyTorch for CUDA {built_for} needs R{needed} or newer: {UPDATE}"
            )
    for index, gpu in enumerate(gpus):
        try:
            torch.ones(2, device=f"cuda:{index}").sum().item()
        except Exception as error:  # CUDA raises errors of many types
            fix = f"PyTorch for CUDA {built_for} cannot compute on it ({reason_of(error)}): {UPDATE}"
            raise UserError("GPU", f"{gpu.name}, driver {gpu.driver}", fix) from error
    return [f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB, driver {gpu.driver}, CUDA {built_for}" for gpu in gpus]


def _installed_gpus() -> list[Gpu]:
    """Ask `nvidia-smi`.

    Raises:
        UserError: it is not there, fails, or lists no GPU.
    """
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise UserError(
            "GPU driver", None, f"nvidia-smi is not there, so this machine has no driver; if it has a GPU, {UPDATE}"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError("GPU driver", None, f"nvidia-smi does not answer ({reason_of(error)}): {UPDATE}") from None
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode or not rows or any(len(row) != 3 or not row[1][:1].isdigit() for row in rows):
        reason = (answer.stdout + answer.stderr).strip().splitlines() or ["it lists none"]
        raise UserError("GPU driver", None, f"nvidia-smi finds no usable GPU ({reason[0][:200]}): {UPDATE}")
    return [
        Gpu(name, driver, int(float(memory)) * 2**20 if memory[:1].isdigit() else 0) for name, driver, memory in rows
    ]
