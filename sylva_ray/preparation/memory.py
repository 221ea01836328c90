"""Plan how many images pass through the model at once, from a memory budget and measured bytes per image.

::

    model, method ──► `measure_costs` ──► `MemoryCosts` ─┐
    cluster.memory_per_actor ──► `actor_budget` ─────────┴──► `plan_memory` ──► windows, cohort size ──► config.yaml

`plan_memory` is arithmetic: it can be asked about any budget, also that of a card which this machine does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.config.training import Windows
from sylva_ray.core.bounds import MAX_COUNT
from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.failures import is_out_of_memory
from sylva_ray.core.types import ClientState
from sylva_ray.data.fleet import FleetData
from sylva_ray.federation.contract import Algorithm
from sylva_ray.models.cohort import FunctionalStack
from sylva_ray.models.device_memory import GPU_PROCESS_BYTES
from sylva_ray.preparation.memory_budget import actor_budget, resident_bytes, size_text
from sylva_ray.preparation.memory_costs import MemoryCosts, measure_costs

if TYPE_CHECKING:
    from sylva_ray.models.lora import LoraStack

PLANNED_FRACTION = 0.9
"""Of a budget that is planned; the rest is for what kernels allocate inside themselves, and for fragmentation."""

STATE_COPIES = 10
"""Copies of a client's state in a task: as it was sent, parameters, what was received, gradients, clipped ones, two
moments, the guard's copy, and the result twice."""

PIXEL_COPIES = 6
"""Copies of a training batch in float32: images, noise, adversarial images, and those of the steps between."""

HELD_FRACTION = 0.5
"""Of what a model leaves of its budget: the most that the states and pixels of a cohort of ``auto`` size may hold."""


CPU_PASS_BYTES = 750_000_000
"""Activations of one forward pass on a CPU, as an attack keeps them, at most. More images in a pass bring no speed:
ViT-B/16 at 224 px has then 8 images, and `vit_micro` hundreds (measured by ``benchmarks/windows.py``)."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is used.

    Attributes:
        budget: bytes that an actor may use.
        base: bytes of its process, with the model.
        held: bytes of the states and the pixels of a cohort.
        cohort_size: clients in a cohort.
        windows: images in a pass.
        peak: bytes that are expected at most.
    """

    budget: int
    base: int
    held: int
    cohort_size: int
    windows: Windows
    peak: int


def plan_memory(
    config: ResolvedConfig,
    algorithm: Algorithm,
    costs: MemoryCosts,
    budget: int,
    base: int,
    auto_cohorts: bool = False,
    fleet: FleetData | None = None,
) -> MemoryPlan:
    """Choose windows, and the size of cohorts if it is ``auto``, such that an actor stays within its budget.

    Args:
        config: the experiment.
        algorithm: the method.
        costs: `measure_costs` of it.
        budget: bytes that an actor may use.
        base: bytes of its process with the model, before a task.
        auto_cohorts: whether ``config.training.cohort_size`` may be made smaller.
        fleet: for the numbers of images; None: clients have as many as a task takes of them.

    Raises:
        UserError: not a single image fits, or not the batch of a client whose images cannot be divided.
    """
    planned = int(PLANNED_FRACTION * budget)
    size = config.training.cohort_size
    while auto_cohorts and size > 1 and _held(config, algorithm, costs, size, fleet) > HELD_FRACTION * (planned - base):
        size -= 1
    held = _held(config, algorithm, costs, size, fleet)
    costliest = max(costs.passes, key=lambda name: costs.passes[name].num_bytes(1))
    if base + held + costs.passes[costliest].num_bytes(1) > planned:
        raise _too_small(config, costs, budget, base, held, costliest, size)
    found: dict[str, int] = Windows(at_once=_at_once(config, costs)).model_dump()
    for name, cost in costs.passes.items():
        fitting = cost.num_images(planned - base - held)
        found[name] = min(found[name], _rounded(fitting))
        if name == "train" and costs.couples_images:
            found[name] = _whole_batch(config, found[name], fitting, _largest_batch(config, fleet))
    peak = base + held + max(cost.num_bytes(found[name]) for name, cost in costs.passes.items())
    return MemoryPlan(budget, base, held, size, Windows(**found), peak)


