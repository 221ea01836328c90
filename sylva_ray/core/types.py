"""Plain data types that are used in the whole package and exchanged between processes.

Letters of shapes in the whole package::

    K  clients of the fleet          C  clients (or coalitions) in one stack
    N  images in a flat batch        T  tokens of an image
    r  LoRA rank                     n  players of the layer game

The state of a client is a flat ``{parameter name: float32 array}`` with names such as ``blocks.0.attn.qkv.lora_A``
``[r, d_in]``, ``blocks.0.attn.qkv.lora_B`` ``[d_out, r]``, ``head.weight`` ``[num_classes, width]``. A stack of C
states has the same names with a leading axis C.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sylva_ray.core.windows import Window

if TYPE_CHECKING:
    import torch

ClientState: TypeAlias = Mapping[str, np.ndarray]
"""The state of a client: ``{parameter name: array}``."""

StateStack: TypeAlias = Mapping[str, np.ndarray]
"""The states of C clients, stacked: ``{parameter name: [C, ...]}``."""

ParameterStack: TypeAlias = "dict[str, torch.Tensor]"
"""A stack of states as tensors on the device: ``{parameter name: [C, ...]}``."""


def stack_states(states: Sequence[ClientState]) -> dict[str, np.ndarray]:
    """Stack C states of equal names and shapes; the arrays are copied.

    The names of the result are sorted, because norms are summed over names and a checkpoint does not keep their order:
    with another order, rounding would differ.
    """
    return {name: np.stack([state[name] for state in states]) for name in sorted(states[0])}


def unstack_states(stack: StateStack) -> list[dict[str, np.ndarray]]:
    """Split a stack into C states; the arrays are copied, so that a state does not keep the whole stack in memory."""
    size = len(next(iter(stack.values())))
    return [{name: np.array(value[c]) for name, value in stack.items()} for c in range(size)]


def stack_digest(stack: StateStack) -> bytes:
    """Return a digest of names, types, shapes and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(stack):
        value = np.ascontiguousarray(stack[name])
        digest.update(f"{name}{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.digest()


def state_bytes(state: ClientState) -> int:
    """Return the bytes of the arrays of a state; a serialised file adds a small constant header."""
    return sum(value.nbytes for value in state.values())


@dataclass(frozen=True)
class ClientImages:
    """Labelled images of C clients in one flat batch.

    Attributes:
        x: images ``[N, 3, H, W]`` in [0, 1].
        y: labels ``[N] int64``.
        owner: the client of each image, ``[N]`` in 0..C-1, sorted, on the CPU.
        num_clients: C; a client may own no images.
    """

    x: torch.Tensor
    y: torch.Tensor
    owner: torch.Tensor
    num_clients: int

    def __len__(self) -> int:
        return len(self.y)

    def part(self, window: Window) -> ClientImages:
        """Return the images of a window, whose clients count from 0."""
        x, y, owner = self.x[window.rows], self.y[window.rows], self.owner[window.rows] - window.clients.start
        return ClientImages(x, y, owner, window.clients.stop - window.clients.start)

    @property
    def counts(self) -> torch.Tensor:
        """Number of images per client, ``[C] int64`` on the CPU."""
        return self.owner.bincount(minlength=self.num_clients)

    @cached_property
    def device_owner(self) -> torch.Tensor:
        """The owners on the device of the images."""
        return self.owner.to(self.x.device, non_blocking=True)

    @cached_property
    def _divisors(self) -> torch.Tensor:
        """The counts, at least 1, on the device of the images."""
        return self.counts.clamp(min=1).to(self.x.device, non_blocking=True)

    def mean_by_client(self, values_N: torch.Tensor) -> torch.Tensor:
        """Return the mean of per-image values over each client's images, ``[C]``; 0 for a client without images."""
        return values_N.new_zeros(self.num_clients).index_add(0, self.device_owner, values_N) / self._divisors

    def split_by_client(self, values_N: torch.Tensor) -> list[np.ndarray]:
        """Split per-image values ``[N, ...]`` into one array per client."""
        return np.split(values_N.cpu().numpy(), self.counts.cumsum(0)[:-1].tolist())


@dataclass(frozen=True)
class Split:
    """One split of one client's data.

    Attributes:
        images: ``[n, 3, H, W] uint8``.
        labels: ``[n] int64``.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, limit: int) -> Split:
        """Return the first ``limit`` images, or all if these are fewer."""
        return Split(self.images[:limit], self.labels[:limit])


@dataclass(frozen=True)
class ClientData:
    """The data of one client. The four splits are disjoint.

    Attributes:
        train: trains the weights.
        selection: one half of the validation data, with which layers are chosen.
        guard: the other half of the validation data, which decides how much of a refinement is kept.
        test: for evaluation.
    """

    train: Split
    selection: Split
    guard: Split
    test: Split

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Return the number of training images per class, ``[num_classes] int64``."""
        return np.bincount(self.train.labels, minlength=num_classes)

    @property
    def majority_share(self) -> float:
        """Test accuracy, in [0, 1], of always predicting the most frequent class of the training split."""
        majority = int(np.bincount(self.train.labels).argmax())
        return float(np.mean(self.test.labels == majority))


ATTACKS_WITHOUT_STEPS: set[str] = set()
"""Names of attacks whose labels leave out the number of steps; `sylva_ray.attacks.base.register` adds them."""


@dataclass(frozen=True)
class AttackSpec:
    """An evasion attack in the pixel space [0, 1].

    Attributes:
        name: a key of `sylva_ray.attacks.base.ATTACKS`, or ``package.module:Class``.
        epsilon: the budget: in pixel units (8/255, not 8) for the norm linf, the Euclidean norm of the perturbation for
            l2, the number of changed pixels for l0; infinite: search for the nearest adversarial image.
        steps: gradient steps, or queries.
        step_size: in the units of ``epsilon``.
        random_start: whether the attack begins at a random point of the ball.
        restarts: number of runs.
        loss: the loss that the attack maximises.
        norm: linf, l2 or l0.
        options: settings that only this attack has.
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
        """Return an option, or ``default`` if it is not set."""
        return dict(self.options).get(key, default)

    @property
    def label(self) -> str:
        """A short, unique name, used as key of metrics.

        ``pgd20-eps4`` has 20 steps at epsilon 4/255; ``pgd50x5-margin-l2-eps0.5`` has 50 steps, 5 restarts, the margin
        as loss, and an L2 ball of radius 0.5. The label of an own attack begins with the name of its class.
        """
        name = self.name.rpartition(":")[2]
        steps = "" if self.name in ATTACKS_WITHOUT_STEPS else str(self.steps)
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        loss = "" if self.loss == "ce" else f"-{self.loss}"
        norm = "" if self.norm == "linf" else f"-{self.norm}"
        options = "".join(f"-{key}{value:g}" for key, value in self.options)
        scale = 255 if self.norm == "linf" else 1
        budget = "" if self.epsilon == float("inf") else f"-eps{self.epsilon * scale:.4g}"
        return f"{name}{steps}{restarts}{loss}{norm}{options}{budget}"
