"""A stage of a run: what it does to the clients, what it adds to the record, and when it is evaluated.

A run is a list of stages (`sylva_ray.federation.contract.Algorithm.stages`). After each there is a checkpoint, a record
in ``rounds.jsonl``, and an update of the tracker. A stage consists of its client half and its server half.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sylva_ray.aggregation.neighbours import NeighbourGraph
from sylva_ray.federation.server import Server
from sylva_ray.models.cohort import CohortModel

Evaluated = Literal["in full", "at intervals", "never"]
"""When a stage is evaluated.

``at intervals``: every ``evaluation.every`` stages, with the first attack. The last stage of a phase and of the run is
evaluated in full, unless it is ``never``.
"""


@dataclass(frozen=True)
class StageResult:
    """What a stage adds to its record; None and empty values where it adds nothing.

    Attributes:
        epsilon: of its training attack, in pixel units; None: nothing was attacked in training.
        lr: learning rate of its training.
        participants: client numbers; None: all clients.
        missing: participants that did not finish before the deadline.
        metrics: ``{name: {client: value}}``.
        neighbours: the neighbourhoods for the stages that follow.
    """

    epsilon: float | None = None
    lr: float | None = None
    participants: Sequence[int] | None = None
    missing: Sequence[int] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    neighbours: NeighbourGraph | None = None


class Stage(ABC):
    """A stage of a run. It is numbered by its position in the list, from 0."""

    name: ClassVar[str]
    """Identifies the stage in records; unique among all stages."""
    title: ClassVar[str]
    """Is shown in the progress display and in tables."""
    phase: ClassVar[int] = 1
    """0: before the defence; 1: federated training; 2 and more: what follows."""
    exchanges: ClassVar[bool] = False
    """Whether it is a round, in which clients exchange what they share. Traffic per round is counted over these."""
    needs_neighbours: ClassVar[bool] = False
    """Whether it uses `Server.recorded_neighbourhood`, which the last round before it then records."""
    evaluated: ClassVar[Evaluated] = "at intervals"

    @property
    def heading(self) -> str:
        """What the progress display calls this stage of a run: the title, unless stages of one name differ."""
        return self.title

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            known = STAGES.setdefault(cls.name, cls)
            if not _is_same(known, cls):
                raise ValueError(f"two stages are named {cls.name!r}: {known.__qualname__} and {cls.__qualname__}")
            STAGES[cls.name] = cls

    def check(self, model: CohortModel) -> None:
        """Check, before a run, that the stage can work with the model that clients train. By default any will do.

        Raises:
            UserError: it cannot.
        """
        del model

    @abstractmethod
    def run(self, server: Server, step: int) -> StageResult:
        """Change ``server.states``; ``step`` is the position of the stage, which names its random numbers."""


STAGES: dict[str, type[Stage]] = {}
"""Every stage that has been imported, by name (`sylva_ray.federation.stages.kinds`)."""


def _is_same(known: type[Stage], new: type[Stage]) -> bool:
    """Return whether two classes come from one definition that was executed twice.

    That is a cell of a notebook that is run again, or a file that has two names: a script is ``__main__``, and is
    imported by its own name where a configuration names a method in it; and a symbolic link leads to it.
    """
    if known.__qualname__ != new.__qualname__:
        return False
    return known.__module__ == new.__module__ or _file_of(known) == _file_of(new)


def _file_of(stage: type[Stage]) -> str:
    """Return the path of the file that defines a class, without symbolic links."""
    return os.path.realpath(getattr(getattr(stage.run, "__code__", None), "co_filename", stage.__module__))
