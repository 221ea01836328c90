"""How should training go on after phase 1? Several losses, benign or attacked, at two strengths, without a guard.

    python benchmarks/methods/refinement.py [--seeds 0 1 2] [--epsilon 2/255] [--alpha 0.1] [--lr 0.005]
    python benchmarks/methods/refinement.py --way "adjusted logits, beta 0.99" --way "the same, attacked"

All go on from one and the same end of phase 1 of the ablation's Sylva, which game.py uses, too, for as many epochs.
Images are attacked by PGD-10. They are training images that no client holds: `PER_CLASS` of every class that a client
is tested on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from game import ALPHA, EPSILON, Setting, end_of_phase1, epsilon_argument, phase2_of
from own_shares import MANY, weighted_accuracies

from sylva_ray.aggregation.interpolation import interpolate
from sylva_ray.algorithms.adversarial import class_weights, craft_ce
from sylva_ray.algorithms.sylva import Sylva
from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.core.types import ParameterStack, Split, stack_states, unstack_states
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.client.batches import split_draws
from sylva_ray.federation.client.outcomes import outcomes
from sylva_ray.federation.client.worker import CohortWorker
from sylva_ray.federation.context import Batch, ClientContext
from sylva_ray.federation.method import benign_losses
from sylva_ray.federation.stages.layer_game.client import Phase2Client
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.models.cohort import to_arrays, to_parameters
from sylva_ray.preparation.experiment import Prepared, create_worker

PER_CLASS = 20
"""Images of a class of a client."""

STRENGTHS = (0.5, 1.0)
"""How far the models go from theta_r to the refined state."""

Loss: TypeAlias = "Callable[[ClientContext, ParameterStack, Batch], torch.Tensor]"
"""Of every image, ``[N]``."""


def weighted(context: ClientContext, params: ParameterStack, batch: Batch, beta: float) -> torch.Tensor:
    """Return omega_y CE(z(x), y), see `class_weights`."""
    weights = class_weights(context.class_counts, beta)[batch.device_owner, batch.y]
    return benign_losses(context, params, batch) * weights.float()


def adjusted(context: ClientContext, params: ParameterStack, batch: Batch, tau: float) -> torch.Tensor:
    """Return CE(z(x) + tau log n, y) with the class counts n of a client (Menon et al. 2021)."""
    logits = context.model.forward(params, batch.x, batch.owner)
    offset = tau * context.class_counts.clamp(min=1).log()
    return cross_entropy(logits + context.to_images(offset.to(logits.dtype), batch), batch.y)


class Way(NamedTuple):
    """A way to go on.

    Attributes:
        loss: of an image.
        attacked: images are those of the training attack against the model as it is in that step.
        players: the only ones that are trained; None: all.
    """

    loss: Loss
    attacked: bool = False
    players: tuple[str, ...] | None = None


PHASE2 = Sylva(Sylva.Parameters(class_balance=0.99)).refinement_losses

WAYS: dict[str, Way] = {
    "plain": Way(benign_losses),
    "weights, beta 0.99": Way(partial(weighted, beta=0.99)),
    "weights, beta 0.9999": Way(partial(weighted, beta=0.9999)),
    "adjusted logits, tau 0.75": Way(partial(adjusted, tau=0.75)),
    "adjusted logits, tau 1": Way(partial(adjusted, tau=1.0)),
    "adjusted logits, beta 0.99": Way(PHASE2),
    "the same, head alone": Way(PHASE2, players=("head",)),
    "the same, attacked": Way(PHASE2, attacked=True),
    "weights, beta 0.99, attacked": Way(partial(weighted, beta=0.99), attacked=True),
}
"""Phase 2 has "adjusted logits, beta 0.99", phase 1 "weights, beta 0.99, attacked"."""


def balanced_splits(fleet: FleetData) -> list[Split]:
    """Return the images of every client."""
    test = fleet.dataset.test
    splits = []
    for client in range(fleet.num_clients):
        rng = np.random.default_rng(client)
        classes = np.unique(fleet.test_labels(client))
        chosen = np.concatenate([rng.permutation(np.flatnonzero(test.labels == c))[:PER_CLASS] for c in classes])
        splits.append(Split(test.images[chosen], test.labels[chosen]))
    return splits


@dataclass(frozen=True)
class WaysTask(CohortTask):
    """Goes some ways, and attacks the results.

    Attributes:
        made: the experiment.
        ways: their names.
    """

    made: Prepared
    ways: tuple[str, ...]

    def execute(self, worker: CohortWorker, params: ParameterStack) -> list[list[np.ndarray]]:
        """Return for each client the outcomes ``[2 (benign, attacked), n] bool`` of the states of `_states`."""
        player = Phase2Client.from_task(worker, self, params, phase2_of(self.made))
        splits = balanced_splits(self.made.fleet)
        draws = split_draws(self.made.config.seed, "refinement losses", self.clients, splits)
        states = self._states(player, worker.context(self, params))
        found = [outcomes(player.model, s, splits, player.attack, draws, player.attack_precision) for s in states]
        return [list(own) for own in zip(*found, strict=True)]

    def _states(self, player: Phase2Client, context: ClientContext) -> Iterator[ParameterStack]:
        """Yield theta_r, then what every way results in at every strength."""
        yield player.robust
        robust = unstack_states(to_arrays(player.robust))
        for way in (WAYS[name] for name in self.ways):
            player.losses = partial(self._losses, way, context)  # type: ignore[assignment]
            moves = np.array([way.players is None or name in way.players for name in player.players])
            trained = [
                name for names, moved in zip(player.players.values(), moves, strict=True) if moved for name in names
            ]
            refined = unstack_states(to_arrays(player.refined(np.tile(moves, (len(self.clients), 1)))))
            for strength in STRENGTHS:
                between = [interpolate(*ends, trained, strength) for ends in zip(robust, refined, strict=True)]
                yield to_parameters(stack_states(between), torch.device("cpu"), torch.float32)

    def _losses(self, way: Way, context: ClientContext, params: ParameterStack, batch: Batch) -> torch.Tensor:
        """Return the losses of a batch, ``[N]``."""
        if way.attacked:
            config = self.made.config
            batch = replace(batch, x=craft_ce(context, params, batch, config.attack.spec(config.reported_epsilon)))
        return way.loss(context, params, batch)


def measure(setting: Setting, ways: tuple[str, ...], lr: float | None, out: Path) -> np.ndarray:
    """Return the accuracies ``[states, 4 (columns), 2 (benign, attacked)]`` of a seed, means over clients.

    The columns are: all classes equal; classes of at least `MANY` training images; rarer ones; the clients' own shares.
    """
    phase2: dict[str, Any] = {} if lr is None else {"refine_lr": lr}
    end, made = end_of_phase1(setting, out), setting.prepared(phase2, out)
    fleet, clients = made.fleet, tuple(range(made.fleet.num_clients))
    states = {name: np.stack([state[name] for state in end.states]) for name in end.states[0]}
    worker = create_worker(made.config, fleet, made.backbone)
    of_clients = worker.run(WaysTask(end.step + 1, clients, states, made, ways)).outcomes
    labels, counts = [split.labels for split in balanced_splits(fleet)], fleet.label_matrix()
    weights = [np.ones_like(counts), counts >= MANY, counts < MANY, counts]

    def mean(state: int, kind: int, weight: np.ndarray) -> float:
        return float(weighted_accuracies([own[state][kind] for own in of_clients], labels, weight).mean())

    num_states = len(of_clients[0])
    return np.array([[[mean(s, kind, w) for kind in range(2)] for w in weights] for s in range(num_states)])


def main() -> None:
    """Print a table: means over the seeds, and what each state gained in all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--way", action="append", choices=list(WAYS), help="only this one (may be given again)")
    parser.add_argument(
        "--epsilon", type=epsilon_argument, default=EPSILON, help="of all attacks; default: the ledger's, %(default)s"
    )
    parser.add_argument("--alpha", type=float, default=ALPHA, help="of the Dirichlet partition; default: %(default)s")
    parser.add_argument("--lr", type=float, help="default: that of phase 2; phase 1 has 0.005")
    parser.add_argument("--out", type=Path, default=Path("runs/game"), help="run folders")
    parser.add_argument("--scale", choices=["smoke"], help="a few digits: does it run?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = tuple(arguments.way or WAYS)
    settings = [Setting(seed, arguments.epsilon, arguments.scale, arguments.alpha) for seed in arguments.seeds]
    found = [measure(setting, ways, arguments.lr, arguments.out) for setting in settings]
    table = 100 * np.stack(found)  # [seeds, states, columns, 2]
    columns = ["all classes equal", f"{MANY} images or more", "fewer", "own shares"]
    print(f"| loss | strength | {' | '.join(columns)} | gain of each seed, all classes equal |")
    print(f"|---|---|{'---|' * (len(columns) + 1)}")
    names = [("after phase 1", "")] + [(way, str(strength)) for way in ways for strength in STRENGTHS]
    for state, (way, strength) in enumerate(names):
        cells = [f"{benign:.1f} / {robust:.1f}" for benign, robust in table[:, state].mean(0)]
        gains = [f"{benign:+.1f} / {robust:+.1f}" for benign, robust in table[:, state, 0] - table[:, 0, 0]]
        print(f"| {way} | {strength} | {' | '.join(cells)} | {', '.join(gains) if state else ''} |")


if __name__ == "__main__":
    main()
