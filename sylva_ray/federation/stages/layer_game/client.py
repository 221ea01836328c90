"""The client's part in phase 2: coalition values, the guard's paired outcomes, benign refinement of selected layers.

The client only measures and trains; which coalitions, which layers and which epoch to keep is decided by the coordinator
(`sylva_ray.federation.stages.layer_game.server`), which sees these few numbers and never an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.pgd import default_step_size, pgd
from sylva_ray.attacks.registry import attack_stack
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.precision import at_precision
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
from sylva_ray.models.kernels import DTYPES
from sylva_ray.models.lora import LoraStack


@dataclass(frozen=True)
class GuardOutcome:
    """Paired outcomes of m candidates against theta^r on ``num_samples`` guard images, under attacks made for each.

    ``lost [m]``: images robust with theta^r but not with the candidate; ``gained [m]``: the reverse;
    ``benign_gain [m]``: benign accuracy of the candidate minus that of theta^r."""

    lost: np.ndarray
    gained: np.ndarray
    benign_gain: np.ndarray
    num_samples: int


@dataclass(frozen=True)
class SelectionImages(ClientImages):
    """The selection splits of a cohort; ``against`` holds the images after PGD against theta^r and against theta^b."""

    against: Sequence[torch.Tensor]


class Phase2Client:
    """Phase 2 for one cohort whose robust states are ``robust`` (theta^r); what the method never ``trains`` stays as it is."""

    def __init__(
        self,
        context: ClientContext,
        phase2: Phase2Parameters,
        config: ResolvedConfig,
        robust: ParameterStack,
        clients: Sequence[int],
        data: Sequence[ClientData],
        round: int,
        trains: Callable[[str], bool],
    ) -> None:
        assert isinstance(context.model, LoraStack), "phase 2 plays with adapters"
        self.model, self.stopwatch = context.model, context.stopwatch
        self.phase2, self.config = phase2, config
        self.robust, self.clients, self.data, self.round = robust, clients, data, round
        self.players = {player: [n for n in names if trains(n)] for player, names in self.model.players.items()}
        epsilon, steps = config.attack.epsilon, phase2.attack_steps
        self.attack = AttackSpec("pgd", epsilon, steps, default_step_size(epsilon, steps))
        self.training_precision = DTYPES[config.training.precision]
        self.attack_precision = DTYPES[config.evaluation.precision]

    @classmethod
    def from_task(cls, worker: CohortWorker, task: CohortTask, params: ParameterStack) -> Phase2Client:
        """For the clients of a task; ``params`` are its states on the worker's device."""
        method = worker.algorithm
        return cls(
            worker.context(task, params),
            method.parameters.phase2,
            worker.config,
            params,
            task.clients,
            worker.data(task),
            task.round,
            method.is_trained,
        )

    # -- the game ------------------------------------------------------------------------------------------------------

    def benign_end_point(self) -> ParameterStack:
        """theta^b: all layers fine-tuned from theta^r on benign data; theta^r itself for a client that diverges on the way."""
        params = {name: value.clone() for name, value in self.robust.items()}
        step = benign_step(self.model, [name for names in self.players.values() for name in names])
        with at_precision(self.model, self.training_precision):
            settings = EpochSettings(self.config.training, self.phase2.benign_lr, self.phase2.benign_epochs)
            run_epochs(params, step, self.data, self.streams("theta_b"), settings)
        finite_C = torch.stack([value.flatten(1).isfinite().all(1) for value in params.values()]).all(0)
        return {name: torch.where(broadcast_clients(finite_C, v), v, self.robust[name]) for name, v in params.items()}

    def selection_images(self, benign: ParameterStack) -> SelectionImages:
        """The selection split, and what PGD makes of it against theta^r and theta^b (``benign``)."""
        splits = [_head_of(d.selection, self.phase2.max_images) for d in self.data]
        first = self.robust[next(iter(self.robust))]
        images = client_images(splits, first.dtype, first.device)
        with self.stopwatch("attack"):
            against = [self._adversarial(theta, images, splits) for theta in (self.robust, benign)]
        return SelectionImages(images.x, images.y, images.owner, images.num_clients, against)

    def _adversarial(self, params: ParameterStack, images: ClientImages, splits: Sequence[Split]) -> torch.Tensor:
        def loss(u: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self.model.forward(params, u, images.owner), images.y)

        noise = self._noise("game", splits, images.x)
        with at_precision(self.model, self.attack_precision):
            return pgd(loss, images.x, self.attack, noise)

    # -- the guard -----------------------------------------------------------------------------------------------------

    def guard_candidates(self, benign: ParameterStack, candidates: np.ndarray) -> list[GuardOutcome]:
        """``candidates [C, m, n]`` under attacks made freshly for each; row 0 must be the empty selection (theta^r)."""
        num_clients, num_candidates, _ = candidates.shape
        assert not candidates[:, 0].any(), "the guard compares with theta^r"
        reference = self._guard_outcomes(self.robust, range(num_clients))
        outcomes = [reference]
        for row in range(1, num_candidates):
            fresh = [c for c in range(num_clients) if (candidates[c, row] != candidates[c, row - 1]).any()]
            latest = list(outcomes[-1])
            if fresh:
                mixed = mix(self.robust, benign, candidates[:, row], self.model.players)
                for client, outcome in zip(fresh, self._guard_outcomes(mixed, fresh), strict=True):
                    latest[client] = outcome
            outcomes.append(latest)
        return _paired(outcomes)

    def _guard_outcomes(self, params: ParameterStack, clients: Sequence[int]) -> list[np.ndarray]:
        """Per client ``[2, n] bool``: right on the benign image; right under the attack."""
        clients = list(clients)
        splits = [self.data[c].guard for c in clients]
        chosen = select_clients(params, clients)
        first = chosen[next(iter(chosen))]
        images = client_images(splits, first.dtype, first.device)
        with self.stopwatch("attack"):
            draws = split_draws(self.config.seed, f"guard/{self.round}", [self.clients[c] for c in clients], splits)
            with torch.no_grad():
                benign = self.model.forward(chosen, images.x, images.owner).argmax(1) == images.y
            attacked = attack_stack(
                self.model, chosen, images, self.attack, draws.to(first.device), self.attack_precision
            )
            robust = attacked.predictions == images.y
        return [rows.T for rows in images.split_by_client(torch.stack([benign, robust], dim=1))]

    # -- refinement ----------------------------------------------------------------------------------------------------

    def refine(self, selected: np.ndarray) -> tuple[list[ParameterStack], list[GuardOutcome]]:
        """Benign epochs from theta^r on the players in ``selected [C, n]`` alone; everything else stays bit-identical.

        Returns:
            the stack after every epoch, and every client's guard outcomes for theta^r and then for each epoch.
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

    # -- random draws --------------------------------------------------------------------------------------------------

    def streams(self, purpose: str) -> list[torch.Generator]:
        """One generator per client."""
        return [generator(self.config.seed, purpose, client, self.round) for client in self.clients]

    def _noise(self, purpose: str, splits: Sequence[Split], like: torch.Tensor) -> torch.Tensor:
        draws = [
            torch.rand(
                split.images.shape, generator=generator(self.config.seed, f"{purpose}/noise", client, self.round)
            )
            for client, split in zip(self.clients, splits, strict=True)
        ]
        return (torch.cat(draws) * 2 - 1).to(like.device, like.dtype)


def _head_of(split: Split, limit: int) -> Split:
    return Split(split.images[:limit], split.labels[:limit])


def _paired(outcomes: Sequence[Sequence[np.ndarray]]) -> list[GuardOutcome]:
    """``outcomes[m][c] [2, n] bool`` (benign, robust), m = 0 being theta^r -> one `GuardOutcome` per client."""
    paired = []
    for own in zip(*outcomes, strict=True):
        reference = own[0]
        paired.append(
            GuardOutcome(
                lost=np.array([int((reference[1] & ~o[1]).sum()) for o in own]),
                gained=np.array([int((~reference[1] & o[1]).sum()) for o in own]),
                benign_gain=np.array([float(o[0].mean() - reference[0].mean()) for o in own]),
                num_samples=reference.shape[1],
            )
        )
    return paired