def _at_once(config: ResolvedConfig, costs: MemoryCosts) -> int:
    """Return the images of a forward pass that keep the processor busy, which do not depend on the budget.

    A GPU has the number that its memory holds: a card computes faster the more images it has, and how many it needs
    depends on the card, as its memory does. So have models whose batches cannot be divided.
    """
    largest = Windows().at_once
    if config.training.device == "cuda" or costs.couples_images:
        return largest
    return min(largest, max(1, _rounded(CPU_PASS_BYTES // max(1, costs.passes["attack"].per_image))))


def _held(
    config: ResolvedConfig, algorithm: Algorithm, costs: MemoryCosts, cohort_size: int, fleet: FleetData | None
) -> int:
    """Return the bytes of the states and the pixels of a cohort, which windows do not divide."""
    phase2 = algorithm.parameters.phase2
    clients = [] if fleet is None else fleet.clients
    batch = _largest_batch(config, fleet)
    selection = min([phase2.max_images, max((len(own.selection) for own in clients), default=MAX_COUNT)])
    in_game = 4 * selection if phase2.enabled else 0  # images, two attacked copies, noise
    pixels = max(PIXEL_COPIES * batch, in_game) * costs.image
    return cohort_size * (STATE_COPIES * costs.state + pixels)


def _largest_batch(config: ResolvedConfig, fleet: FleetData | None) -> int:
    """Return the images of a client in its largest step."""
    sizes = [] if fleet is None else [len(own.train) for own in fleet.clients]
    return min(config.training.batch_size, max(sizes, default=MAX_COUNT))


def _whole_batch(config: ResolvedConfig, rounded: int, fitting: int, batch: int) -> int:
    """Return a window that holds the batch of a client whose images cannot be divided."""
    if fitting < batch:
        fix = f"the images of a batch cannot be divided, because of batch normalisation, and {fitting} fit the memory"
        raise UserError("training.batch_size", config.training.batch_size, f"{fix} (cluster.memory_per_actor)")
    return max(rounded, batch)


def _rounded(num_images: int) -> int:
    """Round down to 1, 2, 3, 4, 6, 8, 12, 16, ..., so that a small change of the memory does not change a window."""
    if num_images < 4:
        return num_images
    power = 1 << (num_images.bit_length() - 1)
    return power + power // 2 if num_images >= power + power // 2 else power


def _as_shown(num_bytes: int) -> int:
    """Round up to what `size_text` shows, so that the budget that a message names is enough."""
    unit = 10**7 if num_bytes >= 10**9 else 10**6 if num_bytes >= 10**6 else 10**3
    return -(-num_bytes // unit) * unit


def _too_small(
    config: ResolvedConfig, costs: MemoryCosts, budget: int, base: int, held: int, name: str, cohort_size: int
) -> UserError:
    """Return the error for a budget in which a pass of one image does not fit."""
    needed = int((base + held + costs.passes[name].num_bytes(1)) / PLANNED_FRACTION)
    per_client = held // cohort_size
    parts = (
        f"process and model {size_text(base)}, {cohort_size} client{'s' * (cohort_size > 1)} {size_text(held)}, "
        f"one image ({name}) {size_text(costs.passes[name].num_bytes(1))}"
    )
    fix = f"is too small: at least {size_text(_as_shown(needed))} is needed ({parts})"
    alone = int((base + per_client + costs.passes[name].num_bytes(1)) / PLANNED_FRACTION)
    if cohort_size > 1 and alone <= budget:
        fix += "; a smaller training.cohort_size would fit"
    given = config.cluster.memory_per_actor
    shown = f"auto ({size_text(budget)})" if given == "auto" else size_text(budget)
    return UserError("cluster.memory_per_actor", shown, fix)


def plan_windows(
    asked: ExperimentConfig,
    resolved: ResolvedConfig,
    algorithm: Algorithm,
    model: LoraStack | FunctionalStack,
    states: Sequence[ClientState],
    fleet: FleetData,
) -> ResolvedConfig:
    """Resolve ``training.windows`` of ``auto``, and a cohort size of ``auto`` that does not fit.

    Args:
        asked: the configuration of the user.
        resolved: the same, everything else resolved.
        algorithm: the method, bound to the model.
        model: on the run's device, or on the CPU where this machine does not have it.
        states: what the K clients start from.
        fleet: the data of all clients.

    Raises:
        UserError: ``cluster.memory_per_actor`` is more than there is, or too small for a few images.
    """
    if asked.training.windows != "auto":
        return resolved
    budget = actor_budget(resolved)
    on_gpu = resolved.training.device == "cuda"
    used = 0 if on_gpu else resident_bytes()
    try:
        costs = measure_costs(resolved, algorithm, model, states[0], fleet.dataset.image_size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fix = f"is used up by a few images ({reason_of(error)}): free some memory, or use a smaller backbone"
        raise UserError("cluster.memory_per_actor", size_text(budget), fix) from None
    base = GPU_PROCESS_BYTES + costs.model if on_gpu else used + _later_bytes(resolved, costs, len(states))
    plan = plan_memory(resolved, algorithm, costs, budget, base, asked.training.cohort_size == "auto", fleet)
    update = {"windows": plan.windows, "cohort_size": plan.cohort_size}
    return resolved.model_copy(update={"training": resolved.training.model_copy(update=update)})


def _later_bytes(config: ResolvedConfig, costs: MemoryCosts, num_clients: int) -> int:
    """Return what the process of a worker will hold besides what the present one does: here, a coordinator's half."""
    if config.cluster.pool != "in_process":
        return 0
    return costs.model + num_clients * 6 * costs.state
