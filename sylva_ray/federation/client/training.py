"""Local training of a cohort: iterate over batches, mask, clip, step. The method computes the gradients of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, TypeAlias

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.config.training import TrainingSection
from sylva_ray.core.lazy import torch
from sylva_ray.core.types import AttackSpec, ClientData, ClientState, ParameterStack, Split, unstack_states
from sylva_ray.federation.client.batches import ClientStream, CohortBatches, client_streams, split_draws
from sylva_ray.federation.client.collapse_guard import CollapseGuard
from sylva_ray.federation.client.optim import StackedOptimizer
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.method import Method
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.models.cohort import client_gradients, to_arrays
from sylva_ray.models.device_memory import to_device

ClientGradients: TypeAlias = "tuple[dict[str, torch.Tensor], torch.Tensor]"
"""``(gradients {name: [C, ...]}, mean losses [C])`` of C clients."""

GradientFunction: TypeAlias = "Callable[[ParameterStack, Batch], ClientGradients]"
"""Computes `ClientGradients` from parameters and a batch."""


@dataclass(frozen=True)
class TrainOutcome:
    """What local training of one client results in.

    Attributes:
        state: after training.
        num_samples: training images.
        metrics: ``{name: value}``, see `train_cohort`.
    """

    state: ClientState
    num_samples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TrainSettings:
    """How clients train in one stage.

    Attributes:
        epsilon: of the training attack, in pixel units.
        lr: learning rate.
        epochs: of the method's own training.
        head_epochs: benign epochs of the head alone, which come first.
    """

    epsilon: float
    lr: float
    epochs: int = 1
    head_epochs: int = 0


@dataclass(frozen=True)
class TrainTask(CohortTask):
    """Local training of C clients with the method of the experiment."""

    settings: TrainSettings

    stage: ClassVar[str] = "train"
    uses_training_precision: ClassVar[bool] = True

    @property
    def num_epochs(self) -> int:
        """See `CohortTask.num_epochs`."""
        return max(1, self.settings.epochs + self.settings.head_epochs)

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[TrainOutcome]:
        """See `CohortTask`."""
        data = [worker.training_data(client) for client in self.clients]
        with worker.stopwatch("train"):
            context = worker.context(self, params)
            metrics = train_cohort(context, worker.algorithm, params, data, self, worker.config)
        states = unstack_states(to_arrays(params))
        return [
            TrainOutcome(state, len(own.train), {name: float(values[c]) for name, values in metrics.items()})
            for c, (state, own) in enumerate(zip(states, data, strict=True))
        ]


@dataclass(frozen=True)
class EpochSettings:
    """How parameters are trained with one optimiser.

    Attributes:
        training: the section of the configuration: batch size, augmentation, optimiser, clipping.
        lr: learning rate.
        epochs: how many.
    """

    training: TrainingSection
    lr: float
    epochs: int


def run_epochs(
    params: ParameterStack,
    step: GradientFunction,
    data: Sequence[ClientData],
    streams: Sequence[ClientStream],
    settings: EpochSettings,
    masks: Mapping[str, torch.Tensor] | None = None,
    after_epoch: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Train ``params`` in place with a fresh optimiser.

    Args:
        params: of C clients.
        step: computes the gradients of one step.
        data: of every client.
        streams: random numbers of every client.
        settings: optimiser, learning rate, epochs.
        masks: ``{name: [C] bool}``, the rows that may change; None: all. The others do not count in the clipped norm.
        after_epoch: called after every epoch; it may change ``params`` in place.

    Returns:
        The mean loss over the images of the last epoch of every client, ``[C] float64`` on the CPU.
    """
    first, training = next(iter(params.values())), settings.training
    batches = CohortBatches(data, streams, training.batch_size, training.augment, first.dtype, first.device)
    optimizer = StackedOptimizer(params, training, settings.lr, masks)
    losses = torch.zeros(len(first), dtype=torch.float64, device=first.device)
    for _ in range(settings.epochs):
        total, images = torch.zeros_like(losses), torch.zeros_like(losses)
        for batch in batches.epoch():
            gradients, losses_C = step(params, batch)
            optimizer.step(gradients, batch.active)
            counts_C = to_device(batch.counts, losses.device)
            total += losses_C.double() * counts_C  # on the device: reading a number would wait for all before it
            images += counts_C
        losses = total / images.clamp(min=1)
        after_epoch()
    return losses.cpu()


