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
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

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
