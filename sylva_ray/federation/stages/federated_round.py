"""A round of phase 1: 1 choose participants, 2 train locally, 3 exchange: upload, aggregate, download."""

from __future__ import annotations

import math

from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.federation.client.training import TrainSettings
from sylva_ray.federation.cohorts import choose_participants
from sylva_ray.federation.server import Server
from sylva_ray.federation.stages.stage import Stage, StageResult


class FederatedRound(Stage):
    """One round of phase 1. The last one also records the neighbourhoods, if a later stage needs them."""

    name = "phase1"
    title = "phase 1: adversarial"
    exchanges = True

    def run(self, server: Server, round: int) -> StageResult:
        """See `Stage.run`."""
        config = server.config
        participants = choose_participants(config, round, server.previous_missing)
        epsilon, lr = epsilon_of(config, server.parameters.epsilon_warmup, round), lr_of(config, round)
        received = server.states.copy()
        settings = TrainSettings(epsilon, lr, config.training.local_epochs)
        outcomes, missing = server.train(round, participants, settings, config.cluster.round_deadline_s)
        metrics = server.adopt_states(outcomes)
        uploads = server.exchange(round, outcomes, received)
        is_read = round == config.training.rounds and server.parameters.phase2.enabled
        graph = server.neighbourhood(received, uploads) if is_read else None
        return StageResult(epsilon, lr, participants, missing, metrics, graph)


def federated_rounds(config: ResolvedConfig) -> list[Stage]:
    """Return ``training.rounds`` rounds."""
    return [FederatedRound() for _ in range(config.training.rounds)]


def epsilon_of(config: ResolvedConfig, warmup: float, round: int) -> float:
    """Return the epsilon of a round, ramped from 0 over a fraction ``warmup`` of the rounds to avoid collapse."""
    ramp = math.ceil(warmup * config.training.rounds)
    return config.attack.epsilon * min(1.0, round / (ramp + 1))


def lr_of(config: ResolvedConfig, round: int) -> float:
    """Return the learning rate of a round: a cosine from ``training.lr`` down to a tenth of it, or constant."""
    training = config.training
    if training.lr_schedule == "constant" or training.rounds == 1:
        return training.lr
    progress = (round - 1) / (training.rounds - 1)
    return training.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
