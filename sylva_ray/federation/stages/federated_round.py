"""A round of phase 1: 1 choose participants, 2 train locally, 3 exchange: upload, aggregate, download."""

from __future__ import annotations

import math

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.federation.client.training import TrainSettings
from sylva_ray.federation.cohorts import choose_participants
from sylva_ray.federation.parameters import MethodParameters
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.stage import Stage, StageResult


class FederatedRound(Stage):
    """One round of phase 1. The last one before a stage that needs neighbourhoods also records them.

    Args:
        number: of the round, from 1; epsilon and learning rate depend on it.
        num_rounds: rounds of the run.
    """

    name = "phase1"
    title = "phase 1: adversarial"
    exchanges = True

    def __init__(self, number: int, num_rounds: int) -> None:
        assert 1 <= number <= num_rounds, f"round {number} of {num_rounds}"
        self.number, self.num_rounds = number, num_rounds

    @property
    def heading(self) -> str:
        """See `Stage.heading`."""
        return f"phase 1: round {self.number} of {self.num_rounds}"

    def amounts(self, config: ResolvedConfig, parameters: MethodParameters) -> tuple[float, float]:
        """Return the epsilon and the learning rate of the round."""
        epsilon = epsilon_of(config, parameters.epsilon_warmup, self.number, self.num_rounds)
        return epsilon, lr_of(config, self.number, self.num_rounds)

    def run(self, server: Server, step: int) -> StageResult:
        """See `Stage.run`."""
        config = server.config
        participants = choose_participants(config, step, server.invited_again)
        epsilon, lr = self.amounts(config, server.parameters)
        received = server.states.copy()
        settings = TrainSettings(epsilon, lr, config.training.local_epochs)
        outcomes, missing = server.train(step, participants, settings, config.cluster.round_deadline_s)
        metrics = server.adopt_states(outcomes)
        uploads = server.exchange(step, outcomes, received)
        graph = server.neighbourhood(received, uploads) if server.place.records_neighbours else None
        return StageResult(attacked_at(epsilon, server), lr, participants, missing, metrics, graph)


def federated_rounds(config: ResolvedConfig) -> list[Stage]:
    """Return ``training.rounds`` rounds."""
    num_rounds = config.training.rounds
    return [FederatedRound(number, num_rounds) for number in range(1, num_rounds + 1)]


def epsilon_of(config: ResolvedConfig, warmup: float, number: int, num_rounds: int) -> float:
    """Return the epsilon of a round, ramped from 0 over a fraction ``warmup`` of the rounds to avoid collapse.

    A single round has all of it.

    >>> from types import SimpleNamespace
    >>> config = SimpleNamespace(attack=SimpleNamespace(epsilon=1.0))
    >>> [round(epsilon_of(config, 0.5, number, 4), 3) for number in (1, 2, 3, 4)]
    [0.333, 0.667, 1.0, 1.0]
    """
    if num_rounds == 1:
        return config.attack.epsilon
    ramp = math.ceil(warmup * num_rounds - 1e-9)  # 0.07 * 100 is a little more than 7
    return config.attack.epsilon * min(1.0, number / (ramp + 1))


def attacked_at(epsilon: float, server: Server) -> float | None:
    """Return the epsilon of a stage's record; None if nothing is attacked in training."""
    return epsilon if server.algorithm.is_adversarial and epsilon > 0 else None


def lr_of(config: ResolvedConfig, number: int, num_rounds: int) -> float:
    """Return the learning rate of a round: a cosine from ``training.lr`` down to a tenth of it, or constant."""
    training = config.training
    if training.lr_schedule == "constant" or num_rounds == 1:
        return training.lr
    progress = (number - 1) / (num_rounds - 1)
    return training.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def last_lr(config: ResolvedConfig) -> float:
    """Return the learning rate of the last round, with which stages after phase 1 train."""
    return lr_of(config, config.training.rounds, config.training.rounds)
