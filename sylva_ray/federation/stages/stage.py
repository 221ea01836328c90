"""A stage of a run: what it does to the clients, what it adds to the record, and when it is evaluated.

A run is a list of stages (`sylva_ray.federation.contract.Method.stages`), and each is a step of everything: of the
loop, of checkpoints, of ``rounds.jsonl``, of what a tracker is sent. A stage owns its client half and its server half.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.federation.server import Server

Evaluated = Literal["in full", "at intervals", "never"]
"""``at intervals``: every ``evaluation.every`` stages, with the first attack. The end of a phase and of the run are
evaluated in full whatever a stage says, unless it says ``never``."""


@dataclass(frozen=True)
class StageResult:
    """What a stage adds to its record; None and empty where it has nothing to say.

    Attributes:
        epsilon, lr: of its training; epsilon in pixel units.
        participants: client numbers; None: everybody.
        missing: participants that did not answer before the deadline.
        metrics: ``{name: {client: value}}``.
        neighbours: whose values and guard outcomes speak for whom in the stages that follow.
    """

    epsilon: float | None = None
    lr: float | None = None
    participants: Sequence[int] | None = None
    missing: Sequence[int] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    neighbours: NeighbourGraph | None = None


class Stage(ABC):
    """One stage. Its place in the list numbers it: the rounds of phase 1 count from 1, since a warm-up comes first."""

    name: ClassVar[str]
    """In records and events."""
    title: ClassVar[str]
    """For people."""
    phase: ClassVar[int] = 1
    """0: before the defence; 1: the fleet trains together; 2 and more: what follows, each opened by its first stage."""
    exchanges: ClassVar[bool] = False
    """Whether it is a round of phase 1, over which traffic per client and round is counted."""
    evaluated: ClassVar[Evaluated] = "at intervals"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            KINDS[cls.name] = cls

    @abstractmethod
    def run(self, server: Server, round: int) -> StageResult:
        """Change ``server.states``. ``round`` numbers the stage and its random draws."""


KINDS: dict[str, type[Stage]] = {}
"""Every stage that has been imported, by name (`sylva_ray.federation.stages.kinds`)."""
