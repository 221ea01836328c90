"""Count the kernels and synchronisations of one training step of Sylva, on the CPU: what a GPU would be asked for.

    python benchmarks/kernels.py [--backbone vit_base_patch16_224] [--clients 2] [--attack-steps 10]

An operation counts as a kernel if it computes or moves numbers; views and allocations do not. Composite operations are
counted by their parts, and so is the backward pass. A synchronisation is an operation for whose result the program
waits: a number that it reads, or a size that depends on values. A step is the difference between an epoch of three
steps and one of two. Weights are random and images small: the numbers depend on neither.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.core.precision import torch_dtype
from sylva_ray.core.seeding import generator
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import ClientData, Split, stack_states
from sylva_ray.federation.client.training import TrainSettings, TrainTask, train_cohort
from sylva_ray.federation.context import ClientContext
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import to_parameters
from sylva_ray.models.lora import LoraStack
from sylva_ray.preparation.resolve import resolve_config

NO_KERNEL = {"detach", "alias", "_unsafe_view", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"}
"""Operations that compute nothing, besides views."""

SYNCHRONISATIONS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"}
"""Operations whose result the program waits for."""

NUM_CLASSES = 10
IMAGE_SIZE = 32


class KernelCounter(TorchDispatchMode):
    """Counts the operations inside its ``with`` block.

    Attributes:
        kernels: ``{name: number}``.
        synchronisations: likewise.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
        if name in SYNCHRONISATIONS or by_mask:
            self.synchronisations[name] += 1
        elif not func.is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))


def step_counts(config: ExperimentConfig, clients: int, ragged: bool = False) -> KernelCounter:
    """Return the operations of one step of local training.

    Args:
        config: the experiment; its attack, backbone, adapters and precision count.
        clients: in the cohort.
        ragged: whether the first client has fewer images in the step than the others.
    """
    resolved = resolve_config(config)
    stack = LoraStack(
        create_backbone(config.backbone, NUM_CLASSES), config.lora, torch_dtype(config.training.precision)
    )
    stack.kernels = resolved.training.attention
    algorithm = create_algorithm(config.algorithm)
    algorithm.bind_model(stack, NUM_CLASSES, {}, torch.device("cpu"))
    states = [stack.initial_state(generator(0, "state", client)) for client in range(clients)]
    size, batch = stack.image_size, config.training.batch_size
    counts: list[KernelCounter] = []
    for steps in (2, 3):
        lengths = [batch * steps] * clients
        if ragged and steps == 3:
            lengths[0] -= batch // 2
        data = [_client(length, size) for length in lengths]
        task = TrainTask(1, tuple(range(clients)), stack_states(states), TrainSettings(config.attack.epsilon, 1e-3))
        params, received = (to_parameters(task.states, "cpu", torch.float32) for _ in range(2))
        context = ClientContext(stack, torch.ones(clients, NUM_CLASSES, dtype=torch.long), received, Stopwatch())
        with KernelCounter() as counter:
            train_cohort(context, algorithm, params, data, task, resolved)
        counts.append(counter)
    before, after = counts
    after.kernels.subtract(before.kernels)
    after.synchronisations.subtract(before.synchronisations)
    return after


def _client(length: int, size: int) -> ClientData:
    split = Split(np.zeros((length, 3, size, size), np.uint8), np.arange(length) % NUM_CLASSES)
    return ClientData(split, split, split, split)


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--targets", default="all_linear", help="adapted layers, separated by commas")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--most", type=int, default=0, help="print that many of the most frequent operations")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{given.backbone}, adapters on {given.targets}, {given.clients} clients, PGD-{given.attack_steps}")
    print(f"{'':24}{'kernels':>9}{'synchronisations':>18}")
    for precision in ("float32", "bfloat16"):
        for ragged in (False, True):
            sections = {
                "backbone": {"name": given.backbone, "image_size": IMAGE_SIZE},
                "lora": {"target_modules": given.targets.split(",")},
                "attack": {"steps": given.attack_steps},
                "training": {"batch_size": 2, "precision": precision, "attention": "fused"},
                "partition": {"num_clients": given.clients},
            }
            counter = step_counts(build(ExperimentConfig, sections), given.clients, ragged)
            name = f"{precision}, {'ragged' if ragged else 'even'}"
            total, waits = counter.kernels.total(), counter.synchronisations.total()
            print(f"{name:24}{total:9}{waits:18}", flush=True)
            for operation, number in (counter.kernels + counter.synchronisations).most_common(given.most):
                print(f"    {operation:40}{number:6}", flush=True)


if __name__ == "__main__":
    main()
