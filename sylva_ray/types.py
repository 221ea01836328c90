"""The plain data that crosses borders: between files, processes and machines.

Shape letters used in the whole project::

    K  clients of the fleet          C  clients (or coalitions) in one stack
    N  images in a flat batch        T  tokens of an image
    r  LoRA rank                     n  players of the layer game

A client *is* its state: a flat ``{parameter name: float32 array}`` with names such as ``blocks.0.attn.qkv.lora_A``
``[r, d_in]``, ``blocks.0.attn.qkv.lora_B`` ``[d_out, r]``, ``head.weight`` ``[num_classes, width]``. A stack of C states
has the same names with a leading axis C.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

import numpy as np
import torch

ClientState: TypeAlias = Mapping[str, np.ndarray]
"""``{name: [...]}``: everything that makes a client what it is."""

StateStack: TypeAlias = Mapping[str, np.ndarray]
"""``{name: [C, ...]}``: C client states, stacked."""

ParameterStack: TypeAlias = dict[str, torch.Tensor]
"""``{name: [C, ...]}``: the same as tensors on the device."""


def stack_states(states: Sequence[ClientState]) -> dict[str, np.ndarray]:
    """C states of equal names and shapes -> ``{name: [C, ...]}`` (a copy), names sorted.

    The order matters to the last bit: norms are summed over names, and a checkpoint forgets the order they had.
    """
    return {name: np.stack([state[name] for state in states]) for name in sorted(states[0])}


def unstack_states(stack: StateStack) -> list[dict[str, np.ndarray]]:
    """``{name: [C, ...]}`` -> C states (copies, so that one client's state does not keep the others' memory)."""
    size = len(next(iter(stack.values())))
    return [{name: np.array(value[c]) for name, value in stack.items()} for c in range(size)]


def stack_digest(stack: StateStack) -> bytes:
    """The same for the same names and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(stack):
        value = np.ascontiguousarray(stack[name])
        digest.update(f"{name}{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.digest()


def state_bytes(state: ClientState) -> int:
    """Payload of a state in bytes, by its arrays (the serialised file adds a small constant header)."""
    return sum(value.nbytes for value in state.values())


@dataclass(frozen=True)
class Split:
    """One split of one client: ``images [n, 3, H, W] uint8``, ``labels [n] int64``."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ClientData:
    """The slice of the world that one client sees; the four splits never share an image.

    ``selection`` and ``guard`` are the two halves of the validation data: the first chooses layers, the second accepts or
    rejects the choice. Neither trains a weight.
    """

    train: Split
    selection: Split
    guard: Split
    test: Split

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Training images per class, ``[num_classes] int64``."""
        return np.bincount(self.train.labels, minlength=num_classes)

    @property
    def majority_share(self) -> float:
        """Accuracy on the test split of always answering this client's most frequent training class, in [0, 1]."""
        majority = int(np.bincount(self.train.labels).argmax())
        return float(np.mean(self.test.labels == majority))


@dataclass(frozen=True)
class AttackSpec:
    """An evasion attack in [0, 1] pixel space; ``epsilon`` and ``step_size`` in pixel units (8/255, not 8).

    ``name`` is one of ``fgsm``, ``pgd``. ``loss`` is what the attack maximises: ``ce`` (cross-entropy), ``kl`` (divergence
    from the clean prediction) or ``margin`` (best wrong logit minus true logit).
    """

    name: str
    epsilon: float
    steps: int
    step_size: float
    random_start: bool = True
    restarts: int = 1
    loss: str = "ce"

    @property
    def label(self) -> str:
        """Short, unique name used as a metric key: ``pgd20-eps4`` is 20 steps at epsilon 4/255."""
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        loss = "" if self.loss == "ce" else f"-{self.loss}"
        return f"{self.name}{self.steps if self.name != 'fgsm' else ''}{restarts}{loss}-eps{self.epsilon * 255:.4g}"


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: what a pool of workers is asked to do. Everything a client is travels inside; any worker can run any task.


@dataclass(frozen=True)
class CohortTask:
    """Work on C clients at once. ``states`` is ``{name: [C, ...]}``, row c belongs to ``clients[c]``."""

    round: int
    clients: tuple[int, ...]
    states: StateStack

    stage = "work"

    @property
    def where(self) -> str:
        """For error messages: which stage, which clients, which round."""
        return f"{self.stage}, round {self.round}, clients {', '.join(map(str, self.clients))}"


@dataclass(frozen=True)
class TrainTask(CohortTask):
    """Local training with the experiment's algorithm. ``epsilon`` in pixel units (ramped during the warm-up);
    ``head_epochs`` benign epochs of the head alone come first; ``lr`` is this round's learning rate."""

    epsilon: float = 0.0
    lr: float = 0.0
    epochs: int = 1
    head_epochs: int = 0

    stage = "train"


@dataclass(frozen=True)
class EvaluateTask(CohortTask):
    """Predictions on the test images, benign and under each attack. ``max_samples`` per client (None: all)."""

    attacks: tuple[AttackSpec, ...] = ()
    max_samples: int | None = None

    stage = "evaluate"


@dataclass(frozen=True)
class GameTask(CohortTask):
    """Values of the layer game's coalitions. ``states`` are the robust states (theta^r); ``coalitions [m, n] bool``.

    ``selection`` is `Phase2Parameters.selection`: ``gates`` and ``shift`` ask for scores of the layers instead of values."""

    coalitions: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))
    selection: str = "shapley"

    stage = "layer game"


