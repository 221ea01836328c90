"""Local training of a cohort: iterate, mask, clip, step. What a step *is* belongs to the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sylva_ray.algorithms.base import Algorithm, Batch, Cohort
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.client.batches import cohort_batches
from sylva_ray.client.optim import StackedOptimizer, clip_per_client, per_client
from sylva_ray.config import ExperimentConfig
from sylva_ray.models.cohort import CohortModel
from sylva_ray.seeding import generator
from sylva_ray.types import AttackSpec, ClientData, ParameterStack, TrainTask

Step = Callable[[ParameterStack, Batch], tuple[dict[str, torch.Tensor], torch.Tensor]]
"""``(params, batch) -> (gradients {name: [C, ...]}, mean losses [C])``."""


def run_epochs(
    params: ParameterStack,
    step: Step,
    data: Sequence[ClientData],
    streams: Sequence[torch.Generator],
    config: ExperimentConfig,
    lr: float,
    epochs: int,
    masks: Mapping[str, torch.Tensor] | None = None,
    after_epoch: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Train ``params`` in place with a fresh optimiser; returns every client's mean loss over the last epoch, ``[C]``.

    ``masks {name: [C] bool}`` holds the rows that may move; a frozen row neither moves nor counts in the clipped norm.
    """
    first = next(iter(params.values()))
    optimizer = StackedOptimizer(params, config.training, lr)
    losses = torch.zeros(len(first), dtype=torch.float64)
    for _ in range(epochs):
        total, steps = torch.zeros_like(losses), torch.zeros_like(losses)
        for batch in cohort_batches(
            data, streams, config.training.batch_size, config.training.augment, first.dtype, first.device
        ):
            gradients, losses_C = step(params, batch)
            if masks is not None:
                gradients = {name: g * per_client(masks[name], g) for name, g in gradients.items()}
            if config.training.clip_norm is not None:
                gradients = clip_per_client(gradients, config.training.clip_norm)
            optimizer.step(gradients, batch.active, masks)
            total += losses_C.double().cpu()
            steps += batch.active.cpu()
        losses = total / steps.clamp(min=1)
        after_epoch()
    return losses


def train_cohort(
    cohort: Cohort,
    algorithm: Algorithm,
    params: ParameterStack,
    data: Sequence[ClientData],
    task: TrainTask,
    config: ExperimentConfig,
) -> torch.Tensor:
    """One round of local training, in place: first ``head_epochs`` benign epochs of the heads, then the algorithm's own.

    Returns:
        mean loss of the last epoch per client, ``[C]``.
    """
    streams = [generator(config.seed, "train", client, task.round) for client in task.clients]
    losses = torch.zeros(len(task.clients), dtype=torch.float64)
    if task.head_epochs:
        step = benign_step(cohort.model, cohort.model.head_names)
        losses = run_epochs(params, step, data, streams, config, task.lr, task.head_epochs)
    if task.epochs:
        attack: AttackSpec = config.attack.spec(task.epsilon)
        names = [name for name in params if cohort.model.trainable(name)]
        algorithm.client_init(cohort)
        losses = run_epochs(
            params,
            lambda p, batch: algorithm.client_step(cohort, p, batch, attack, names),
            data,
            streams,
            config,
            task.lr,
            task.epochs,
        )
    return losses


def benign_step(model: CohortModel, names: Sequence[str]) -> Step:
    """Benign cross-entropy on the parameters in ``names``."""

    def step(params: ParameterStack, batch: Batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        leaves = {name: params[name].detach().requires_grad_() for name in names}
        logits = model.forward({**params, **leaves}, batch.x, batch.owner)
        losses_C = batch.mean_per_client(cross_entropy(logits, batch.y))
        gradients = torch.autograd.grad(losses_C.sum(), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True)), losses_C.detach()

    return step
