"""Work for a cohort of clients, and what comes back: everything that a client is travels inside.

A task is frozen plain data that any worker can execute, in this process or another one. What kinds there are is decided where
they are needed: `sylva_ray.federation.client.training`, `sylva_ray.federation.client.measuring`, and the stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sylva_ray.core.types import ParameterStack, StateStack
from sylva_ray.federation.client.worker import CohortWorker


@dataclass(frozen=True)
class CohortTask(ABC):
    """Work on C clients at once. ``states`` is ``{name: [C, ...]}``, row c belongs to ``clients[c]``."""

    round: int
    clients: tuple[int, ...]
    states: StateStack

    stage: ClassVar[str] = "work"
    """What it is part of, for messages."""
    uses_training_precision: ClassVar[bool] = False
    """Whether its forwards are those of training, in `training.precision`; else they are float32."""

    @abstractmethod
    def execute(self, worker: CohortWorker, params: ParameterStack) -> Sequence[Any]:
        """Do the work; ``params`` are ``states`` on the worker's device. Returns one outcome per client, in their order."""

    @property
    def where(self) -> str:
        """For error messages: which stage, which clients, which round."""
        return f"{self.stage}, round {self.round}, clients {', '.join(map(str, self.clients))}"
