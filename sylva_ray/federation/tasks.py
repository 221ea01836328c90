"""Tasks: work for a cohort of clients, with the whole state of these clients.

A task is frozen plain data that any worker can execute, in this process or another one. Kinds of tasks are defined
where they are used: `sylva_ray.federation.client.training`, `sylva_ray.federation.client.measuring`, and the stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sylva_ray.core.text import clients_text
from sylva_ray.core.types import ParameterStack, StateStack
from sylva_ray.federation.client.worker import CohortWorker


@dataclass(frozen=True)
class CohortTask(ABC):
    """Work on C clients at once.

    Attributes:
        step: position of the stage in the run, from 0.
        clients: their numbers.
        states: ``{name: [C, ...]}``; row c belongs to ``clients[c]``.
    """

    step: int
    clients: tuple[int, ...]
    states: StateStack

    stage: ClassVar[str] = "work"
    """What the task is part of, for messages."""
    uses_training_precision: ClassVar[bool] = False
    """Whether forwards are computed in ``training.precision``; otherwise in float32."""

    @abstractmethod
    def execute(self, worker: CohortWorker, params: ParameterStack) -> Sequence[Any]:
        """Do the work and return one outcome per client, in their order; ``params`` are ``states`` on the device."""

    @property
    def num_epochs(self) -> int:
        """Passes over the data of the clients; a task with more of them takes longer."""
        return 1

    @property
    def where(self) -> str:
        """Stage, step and clients, for error messages."""
        return f"{self.stage}, step {self.step}, {clients_text(self.clients)}"
