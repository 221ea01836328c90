"""Local training of a cohort: iterate, mask, clip, step. What a step *is* belongs to the algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import AttackSpec, ClientData, ClientState, ParameterStack, Split, unstack_states
from sylva_ray.federation.client.batches import cohort_batches, split_draws
from sylva_ray.federation.client.collapse_guard import CollapseGuard
from sylva_ray.federation.client.optim import StackedOptimizer, clip_per_client
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.method import Method
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.models.cohort import CohortModel, broadcast_clients, to_arrays

ClientGradients = tuple[dict[str, torch.Tensor], torch.Tensor]
"""``(gradients {name: [C, ...]}, mean losses [C])``."""

GradientFunction = Callable[[ParameterStack, Batch], ClientGradients]
"""``(params, batch) -> ClientGradients``."""


@dataclass(frozen=True)
class TrainOutcome:
    """The ``state`` after training on ``num_samples`` images; ``metrics {name: value}`` (mean loss of the last epoch)."""

    state: ClientState
    num_samples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrainTask(CohortTask):
    """Local training with the experiment's algorithm. ``epsilon`` in pixel units (ramped during the warm-up);
    ``head_epochs`` benign epochs of the head alone come first; ``lr`` is this round's learning rate."""

    epsilon: float = 0.0
    lr: float = 0.0
    epochs: int = 1
    head_epochs: int = 0

    stage: ClassVar[str] = "train"
    uses_training_precision: ClassVar[bool] = True

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[TrainOutcome]:
        """See `CohortTask`."""
        data = [worker.training_data(client) for client in self.clients]
        with worker.stopwatch("train"):
            metrics = train_cohort(worker.context(self, params), worker.algorithm, params, data, self, worker.config)
        states = unstack_states(to_arrays(params))
        return [
            TrainOutcome(state, len(own.train), {name: float(values[c]) for name, values in metrics.items()})
            for c, (state, own) in enumerate(zip(states, data, strict=True))
        ]


def run_epochs(
    params: ParameterStack,
    step: GradientFunction,
    data: Sequence[ClientData],
    streams: Sequence[torch.Generator],
    config: ResolvedConfig,
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
                gradients = {name: g * broadcast_clients(masks[name], g) for name, g in gradients.items()}
            if config.training.clip_norm is not None:
                gradients = clip_per_client(gradients, config.training.clip_norm)
            optimizer.step(gradients, batch.active, masks)
            total += losses_C.double().cpu()
            steps += batch.active.cpu()
        losses = total / steps.clamp(min=1)
        after_epoch()
    return losses


def train_cohort(
    context: ClientContext,
    algorithm: Method,
    params: ParameterStack,
    data: Sequence[ClientData],
    task: TrainTask,
    config: ResolvedConfig,
) -> dict[str, torch.Tensor]:
    """One round of local training, in place: first ``head_epochs`` benign epochs of the heads, then the algorithm's own.

    Returns:
        ``{metric: [C]}``: the mean ``loss`` of the last epoch; with fast training ``rolled_back``, 1 for a client that
        collapsed and was taken back to the epoch before.
    """
    streams = [generator(config.seed, "train", client, task.round) for client in task.clients]
    metrics = {"loss": torch.zeros(len(task.clients), dtype=torch.float64)}
    if task.head_epochs:
        warm_up = _warm_up_step(context, algorithm)
        metrics["loss"] = run_epochs(params, warm_up, data, streams, config, task.lr, task.head_epochs)
    if task.epochs:
        attack: AttackSpec = config.attack.spec(task.epsilon)
        names = [name for name in params if context.model.trainable(name) and algorithm.is_trained(name)]
        guard = _collapse_guard(algorithm, context, params, data, task, config)
        algorithm.client_init(context)
        for epochs, trained in algorithm.schedule(task.epochs, names):

            def step(p: ParameterStack, batch: Batch, trained: list[str] = trained) -> ClientGradients:
                return algorithm.client_step(context, p, batch, attack, trained)

            after_epoch = (lambda: None) if guard is None else guard.after_epoch
            metrics["loss"] = run_epochs(params, step, data, streams, config, task.lr, epochs, after_epoch=after_epoch)
        if guard is not None:
            metrics["rolled_back"] = guard.stopped_C.double()
    return metrics


def _warm_up_step(context: ClientContext, algorithm: Method) -> GradientFunction:
    """The benign warm-up, of the parameters that the algorithm names."""
    names = algorithm.warm_up_names()

    def step(params: ParameterStack, batch: Batch) -> ClientGradients:
        return _gradients(params, names, lambda p: batch.mean_by_client(algorithm.warm_up_losses(context, p, batch)))

    return step


def benign_step(model: CohortModel, names: Sequence[str]) -> GradientFunction:
    """Benign cross-entropy on the parameters in ``names``."""

    def step(params: ParameterStack, batch: Batch) -> ClientGradients:
        def losses(p: ParameterStack) -> torch.Tensor:
            return batch.mean_by_client(cross_entropy(model.forward(p, batch.x, batch.owner), batch.y))

        return _gradients(params, names, losses)

    return step


def _gradients(
    params: ParameterStack, names: Sequence[str], losses: Callable[[ParameterStack], torch.Tensor]
) -> ClientGradients:
    leaves = {name: params[name].detach().requires_grad_() for name in names}
    losses_C = losses({**params, **leaves})
    gradients = torch.autograd.grad(losses_C.sum(), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True)), losses_C.detach()


def _collapse_guard(
    algorithm: Method,
    context: ClientContext,
    params: ParameterStack,
    data: Sequence[ClientData],
    task: TrainTask,
    config: ResolvedConfig,
) -> CollapseGuard | None:
    """Only fast adversarial training needs one; a method that crafts nothing is not trained so."""
    crafts = type(algorithm).craft is not Method.craft
    if config.attack.name != "fgsm_rs" or task.epsilon == 0 or not crafts:
        return None
    images = config.training.batch_size
    watched = [Split(own.train.images[:images], own.train.labels[:images]) for own in data]
    draws = split_draws(config.seed, f"collapse guard/{task.round}", task.clients, watched)
    return CollapseGuard(context.model, params, watched, task.epsilon, draws)
