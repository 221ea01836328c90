"""The client half of phase 2: values of coalitions, paired outcomes of the guard, benign refinement of selected layers.

The client measures and trains. The coordinator decides about coalitions, layers and epochs
(`sylva_ray.federation.stages.layer_game.server`); it gets a few numbers and no images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.pgd import default_step_size, pgd
from sylva_ray.attacks.registry import attack_stack
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import at_precision, torch_dtype
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import AttackSpec, ClientData, ClientImages, ParameterStack, Split
from sylva_ray.federation.client.batches import client_images, split_draws
from sylva_ray.federation.client.training import EpochSettings, benign_step, run_epochs
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.context import ClientContext
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.coalitions import mix
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.models.cohort import broadcast_clients, select_clients


@dataclass(frozen=True)
class GuardOutcome:
    """Outcomes of m candidates paired with those of theta^r on guard images, which are attacked anew for each.

    Attributes:
        lost: ``[m]``, images robust with theta^r but not with the candidate.
        gained: ``[m]``, images robust with the candidate but not with theta^r.
        benign_gain: ``[m]``, benign accuracy of the candidate minus that of theta^r.
        num_samples: guard images.
    """

    lost: np.ndarray
    gained: np.ndarray
    benign_gain: np.ndarray
    num_samples: int


@dataclass(frozen=True)
class SelectionImages(ClientImages):
    """The selection splits of a cohort; ``against`` holds the images after PGD against theta^r and against theta^b."""

    against: Sequence[torch.Tensor]


class Phase2Client:
    """Phase 2 for one cohort.

    Args:
        context: of the cohort.
        phase2: the parameters of phase 2.
        config: the experiment.
        robust: theta^r, the states after phase 1.
        task: its clients, and the position of the stage, which names the random numbers.
        data: of every client.
        is_trained: tells whether the method trains a parameter; the others are not changed.
    """

    def __init__(
        self,
        context: ClientContext,
        phase2: Phase2Parameters,
        config: ResolvedConfig,
        robust: ParameterStack,
        task: CohortTask,
        data: Sequence[ClientData],
        is_trained: Callable[[str], bool],
    ) -> None:
        from sylva_ray.models.lora import LoraStack  # it imports timm

        assert isinstance(context.model, LoraStack), "phase 2 needs adapters"
        self.model, self.stopwatch = context.model, context.stopwatch
        self.phase2, self.config = phase2, config
        self.robust, self.clients, self.step, self.data = robust, task.clients, task.step, data
        self.players = {player: [n for n in names if is_trained(n)] for player, names in self.model.players.items()}
        epsilon, steps = config.attack.epsilon, phase2.attack_steps
        self.attack = AttackSpec("pgd", epsilon, steps, default_step_size(epsilon, steps))
        self.training_precision = torch_dtype(config.training.precision)
        self.attack_precision = torch_dtype(config.evaluation.precision)

    @classmethod
    def from_task(
        cls, worker: CohortWorker, task: CohortTask, params: ParameterStack, phase2: Phase2Parameters
    ) -> Phase2Client:
        """Create it for the clients of a task; ``params`` are its states on the worker's device."""
        context, data, is_trained = worker.context(task, params), worker.data(task), worker.algorithm.is_trained
        return cls(context, phase2, worker.config, params, task, data, is_trained)

    # -- the game ---------------------------------------------------------------------------------------------------

    def benign_end_point(self) -> ParameterStack:
        """Return theta^b, fine-tuned from theta^r on benign data; theta^r for a client whose training diverges."""
        params = {name: value.clone() for name, value in self.robust.items()}
        step = benign_step(self.model, [name for names in self.players.values() for name in names])
        with at_precision(self.model, self.training_precision):
            settings = EpochSettings(self.config.training, self.phase2.benign_lr, self.phase2.benign_epochs)
            run_epochs(params, step, self.data, self.streams("theta_b"), settings)
        finite_C = torch.stack([value.flatten(1).isfinite().all(1) for value in params.values()]).all(0)
        return {name: torch.where(broadcast_clients(finite_C, v), v, self.robust[name]) for name, v in params.items()}

    def selection_images(self, benign: ParameterStack) -> SelectionImages:
        """Return the selection split and the results of PGD on it against theta^r and theta^b (``benign``)."""
        splits = [_head_of(d.selection, self.phase2.max_images) for d in self.data]
        first = self.robust[next(iter(self.robust))]
        images = client_images(splits, first.dtype, first.device)
        with self.stopwatch("attack"):
            against = [self._adversarial(theta, images, splits) for theta in (self.robust, benign)]
        return SelectionImages(images.x, images.y, images.owner, images.num_clients, against)

    def _adversarial(self, params: ParameterStack, images: ClientImages, splits: Sequence[Split]) -> torch.Tensor:
        def loss(u: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self.model.forward(params, u, images.owner), images.y)

        noise = self._noise(splits, images.x)
        with at_precision(self.model, self.attack_precision):
            return pgd(loss, images.x, self.attack, noise)

    # -- the guard --------------------------------------------------------------------------------------------------

    def guard_candidates(self, benign: ParameterStack, candidates: np.ndarray) -> list[GuardOutcome]:
        """Attack ``candidates [C, m, n]`` anew, each by itself; row 0 must be the empty selection (theta^r)."""
        num_clients, num_candidates, _ = candidates.shape
        assert not candidates[:, 0].any(), "the guard compares with theta^r"
        reference = self._guard_outcomes(self.robust, range(num_clients))
        outcomes = [reference]
        for row in range(1, num_candidates):
            changed = [c for c in range(num_clients) if (candidates[c, row] != candidates[c, row - 1]).any()]
            latest = list(outcomes[-1])
            if changed:
                mixed = mix(self.robust, benign, candidates[:, row], self.model.players)
                for client, outcome in zip(changed, self._guard_outcomes(mixed, changed), strict=True):
                    latest[client] = outcome
            outcomes.append(latest)
        return _paired(outcomes)

    def _guard_outcomes(self, params: ParameterStack, clients: Sequence[int]) -> list[np.ndarray]:
        """Return ``[2, n] bool`` per client: correct on the benign image, correct under the attack."""
        clients = list(clients)
        splits = [self.data[c].guard for c in clients]
        chosen = select_clients(params, clients)
        first = chosen[next(iter(chosen))]
        images = client_images(splits, first.dtype, first.device)
        with self.stopwatch("attack"):
            draws = split_draws(self.config.seed, f"guard/{self.step}", [self.clients[c] for c in clients], splits)
            with torch.no_grad():
                benign = self.model.forward(chosen, images.x, images.owner).argmax(1) == images.y
            attacked = attack_stack(
                self.model, chosen, images, self.attack, draws.to(first.device), self.attack_precision
            )
            robust = attacked.predictions == images.y
        return [rows.T for rows in images.split_by_client(torch.stack([benign, robust], dim=1))]

    # -- refinement -------------------------------------------------------------------------------------------------

    def refine(self, selected: np.ndarray) -> tuple[list[ParameterStack], list[GuardOutcome]]:
        """Train the players in ``selected [C, n]`` on benign data from theta^r; other parameters keep their bits.

        Returns:
            The stack after every epoch, and the guard outcomes of every client for theta^r and for each epoch.
        """
        params = {name: value.clone() for name, value in self.robust.items()}
        device = next(iter(params.values())).device
        masks = {
            name: torch.from_numpy(selected[:, player]).to(device)
            for player, names in enumerate(self.players.values())
            for name in names
        }
        movable = [name for name, rows in masks.items() if bool(rows.any())]
        everyone = range(len(self.clients))
        outcomes = [self._guard_outcomes(self.robust, everyone)]
        states: list[ParameterStack] = []

        def after_epoch() -> None:
            states.append({name: value.clone() for name, value in params.items()})
            with at_precision(self.model, torch.float32):
                outcomes.append(self._guard_outcomes(params, everyone))

        with at_precision(self.model, self.training_precision):
            settings = EpochSettings(self.config.training, self.phase2.refine_lr, self.phase2.refine_epochs)
            step = benign_step(self.model, movable)
            run_epochs(params, step, self.data, self.streams("refine"), settings, masks, after_epoch)
        return states, _paired(outcomes)

    # -- random draws -----------------------------------------------------------------------------------------------

    def streams(self, purpose: str) -> list[torch.Generator]:
        """Return one generator per client."""
        return [generator(self.config.seed, purpose, client, self.step) for client in self.clients]

    def _noise(self, splits: Sequence[Split], like: torch.Tensor) -> torch.Tensor:
        draws = [
            torch.rand(split.images.shape, generator=generator(self.config.seed, "game/noise", client, self.step))
            for client, split in zip(self.clients, splits, strict=True)
        ]
        return (torch.cat(draws) * 2 - 1).to(like.device, like.dtype)


def _head_of(split: Split, limit: int) -> Split:
    return Split(split.images[:limit], split.labels[:limit])


def _paired(outcomes: Sequence[Sequence[np.ndarray]]) -> list[GuardOutcome]:
    """Pair ``outcomes[m][c] [2, n] bool`` (benign, robust) with those of m = 0, theta^r, for every client."""
    paired = []
    for candidates in zip(*outcomes, strict=True):
        reference = candidates[0]
        paired.append(
            GuardOutcome(
                lost=np.array([int((reference[1] & ~o[1]).sum()) for o in candidates]),
                gained=np.array([int((~reference[1] & o[1]).sum()) for o in candidates]),
                benign_gain=np.array([float(o[0].mean() - reference[0].mean()) for o in candidates]),
                num_samples=reference.shape[1],
            )
        )
    return paired
