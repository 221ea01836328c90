"""Stages by their names in records, for readers of run folders."""

from __future__ import annotations

from collections.abc import Collection

from sylva_ray.federation.stages.federated_round import FederatedRound
from sylva_ray.federation.stages.layer_game.refine import Refine
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.federation.stages.local_epochs import LocalEpochs
from sylva_ray.federation.stages.mixture.stage import Mixture
from sylva_ray.federation.stages.stage import STAGES
from sylva_ray.federation.stages.warm_up import WarmUp

SHIPPED = (WarmUp, FederatedRound, LocalEpochs, Mixture, LayerGame, Refine)
"""The stages of this package; those of other methods are known once their modules are imported."""


def title_of(name: str) -> str:
    """Return the title of a stage; its name if its module has not been imported."""
    return STAGES[name].title if name in STAGES else name.replace("_", " ")


def phase_of(name: str) -> int:
    """Return the phase of a stage; 2 if it is unknown, since methods add stages after phase 1."""
    return STAGES[name].phase if name in STAGES else 2


def phase_title(names: Collection[str]) -> str:
    """Return what the phases of some stages are called, e.g. ``phase 2`` or ``phases 2 and 3``.

    Args:
        names: of stages after phase 1. Where there are none, or one of them is unknown, it is ``after phase 1``.
    """
    if not names or not STAGES.keys() >= set(names):
        return "after phase 1"
    phases = [str(phase) for phase in sorted({STAGES[name].phase for name in names})]
    return f"phases {', '.join(phases[:-1])} and {phases[-1]}" if len(phases) > 1 else f"phase {phases[0]}"


def is_exchange(name: str) -> bool:
    """Return whether a stage of this name is a round of phase 1."""
    return name in STAGES and STAGES[name].exchanges
