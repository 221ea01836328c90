"""Part 2: the device computes what a CPU computes in float64, and a stack what its clients compute alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.lab import Experiment, Lab, Line, relative
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.core.seeding import generator
from sylva_ray.core.timing import Stopwatch
from sylva_ray.core.types import AttackSpec, ParameterStack
from sylva_ray.federation.client.measuring import EvaluateTask
from sylva_ray.federation.client.training import train_cohort
from sylva_ray.models.cohort import client_gradients, repeat_owner, to_parameters

VALUES, UPDATES, STACKS = 1e-4, 1e-2, 1e-2
"""Largest relative error of logits and gradients; of the change by three AdamW steps, which divides by small second
moments; and of the change in a stack against that alone. TF32 exceeds the first by far."""

POINTS = 0.2
"""Largest difference of robust accuracies, in percentage points."""

COUNTS = (24, 1, 12)


@dataclass(frozen=True)
class Values:
    """What a model computes for a batch: logits, the gradient by the images, and the gradients by the adapters."""

    logits: torch.Tensor
    by_image: torch.Tensor
    by_adapter: torch.Tensor


def right(lab: Lab) -> Iterator[Line]:
    """Yield the errors against float64 on the CPU, of stack against single, and of an attack in bfloat16."""
    found, expected = values(lab.experiment(), torch.float32), values(lab.experiment(device="cpu"), torch.float64)
    for name in ("logits", "by_image", "by_adapter"):
        error = relative(getattr(found, name), getattr(expected, name))
        yield {"item": f"{name} against float64", "relative_error": error, "at_most": VALUES, "holds": error <= VALUES}
    error = relative(
        updates(lab.experiment(COUNTS), torch.float32), updates(lab.experiment(COUNTS, device="cpu"), torch.float64)
    )
    yield {
        "item": "three AdamW steps against float64",
        "relative_error": error,
        "at_most": UPDATES,
        "holds": error <= UPDATES,
    }
    error = stack_against_single(lab)
    yield {"item": "stack against single", "relative_error": error, "at_most": STACKS, "holds": error <= STACKS}
    yield {"item": "bfloat16 attack, verified", **bfloat16_attack(lab)}


def moved(experiment: Experiment, device: torch.device, dtype: torch.dtype) -> ParameterStack:
    """Return the clients' parameters with adapters that change something; B is 0 at the start."""
    rng = np.random.default_rng(0)
    stack = experiment.stack(range(len(experiment.states)))
    return to_parameters(
        {n: v + 0.05 * rng.standard_normal(v.shape) if "lora" in n else v for n, v in sorted(stack.items())},
        device,
        dtype,
    )


def values(experiment: Experiment, dtype: torch.dtype) -> Values:
    """Compute a batch of unequal clients."""
    worker = experiment.worker
    worker.model.backbone.to(dtype)
    params = moved(experiment, worker.device, dtype)
    counts = [5, 1, 3]
    x = torch.rand(sum(counts), 3, 32, 32, generator=generator(0, "proof")).to(worker.device, dtype).requires_grad_()
    y, owner = (torch.arange(len(x)) % 10).to(worker.device), repeat_owner(counts)
    logits = worker.model.forward(params, x, owner)
    (by_image,) = torch.autograd.grad(cross_entropy(logits, y).sum(), x)

    def losses(p: ParameterStack) -> torch.Tensor:
        each = cross_entropy(worker.model.forward(p, x.detach(), owner), y)
        return each.new_zeros(len(counts)).index_add(0, owner.to(each.device), each)

    gradients, _ = client_gradients(params, sorted(params), losses)
    return Values(logits.detach(), by_image, torch.cat([gradient.flatten() for gradient in gradients.values()]))


def updates(experiment: Experiment, dtype: torch.dtype) -> torch.Tensor:
    """Return what three benign steps add to the parameters of all clients, as one vector."""
    worker = experiment.worker
    worker.model.backbone.to(dtype)
    before = moved(experiment, worker.device, dtype)
    after = {name: value.clone() for name, value in before.items()}
    task = experiment.train_task(epsilon=0.0)
    worker.stopwatch = Stopwatch()
    context = worker.context(task, after)
    data = [worker.training_data(client) for client in task.clients]
    train_cohort(context, worker.algorithm, after, data, task, worker.config)
    return torch.cat([(after[name] - before[name]).flatten() for name in sorted(after)])


def stack_against_single(lab: Lab) -> float:
    """Return the largest relative error of a client's change in a stack of three against its change alone."""
    experiment = lab.experiment(COUNTS)
    together = experiment.trained(epsilon=0.0)
    errors = []
    for client, own in enumerate(together):
        (alone,) = experiment.trained([client], epsilon=0.0)
        change, expected = (
            torch.cat([torch.from_numpy(s[n] - experiment.states[client][n]).flatten() for n in sorted(s)])
            for s in (own, alone)
        )
        errors.append(relative(change, expected))
    return max(errors)


def bfloat16_attack(lab: Lab) -> Line:
    """Compare robust accuracies under an attack in bfloat16, whose successes float32 confirms, and one in float32."""
    held_out = 25 if lab.reduced else 512
    counts = (50, 50) if lab.reduced else (200, 200)
    attack = AttackSpec("pgd", 4 / 255, 4 if lab.reduced else 20, 1 / 255)
    accuracies: dict[str, float] = {}
    for precision in ("float32", "bfloat16"):
        sections: dict[str, dict[str, Any]] = {"evaluation": {"precision": precision}, "training": {"batch_size": 25}}
        experiment = lab.experiment(counts, sections, held_out=held_out)
        if not accuracies:
            trained = experiment.trained(epsilon=2 / 255, epochs=2 if lab.reduced else 6)
        experiment = Experiment(experiment.worker, trained)
        outcomes = experiment.worker.run(EvaluateTask(2, (0, 1), experiment.stack((0, 1)), (attack,))).outcomes
        labels = np.concatenate([experiment.worker.fleet.test_labels(client) for client in (0, 1)])
        predictions = {
            name: np.concatenate([outcome.predictions[name] for outcome in outcomes])
            for name in ("benign", attack.label)
        }
        accuracies[precision] = 100 * float((predictions[attack.label] == labels).mean())
        benign = 100 * float((predictions["benign"] == labels).mean())
    difference = abs(accuracies["float32"] - accuracies["bfloat16"])
    at_most = max(POINTS, 100 / (2 * held_out))  # one image of a small sample is more than that
    return {
        **{"images": 2 * held_out, "benign": round(benign, 2)},
        **{precision: round(value, 2) for precision, value in accuracies.items()},
        **{"points": round(difference, 2), "at_most": round(at_most, 2), "holds": difference <= at_most},
    }
