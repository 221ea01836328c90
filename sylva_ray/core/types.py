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
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

ClientState: TypeAlias = Mapping[str, np.ndarray]
"""``{name: [...]}``: everything that makes a client what it is."""

StateStack: TypeAlias = Mapping[str, np.ndarray]
"""``{name: [C, ...]}``: C client states, stacked."""

ParameterStack: TypeAlias = "dict[str, torch.Tensor]"
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
    """An evasion attack in [0, 1] pixel space.

    ``name`` is a key of `sylva_ray.attacks.registry.ATTACKS`. ``epsilon`` and ``step_size`` are in pixel units (8/255, not 8) for
    ``norm`` linf, lengths of the whole image for l2, pixels for l0; infinite where the nearest adversarial image is sought.
    ``loss`` is what the attack maximises. ``options`` are what only this attack has, as ``((key, number), ...)``.
    """

    name: str
    epsilon: float
    steps: int
    step_size: float
    random_start: bool = True
    restarts: int = 1
    loss: str = "ce"
    norm: str = "linf"
    options: tuple[tuple[str, float], ...] = ()

    def option(self, key: str, default: float) -> float:
        """A value among ``options``."""
        return dict(self.options).get(key, default)

    @property
    def label(self) -> str:
        """Short, unique name used as a metric key: ``pgd20-eps4`` is 20 steps at epsilon 4/255, ``pgd50x5-margin-l2-eps0.5``
        is 50 steps, 5 restarts, the margin as loss, an L2 ball of radius 0.5."""
        steps = "" if self.name in ("fgsm", "autoattack") else str(self.steps)
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        loss = "" if self.loss == "ce" else f"-{self.loss}"
        norm = "" if self.norm == "linf" else f"-{self.norm}"
        options = "".join(f"-{key}{value:g}" for key, value in self.options)
        scale = 255 if self.norm == "linf" else 1
        budget = "" if self.epsilon == float("inf") else f"-eps{self.epsilon * scale:.4g}"
        return f"{self.name}{steps}{restarts}{loss}{norm}{options}{budget}"


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
    """Answers on the test images, benign and under each attack: per client ``max_samples`` (None: all) from number ``first`` on.

    With ``keep`` the adversarial images come back as well."""

    attacks: tuple[AttackSpec, ...] = ()
    max_samples: int | None = None
    first: int = 0
    keep: bool = False

    stage = "evaluate"


@dataclass(frozen=True)
class TransferTask(CohortTask):
    """Images made against ``sources`` (a stack like ``states``, client by client) and answered by ``states``."""

    sources: StateStack = field(default_factory=dict)
    attack: AttackSpec = AttackSpec("pgd", 0.0, 1, 0.0)
    max_samples: int | None = None
    first: int = 0

    stage = "transfer"


@dataclass(frozen=True)
class ProbeTask(CohortTask):
    """What checks S10 and S13 measure, on ``max_samples`` test images per client."""

    attack: AttackSpec = AttackSpec("pgd", 0.0, 1, 0.0)
    max_samples: int | None = None
    first: int = 0

    stage = "probe"


@dataclass(frozen=True)
class CertifyTask(CohortTask):
    """Randomised smoothing of ``max_samples`` test images per client from number ``first`` on."""

    sigma: float = 0.0
    draws: int = 1000
    max_samples: int | None = None
    first: int = 0

    stage = "certify"


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
    """What was measured on n of a client's images: ``values["KIND/NAME"] [n, ...]``.

    KIND is ``predictions`` (NAME ``benign`` or an attack's label; int64), ``distances`` (of the adversarial images found, in the
    attack's norm; infinite: none), ``images`` (those images, if kept), ``probe`` (`sylva_ray.metrics.probe`) or ``votes``
    (`sylva_ray.metrics.smoothing`). ``passes[attack]`` is how many images of the whole cohort went forward and backward."""

    values: Mapping[str, np.ndarray]
    passes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def of(self, kind: str) -> dict[str, np.ndarray]:
        """``{NAME: values}`` of one kind."""
        return {name.removeprefix(f"{kind}/"): v for name, v in self.values.items() if name.startswith(f"{kind}/")}

    @property
    def predictions(self) -> dict[str, np.ndarray]:
        """``{condition: [n]}``."""
        return self.of("predictions")


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
