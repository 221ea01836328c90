"""What workers import: timm without the compiler, which works all the same when it is wanted."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

NOT_NEEDED = """
import sys
import sylva_ray.models.backbone
import sylva_ray.execution.ray.client_actor
from sylva_ray.models.kernels import deterministic_kernels
import torch
deterministic_kernels(torch.device("cpu"))
assert torch.are_deterministic_algorithms_enabled()
found = {"torch._dynamo", "torch._inductor", "sympy", "wandb"} & set(sys.modules)
assert not found, found
"""

STILL_THERE = """
import sylva_ray.models.backbone
import torch, torchvision
import torch._dynamo
boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
assert torchvision.ops.roi_align(torch.ones(1, 1, 8, 8), [boxes], 2).shape == (1, 1, 2, 2)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)) == 1
assert torch._dynamo.disable is not sylva_ray.models.light_timm._unchanged
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_does_not_import_the_compiler() -> None:
    run(NOT_NEEDED)


def test_the_compiler_can_be_imported_afterwards() -> None:
    run(STILL_THERE)


@pytest.mark.slow
def test_a_compiler_that_was_imported_before_stays() -> None:
    run("import torch._dynamo as before" + STILL_THERE + "assert torch._dynamo is before\n")
