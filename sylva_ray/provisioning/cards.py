"""What is known of cards and of machines on AWS: memory, rates and assumed prices, from data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GB, GIB, TFLOPS = 10**9, 2**30, 10**12


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as in the name that its driver gives it.
        memory: bytes that programs can use.
        rates: dense matrix products in FLOP/s, by precision; float32 is not TF32.
    """

    name: str
    memory: int
    rates: Mapping[str, float]


def _card(name: str, memory_gib: float, bfloat16: float, float32: float) -> Card:
    rates = {"bfloat16": bfloat16 * TFLOPS, "float32": float32 * TFLOPS}
    return Card(name, int(memory_gib * GIB), MappingProxyType(rates))


CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        _card("L4", 22.0, 121, 30.3),
        _card("A10G", 22.0, 70, 31.5),
        _card("A100", 39.4, 312, 19.5),
        _card("A100-80GB", 79.1, 312, 19.5),
        _card("H100", 79.1, 989, 66.9),
        _card("H200", 139.7, 989, 66.9),
    )
}
"""Cards by name. Rates are of NVIDIA's data sheets, without sparsity."""


@dataclass(frozen=True)
class Machine:
    """An instance type of EC2.

    Attributes:
        memory: bytes of RAM.
        card: name of its GPUs; None: it has none.
        num_gpus: how many.
        price: assumed US dollars per hour on demand; spot is often less than half, and all of them change.
    """

    memory: int
    card: str | None
    num_gpus: int
    price: float


def _machine(memory_gib: int, card: str | None, num_gpus: int, price: float) -> Machine:
    return Machine(memory_gib * GIB, card, num_gpus, price)


MACHINES: Mapping[str, Machine] = {
    "m7i.2xlarge": _machine(32, None, 0, 0.40),
    "m7i.4xlarge": _machine(64, None, 0, 0.81),
    "g6.xlarge": _machine(16, "L4", 1, 0.80),
    "g6.2xlarge": _machine(32, "L4", 1, 0.98),
    "g6.4xlarge": _machine(64, "L4", 1, 1.32),
    "g6.12xlarge": _machine(192, "L4", 4, 4.60),
    "g6.48xlarge": _machine(768, "L4", 8, 13.35),
    "g5.xlarge": _machine(16, "A10G", 1, 1.01),
    "g5.2xlarge": _machine(32, "A10G", 1, 1.21),
    "g5.12xlarge": _machine(192, "A10G", 4, 5.67),
    "p4d.24xlarge": _machine(1152, "A100", 8, 21.96),
    "p4de.24xlarge": _machine(1152, "A100-80GB", 8, 27.45),
    "p5.4xlarge": _machine(256, "H100", 1, 6.88),
    "p5.48xlarge": _machine(2048, "H100", 8, 55.04),
    "p5en.48xlarge": _machine(2048, "H200", 8, 63.30),
}
"""Instance types that a cluster file may name; of others nothing is known, and nothing is foretold."""