@dataclass(frozen=True)
class GuardTask(CohortTask):
    """Candidate selections under freshly made attacks on the guard split.

    ``benign_states`` (theta^b) like ``states``; ``candidates [C, m, n] bool``: m candidate coalitions per client."""

    benign_states: StateStack = field(default_factory=dict)
    candidates: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), bool))

    stage = "guard"


@dataclass(frozen=True)
class RefineTask(CohortTask):
    """Benign refinement of the selected layers only. ``selected [C, n] bool``."""

    selected: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool))

    stage = "refine"


# ---------------------------------------------------------------------------------------------------------------------
# Outcomes: what one client sends back. `CohortResult.outcomes` holds them in the order of ``task.clients``.


@dataclass(frozen=True)
class TrainOutcome:
    """The ``state`` after training on ``num_samples`` images; ``metrics {name: value}`` (mean loss of the last epoch)."""

    state: ClientState
    num_samples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class EvaluateOutcome:
    """``predictions[condition] [n] int64`` where a condition is ``benign`` or an attack's label."""

    predictions: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class GameOutcome:
    """``values [m, 2]``: mean true-class probability on ``num_samples`` selection images, benign and robust, per coalition.

    ``benign_state`` is theta^b; ``block_evaluations`` counts blocks run per input set (2^(L+1) - 2 when exact); ``scores [n]``
    are there where the layers are ranked by something else than the game."""

    benign_state: ClientState
    values: np.ndarray
    num_samples: int
    block_evaluations: int
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class GuardOutcome:
    """Paired outcomes of m candidates against theta^r on ``num_samples`` guard images, under attacks made for each.

    ``lost [m]``: images robust with theta^r but not with the candidate; ``gained [m]``: the reverse;
    ``benign_gain [m]``: benign accuracy of the candidate minus that of theta^r."""

    lost: np.ndarray
    gained: np.ndarray
    benign_gain: np.ndarray
    num_samples: int


@dataclass(frozen=True)
class RefineOutcome:
    """``states[e]`` after benign epoch e + 1; ``guard`` has a column for theta^r and one for every epoch, ``m = 1 + epochs``."""

    states: tuple[ClientState, ...]
    guard: GuardOutcome


OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True)
class CohortResult(Generic[OutcomeT]):
    """``seconds`` is {stage: wall seconds inside the worker}, ``peak_memory_bytes`` the worker process's high-water mark."""

    clients: tuple[int, ...]
    outcomes: tuple[OutcomeT, ...]
    seconds: Mapping[str, float]
    peak_memory_bytes: int
