"""Refuse a run that cannot fit the nodes which it would get, and name what would."""

from __future__ import annotations

from sylva_ray.core.errors import UserError
from sylva_ray.preparation.memory import MemoryPlan
from sylva_ray.preparation.memory_budget import size_text
from sylva_ray.provisioning.cards import CARDS, MACHINES, Card
from sylva_ray.provisioning.demand import Demand, max_actors
from sylva_ray.provisioning.forecast import Forecast, cards_that_fit, share_bytes
from sylva_ray.provisioning.launcher_file import LauncherFile, NodeType

NODE_BYTES = 1_500_000_000
"""Assumed RAM of a node's system and of Ray's services."""

SHARES = (0.2, 0.25, 0.33, 0.5, 1.0)
"""Shares of a card that are tried."""


def check_fit(demand: Demand, found: Forecast, file: LauncherFile) -> None:
    """Check the object stores, and the memory of GPUs and of RAM on the nodes that the autoscaler would add.

    Nodes of which the instance type is not known are not checked.

    Args:
        demand: of the run.
        found: what was measured of it.
        file: the node types.

    Raises:
        UserError: something does not fit; names what would.
    """
    store, needed = file.object_store, demand.head_store_bytes
    if store is not None and needed > store:
        fix = f"the head's object store needs {size_text(needed)} for data, backbone and the tasks of all actors"
        raise UserError("OBJECT_STORE_BYTES", store, f"{fix}: raise it to at least {needed}")
    section = demand.config.cluster
    for kind in file.workers:
        if kind.name in demand.nodes and kind.machine is not None:
            card = CARDS.get(kind.machine.card or "")
            if card is not None and section.gpus_per_actor > 0:
                gpu_plan(found, card, kind.name)
                _check_ram(demand, found, file, kind)


def gpu_plan(found: Forecast, card: Card, node: str) -> MemoryPlan:
    """Return the windows of an actor on a card.

    Raises:
        UserError: its share of the card is too small for one image, or it may use more than its share.
    """
    section = found.config.cluster
    share, asked = min(1.0, section.gpus_per_actor), section.memory_per_actor
    if asked != "auto" and asked > share * card.memory:
        fix = f"an actor's share (cluster.gpus_per_actor) of the {card.name} of {node} is"
        raise UserError("cluster.memory_per_actor", size_text(asked), f"{fix} {size_text(int(share * card.memory))}")
    try:
        return found.plan(share_bytes(card, share) if asked == "auto" else asked)
    except UserError as error:
        if asked != "auto":
            raise
        larger = min((other for other in SHARES if other > share and found.fits(card, other)), default=None)
        others = cards_that_fit(found, share)
        ways = [f"cluster.gpus_per_actor={larger:g}"] if larger else []
        ways += [f"the same share of {' or '.join(others)}"] if others else []
        fix = f"this share of the {card.name} of {node} {error.fix}"
        what = f"; what would fit: {', or '.join(ways)}" if ways else "; no card that is known is large enough"
        raise UserError("cluster.gpus_per_actor", section.gpus_per_actor, fix + what) from None


def _check_ram(demand: Demand, found: Forecast, file: LauncherFile, kind: NodeType) -> None:
    """Check that the processes of a node's actors fit its RAM beside the object store."""
    machine = kind.machine
    assert machine is not None, "the caller has looked"
    count = max_actors(found.config.cluster, demand.bundles, kind.resources)
    store = file.object_store or demand.worker_store_bytes
    free = machine.memory - store - NODE_BYTES
    if count * found.host_bytes <= free:
        return
    fitting = free // found.host_bytes
    needed = count * found.host_bytes + store + NODE_BYTES
    others = [
        name
        for name, other in MACHINES.items()
        if (other.card, other.num_gpus) == (machine.card, machine.num_gpus) and other.memory >= needed
    ]
    gpus = int(kind.resources.get("GPU", 1))
    share = min((share for share in SHARES if round(1 / share) * gpus <= fitting), default=None)
    ways = [f"cluster.gpus_per_actor={share:g}"] if share else []
    ways += [f"{others[0]} ({size_text(MACHINES[others[0]].memory)})"] if others else []
    fix = (
        f"{count} actors on {kind.name} ({kind.instance}) need {size_text(count * found.host_bytes)} of RAM beside an "
        f"object store of {size_text(store)}, and it has {size_text(machine.memory)}"
    )
    raise UserError(
        "cluster.gpus_per_actor",
        found.config.cluster.gpus_per_actor,
        fix + (f"; what would fit: {', or '.join(ways)}" if ways else ""),
    )
