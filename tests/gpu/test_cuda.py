"""On a GPU: the values of a CPU in float64, the same bits twice, a stack like its clients alone, no synchronisation.

`make test-gpu` runs these; where there is no GPU they are skipped with the reason. The functions that they call are
those of `benchmarks/gpu_proof.py`, which other tests run on the CPU.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks.gpu.bits import digests
from benchmarks.gpu.lab import Experiment, Lab, relative
from benchmarks.gpu.rates import flags
from benchmarks.gpu.right import STACKS, UPDATES, VALUES, stack_against_single, updates, values
from sylva_ray.core.gpu import check_gpus, device_title, driver_version
from sylva_ray.core.seeding import ImageDraws, image_keys
from sylva_ray.core.timing import stopwatch_of
from sylva_ray.data.augment import augmented
from sylva_ray.models.kernels import deterministic_kernels

HAS_GPU = torch.cuda.is_available()
WHY = f"needs a GPU: torch {torch.__version__} finds none (CUDA it was built for: {torch.version.cuda})"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason=WHY)]

LAB = Lab("cuda", reduced=True)


@pytest.fixture(autouse=True)
def _as_a_worker_computes() -> Iterator[None]:
    """Other tests of the session are not to compute deterministically because these do."""
    before = torch.are_deterministic_algorithms_enabled()
    deterministic_kernels(torch.device("cuda"))
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("name", ["logits", "by_image", "by_adapter"])
def test_values_are_those_of_a_cpu_in_float64(name: str) -> None:
    found, expected = values(LAB.experiment(), torch.float32), values(LAB.experiment(device="cpu"), torch.float64)
    assert relative(getattr(found, name), getattr(expected, name)) <= VALUES


def test_three_optimiser_steps_are_those_of_a_cpu_in_float64() -> None:
    counts = (24, 1, 12)
    expected = updates(LAB.experiment(counts, device="cpu"), torch.float64)
    assert relative(updates(LAB.experiment(counts), torch.float32), expected) <= UPDATES


def test_a_stack_computes_what_its_clients_compute_alone() -> None:
    assert stack_against_single(LAB) <= STACKS


def test_equal_inputs_give_equal_bits() -> None:
    assert digests(LAB) == digests(LAB)


def test_seconds_are_those_of_the_device() -> None:
    """The program has asked for everything long before the device has done it."""
    a = torch.ones(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    stopwatch, started = stopwatch_of(a.device), time.perf_counter()
    with stopwatch("train"):
        with stopwatch("attack"):
            for _ in range(50):
                a @ a
        asked = time.perf_counter() - started
        a @ a
    seconds = stopwatch.seconds
    assert seconds["attack"] > 10 * seconds["train"]
    assert asked < seconds["attack"] <= time.perf_counter() - started


def test_random_numbers_of_images_are_those_of_a_cpu() -> None:
    draws = ImageDraws(image_keys(0, "x", 0, np.arange(300)))
    for shape in ((3, 32, 32), (2,), (1,)):
        assert torch.equal(draws.uniform(1, shape), draws.to("cuda").uniform(1, shape).cpu())
    images = torch.randint(0, 256, (300, 3, 32, 32), dtype=torch.uint8)
    for kind in ("flip", "crop", "flip_crop"):
        assert torch.equal(augmented(images, kind, draws), augmented(images.cuda(), kind, draws.to("cuda")).cpu())


def test_float32_is_not_tf32() -> None:
    assert flags(LAB)["tf32"] == {"matmul": False, "cudnn": False}


def test_the_card_and_its_driver_are_named() -> None:
    driver = driver_version()
    assert driver
    assert len(check_gpus()) == torch.cuda.device_count()
    assert f"driver {driver}, CUDA {torch.version.cuda}" in str(device_title(torch.device("cuda")))


def test_a_training_step_does_not_wait_for_the_device() -> None:
    """A task waits at its start and at its end, however many steps it has: the difference of two tasks is counted."""
    few, many = (synchronisations(LAB.experiment((8 * steps,) * 3)) for steps in (2, 6))
    assert many - few == 0


def synchronisations(experiment: Experiment) -> int:
    """How often a train task waits for the device, as torch's debug mode reports it."""
    experiment.trained()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            experiment.trained()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
