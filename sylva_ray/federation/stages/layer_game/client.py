"""The client half of phase 2: values of coalitions, outcomes of candidates, benign refinement.

The client measures and trains. The coordinator decides about coalitions, layers and strengths
(`sylva_ray.federation.stages.layer_game.server`); it gets a few numbers and no images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sylva_ray.aggregation.interpolation import interpolate
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.pgd import default_step_size, pgd
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.lazy import torch
from sylva_ray.core.precision import at_precision, torch_dtype
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import (
    AttackSpec,
    ClientData,
    ClientImages,
    ParameterStack,
    Split,
    StateStack,
    stack_states,
    unstack_states,
)
from sylva_ray.core.windows import Window, in_windows, joined
from sylva_ray.federation.client.batches import ClientStream, client_images, client_streams, split_draws
from sylva_ray.federation.client.outcomes import outcomes
from sylva_ray.federation.client.training import EpochSettings, benign_step, run_epochs
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.context import ClientContext
from sylva_ray.federation.method import Method
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.coalitions import mix
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.models.cohort import broadcast_clients, select_clients, to_arrays, to_parameters


@dataclass(frozen=True)
class PairedOutcomes:
    """Outcomes of m states paired with those of theta^r on held-out images, which are attacked anew for each state.

    Attributes:
        lost: ``[m, 2]``, images that theta^r classifies correctly and the state does not: benign, and under attack.
            Where images have weights, their share of the weights times ``num_samples``.
        gained: ``[m, 2]``, the reverse.
        num_samples: images; where they have weights, the effective number of them (`paired`).
    """

    lost: np.ndarray
    gained: np.ndarray
    num_samples: float

    @property
    def num_bytes(self) -> int:
        """What a client uploads."""
        return self.lost.nbytes + self.gained.nbytes


@dataclass(frozen=True)
class SelectionImages(ClientImages):
    """The selection splits of a cohort.

    Attributes:
        against: the images after PGD against theta^r, and against theta^b.
        weights: how much each image counts, ``[N]``, with mean 1 in every client.
    """

    against: Sequence[torch.Tensor]
    weights: torch.Tensor


class Phase2Client:
    """Phase 2 for one cohort.

    Args:
        context: of the cohort.
        phase2: the parameters of phase 2.
        config: the experiment.
        robust: theta^r, the states after phase 1.
        task: its clients, and the position of the stage, which names the random numbers.
        data: of every client.
        method: says which parameters are trained, and on which loss; the others are not changed.

    Attributes:
        value_precision: of the forwards that evaluate coalitions.
    """

    def __init__(
        self,
        context: ClientContext,
        phase2: Phase2Parameters,
        config: ResolvedConfig,
        robust: ParameterStack,
        task: CohortTask,
        data: Sequence[ClientData],
        method: Method,
    ) -> None:
        from sylva_ray.models.lora import LoraStack  # it imports timm

        assert isinstance(context.model, LoraStack), "phase 2 needs adapters"
        self.model, self.stopwatch = context.model, context.stopwatch
        self.phase2, self.config = phase2, config
        self.losses = partial(method.refinement_losses, context)
        self.robust, self.clients, self.step, self.data = robust, task.clients, task.step, data
        self.players = {
            player: [n for n in names if method.is_trained(n)] for player, names in self.model.players.items()
        }
        epsilon, steps = config.reported_epsilon, phase2.attack_steps
        self.attack = AttackSpec("pgd", epsilon, steps, default_step_size(epsilon, steps))
        self.image_weights, self.class_counts = method.image_weights, context.class_counts.cpu().numpy()
        self.training_precision = torch_dtype(config.training.precision)
        self.attack_precision = torch_dtype(config.evaluation.precision)
        self.value_precision = torch.float32

    @classmethod
    def from_task(
        cls, worker: CohortWorker, task: CohortTask, params: ParameterStack, phase2: Phase2Parameters
    ) -> Phase2Client:
        """Create it for the clients of a task; ``params`` are its states on the worker's device."""
        context, data = worker.context(task, params), [worker.training_data(client) for client in task.clients]
        return cls(context, phase2, worker.config, params, task, data, worker.algorithm)

    # -- the game ---------------------------------------------------------------------------------------------------

    def benign_end_point(self) -> ParameterStack:
        """Return theta^b, fine-tuned from theta^r on benign data; theta^r for a client whose training diverges."""
        params = {name: value.clone() for name, value in self.robust.items()}
        step = benign_step(self.losses, [name for names in self.players.values() for name in names])
        with at_precision(self.model, self.training_precision):
            settings = EpochSettings(self.config.training, self.phase2.benign_lr, self.phase2.benign_epochs)
            run_epochs(params, step, self.data, self._training_streams("theta_b"), settings)
        return self._finite_or_robust(params)

    @property
    def selection_splits(self) -> list[Split]:
        """The images of every client that the game is played on."""
        return [own.selection.first(self.phase2.max_images) for own in self.data]

    def selection_images(self, benign: ParameterStack) -> SelectionImages:
        """Return the selection split and the results of PGD on it against theta^r and theta^b (``benign``)."""
        splits = self.selection_splits
        first = self.robust[next(iter(self.robust))]
        images = client_images(splits, first.dtype, first.device)
        with self.stopwatch("attack"):
            against = [self.adversarial(theta, images, splits) for theta in (self.robust, benign)]
        weights = torch.from_numpy(np.concatenate(self.weights(splits))).to(images.x)
        return SelectionImages(images.x, images.y, images.owner, images.num_clients, against, weights)

    def adversarial(self, params: ParameterStack, images: ClientImages, splits: Sequence[Split]) -> torch.Tensor:
        """Return the results of PGD against ``params`` on the images of ``splits``, which ``images`` holds."""
        noise = self._noise(splits, images.x)

        def attack(window: Window) -> torch.Tensor:
            own, part = window.select(params), images.part(window)

            def loss(u: torch.Tensor) -> torch.Tensor:
                return cross_entropy(self.model.forward(own, u, part.owner), part.y)

            return pgd(loss, part.x, self.attack, noise[window.rows])

        with at_precision(self.model, self.attack_precision):
            return joined(in_windows(images.counts.tolist(), self.model.windows, "attack", attack))

    # -- candidate selections ---------------------------------------------------------------------------------------

    def try_candidates(self, benign: ParameterStack, candidates: np.ndarray) -> list[PairedOutcomes]:
        """Attack ``candidates [C, m, n]`` on the selection split, each anew; row 0 must be empty, which is theta^r."""
        num_clients, num_candidates, _ = candidates.shape
        assert not candidates[:, 0].any(), "candidates are compared with theta^r"
        splits = [own.selection for own in self.data]
        reference = self._outcomes(self.robust, splits, "candidates")
        found = [reference]
        for row in range(1, num_candidates):
            changed = [c for c in range(num_clients) if (candidates[c, row] != candidates[c, row - 1]).any()]
            latest = list(found[-1])
            if changed:
                mixed = mix(self.robust, benign, candidates[:, row], self.model.players)
                for client, outcome in zip(changed, self._outcomes(mixed, splits, "candidates", changed), strict=True):
                    latest[client] = outcome
            found.append(latest)
        return paired(found, self.weights(splits))

    def weights(self, splits: Sequence[Split]) -> list[np.ndarray]:
        """Return how much each image of every client's split counts, with mean 1.

        Raises:
            UserError: a method of one's own returns no positive number for every image.
        """
        weights = []
        for own, split in zip(self.class_counts, splits, strict=True):
            found = np.asarray(self.image_weights(own, split.labels), float)
            if found.shape != split.labels.shape or not (np.isfinite(found).all() and (found > 0).all()):
                fix = "image_weights must return a positive number for every image"
                raise UserError("algorithm.name", self.config.algorithm.name, fix)
            weights.append(found / found.mean() if len(found) else found)
        return weights

    def _outcomes(
        self, params: ParameterStack, splits: Sequence[Split], purpose: str, rows: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """Return ``[2, n] bool`` per client, or for those in ``rows``: correct on the benign image, under the attack.

        ``splits`` has the images of every client, and ``purpose`` names the random numbers of the attack.
        """
        rows = range(len(self.clients)) if rows is None else rows
        splits = [splits[c] for c in rows]
        draws = split_draws(self.config.seed, f"{purpose}/{self.step}", [self.clients[c] for c in rows], splits)
        with self.stopwatch("attack"):
            chosen = select_clients(params, list(rows))
            return outcomes(self.model, chosen, splits, self.attack, draws, self.attack_precision)

    # -- refinement -------------------------------------------------------------------------------------------------

    def refine(self, selected: np.ndarray) -> tuple[list[StateStack], list[PairedOutcomes]]:
        """Train the players in ``selected [C, n]`` on benign data from theta^r, and go back towards it.

        Returns:
            The states at every strength, stacked, and every client's outcomes on its guard split for theta^r and for
            each strength.
        """
        robust, refined = (unstack_states(to_arrays(stack)) for stack in (self.robust, self.refined(selected)))
        movable = [
            [name for names, moves in zip(self.players.values(), own, strict=True) if moves for name in names]
            for own in selected
        ]
        stacks: list[StateStack] = [
            stack_states([interpolate(*ends, strength) for ends in zip(robust, refined, movable, strict=True)])
            for strength in self.phase2.strengths
        ]
        device, splits = self.robust[next(iter(self.robust))].device, [own.guard for own in self.data]
        states = [self.robust, *(to_parameters(stack, device, torch.float32) for stack in stacks)]
        return stacks, paired([self._outcomes(params, splits, "guard") for params in states], self.weights(splits))

    def refined(self, selected: np.ndarray) -> ParameterStack:
        """Return theta^r with the players in ``selected`` trained on benign data; other parameters keep their bits.

        A client whose training diverges stays at theta^r.
        """
        params = {name: value.clone() for name, value in self.robust.items()}
        device = next(iter(params.values())).device
        masks = {
            name: torch.from_numpy(selected[:, player]).to(device)
            for player, names in enumerate(self.players.values())
            for name in names
        }
        step = benign_step(self.losses, [name for name, rows in masks.items() if bool(rows.any())])
        settings = EpochSettings(self.config.training, self.phase2.refine_lr, self.phase2.refine_epochs)
        with self.stopwatch("train"), at_precision(self.model, self.training_precision):
            run_epochs(params, step, self.data, self._training_streams("refine"), settings, masks)
        return self._finite_or_robust(params)

    def _finite_or_robust(self, params: ParameterStack) -> ParameterStack:
        """Return ``params``, and theta^r for the clients of which an entry is not finite."""
        finite_C = torch.stack([value.flatten(1).isfinite().all(1) for value in params.values()]).all(0)
        return {name: torch.where(broadcast_clients(finite_C, v), v, self.robust[name]) for name, v in params.items()}

    # -- random draws -----------------------------------------------------------------------------------------------

    def streams(self, purpose: str) -> list[torch.Generator]:
        """Return one generator per client."""
        return [generator(self.config.seed, purpose, client, self.step) for client in self.clients]

    def _training_streams(self, purpose: str) -> list[ClientStream]:
        return client_streams(self.config.seed, purpose, self.clients, self.step)

    def _noise(self, splits: Sequence[Split], like: torch.Tensor) -> torch.Tensor:
        draws = split_draws(self.config.seed, f"game/noise/{self.step}", self.clients, splits).to(like.device)
        return draws.signed(0, like.shape[1:]).to(like.dtype)


def effective_number(weights: np.ndarray) -> float:
    """Return (sum w)^2 / sum w^2 (Kish 1965): of equal images whose mean varies as much as the weighted one."""
    return float(weights.sum() ** 2 / (weights**2).sum()) if len(weights) else 0.0


def paired(outcomes: Sequence[Sequence[np.ndarray]], weights: Sequence[np.ndarray]) -> list[PairedOutcomes]:
    """Pair the outcomes of m states with those of the first one, theta^r, for every client.

    Where images have weights, shares of images are weighted shares, and their number is the effective one. That is
    right for losses that do not depend on the weights. Of losses that fall on the heaviest images alone, a bound of
    90 % lets more than one in ten pass: 13 to 28 % at a net loss of the tolerance, for weights of 5 to 43 to 1.

    Args:
        outcomes: ``[m][c]``, each ``[2, n_c] bool``: right on the benign image, and under attack.
        weights: of the images of every client, ``[n_c]``.
    """
    found = []
    for own, *candidates in zip(weights, *outcomes, strict=True):
        before, after = candidates[0], np.stack(candidates)
        num_samples = effective_number(own)
        scaled = own * (num_samples / own.sum()) if len(own) else own
        found.append(PairedOutcomes((before & ~after) @ scaled, (~before & after) @ scaled, num_samples))
    return found
