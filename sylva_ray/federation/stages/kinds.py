"""Stages by the names that records keep: what readers of a run folder ask about a stage."""

from __future__ import annotations

from sylva_ray.federation.stages.federated_round import FederatedRound
from sylva_ray.federation.stages.layer_game.refine import Refine
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.federation.stages.local_epochs import LocalEpochs
from sylva_ray.federation.stages.stage import KINDS
from sylva_ray.federation.stages.warm_up import WarmUp

SHIPPED = (WarmUp, FederatedRound, LocalEpochs, LayerGame, Refine)
"""Those that come with this package; a method's own are known once its module is imported."""


def title_of(name: str) -> str:
    """A stage's title; its name, if the method that it belongs to has not been imported."""
    return KINDS[name].title if name in KINDS else name.replace("_", " ")


def phase_of(name: str) -> int:
    """A stage's phase; 2 if it is not known: what comes after phase 1 is the one thing that methods add."""
    return KINDS[name].phase if name in KINDS else 2


def is_exchange(name: str) -> bool:
    """Whether a stage of this name is a round of phase 1."""
    return name in KINDS and KINDS[name].exchanges