def train_cohort(
    context: ClientContext,
    algorithm: Method,
    params: ParameterStack,
    data: Sequence[ClientData],
    task: TrainTask,
    config: ResolvedConfig,
) -> dict[str, torch.Tensor]:
    """Train a cohort in place for one stage: first the benign epochs of the heads, then those of the method.

    Args:
        context: of the C clients.
        algorithm: the method.
        params: the states of the clients, which are changed.
        data: of every client.
        task: names the clients, the stage and the settings.
        config: the experiment.

    Returns:
        ``{metric: [C]}``: ``loss``, the mean of the last epoch; with fast adversarial training also ``rolled_back``, 1
        for a client whose training collapsed and was undone up to the epoch before.
    """
    settings = task.settings
    streams = client_streams(config.seed, "train", task.clients, task.step)
    metrics = {"loss": torch.zeros(len(task.clients), dtype=torch.float64)}
    if settings.head_epochs:
        warm_up = benign_step(partial(algorithm.warm_up_losses, context), algorithm.warm_up_names())
        benign = EpochSettings(config.training, settings.lr, settings.head_epochs)
        metrics["loss"] = run_epochs(params, warm_up, data, streams, benign)
    if settings.epochs:
        attack: AttackSpec = config.attack.spec(settings.epsilon)
        names = [name for name in params if context.model.trainable(name) and algorithm.is_trained(name)]
        guard = _collapse_guard(algorithm, context, params, data, task, config)
        algorithm.client_init(context)
        for epochs, trained in algorithm.schedule(settings.epochs, names):

            def step(p: ParameterStack, batch: Batch, trained: list[str] = trained) -> ClientGradients:
                return algorithm.client_step(context, p, batch, attack, trained)

            after_epoch = (lambda: None) if guard is None else guard.after_epoch
            phase = EpochSettings(config.training, settings.lr, epochs)
            metrics["loss"] = run_epochs(params, step, data, streams, phase, after_epoch=after_epoch)
        if guard is not None:
            metrics["rolled_back"] = guard.stopped_C.double()
    return metrics


def benign_step(losses: Callable[[ParameterStack, Batch], torch.Tensor], names: Sequence[str]) -> GradientFunction:
    """Return the function that computes the gradients of every client's mean of ``losses(params, batch) [N]``.

    Forwards are those of evaluation, as in the game and the guard, with which phase 2 compares its result, and with the
    heads alone trained, a BatchNorm below them keeps its statistics.
    """

    def step(params: ParameterStack, batch: Batch) -> ClientGradients:
        return client_gradients(params, names, lambda p: batch.mean_by_client(losses(p, batch)))

    return step


def _collapse_guard(
    algorithm: Method,
    context: ClientContext,
    params: ParameterStack,
    data: Sequence[ClientData],
    task: TrainTask,
    config: ResolvedConfig,
) -> CollapseGuard | None:
    """Return the guard of fast adversarial training; None for other attacks and for a method that crafts no images."""
    crafts = type(algorithm).craft is not Method.craft
    if not config.attack.is_fast or task.settings.epsilon == 0 or not crafts:
        return None
    count = config.training.batch_size
    watched = [Split(client.train.images[:count], client.train.labels[:count]) for client in data]
    draws = split_draws(config.seed, f"collapse guard/{task.step}", task.clients, watched)
    return CollapseGuard(context.model, params, watched, task.settings.epsilon, draws)
