"""Count how many actors fit on which nodes, and what they reserve: arithmetic, without Ray."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence

from sylva_ray.config.cluster import ClusterSection
from sylva_ray.core.errors import UserError
from sylva_ray.core.lazy import torch
from sylva_ray.provisioning.launcher_file import LauncherFile, Resources

ROUNDING = 1e-9
"""Slack for fractions: 1 CPU holds ten actors of 0.1 each, although 1 / 0.1 may be rounded down."""


def this_machine() -> Resources:
    """Return the CPUs and GPUs of this machine."""
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def largest_cluster(section: ClusterSection, file: LauncherFile) -> list[Resources]:
    """Return the nodes of the largest cluster that the file allows, those that hold the most actors first."""
    return file.largest_cluster({kind.name: actors_that_fit(section, [kind.resources]) for kind in file.workers})


def check_resources(section: ClusterSection, nodes: Sequence[Resources]) -> None:
    """Refuse an actor that fits none of ``nodes``.

    Raises:
        UserError: an actor asks for more GPUs or CPUs than any node has.
    """
    gpus, cpus = section.gpus_per_actor, section.cpus_per_actor
    max_gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    max_cpus = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    if gpus > 1 and gpus != int(gpus):
        raise UserError("cluster.gpus_per_actor", gpus, "must be a whole number above 1 (Ray splits one GPU only)")
    if gpus > 0 and max_gpus == 0:
        fix = "no node of the cluster has a GPU; use 0, or set cluster.launcher to the file whose nodes have some"
        raise UserError("cluster.gpus_per_actor", gpus, fix)
    if gpus > max_gpus:
        raise UserError("cluster.gpus_per_actor", gpus, f"the largest node has {max_gpus:g} GPUs; use at most that")
    if cpus > max_cpus:
        raise UserError("cluster.cpus_per_actor", cpus, f"the largest node has {max_cpus:g} CPUs; use at most that")
    if actors_that_fit(section, nodes) == 0:
        fix = f"no node has {cpus:g} CPUs and {gpus:g} GPUs together; lower one of the two"
        raise UserError("cluster.cpus_per_actor", cpus, fix)


def resolve_num_actors(section: ClusterSection, num_cohorts: int, num_clients: int, nodes: Sequence[Resources]) -> int:
    """Resolve ``cluster.num_actors``; there are never more actors than cohorts.

    ``auto`` is as many as fit on ``nodes``; ``per_client`` is one for each client, whose cohorts hold one client each.
    On a cluster that was joined, more actors than fit may be asked for: an autoscaler sees them waiting, and those that
    run do the work. A Ray that was started on this machine cannot grow.

    Args:
        section: the cluster's settings.
        num_cohorts: cohorts of all clients.
        num_clients: clients of the fleet.
        nodes: the nodes that the cluster has or may get.

    Raises:
        UserError: more actors than this machine can ever hold.
    """
    fitting = max(1, actors_that_fit(section, nodes))
    if section.num_actors == "auto":
        return min(num_cohorts, fitting)
    wanted = num_clients if section.num_actors == "per_client" else min(num_cohorts, section.num_actors)
    if section.address is None and wanted > fitting:
        fix = f"{wanted} actors are wanted and {fitting} fit on this machine; lower cluster.cpus_per_actor or use auto"
        raise UserError("cluster.num_actors", section.num_actors, fix)
    return wanted


def actors_per_gpu(section: ClusterSection) -> int:
    """Return how many actors use one GPU together; 1 if an actor has whole ones."""
    return max(1, math.floor(1 / section.gpus_per_actor + ROUNDING))


def actors_that_fit(section: ClusterSection, nodes: Sequence[Resources]) -> int:
    """Return how many actors ``nodes`` hold when nothing else runs there."""
    total = 0
    for node in nodes:
        fitting = _actors_on_cpus(section, node)
        if section.gpus_per_actor > 0:
            fitting = min(fitting, _gpu_groups(section, node) * actors_per_gpu(section))
        total += fitting
    return total


def gpu_bundles(
    section: ClusterSection, num_actors: int, present: Sequence[Resources], possible: Sequence[Resources]
) -> list[dict[str, float]]:
    """Return what to reserve: one bundle per GPU, or per group of whole GPUs.

    Actor i uses bundle i modulo their number. Ray would pack fractional actors onto the first GPU until it is full.
    With these bundles, all GPUs that the cluster has now are used before two actors share one; bundles beyond that,
    where the actors need them, make an autoscaler add nodes. Where not all of these bundles would find room, because a
    GPU has more shares than its node has CPUs, their number is the one with which the most actors do.

    Args:
        section: the cluster's settings.
        num_actors: client processes.
        present: the nodes that the cluster has now.
        possible: the nodes that it has or may get.
    """
    if section.gpus_per_actor == 0:
        return []
    gpus = max(1.0, section.gpus_per_actor)
    least = -(-num_actors // actors_per_gpu(section))
    wanted = max(least, min(num_actors, sum(groups * count for (_, groups), count in _rooms(section, present).items())))
    rooms = _rooms(section, possible)
    num_bundles = wanted
    if rooms and _actors_placed(rooms, num_actors, wanted) < num_actors:
        counts = [wanted, *range(least, num_actors + 1)]
        num_bundles = max(counts, key=lambda count: _actors_placed(rooms, num_actors, count))
    actors = [len(range(bundle, num_actors, num_bundles)) for bundle in range(num_bundles)]
    return [{"GPU": gpus, "CPU": count * section.cpus_per_actor} for count in actors]


def _rooms(section: ClusterSection, nodes: Sequence[Resources]) -> Counter[tuple[int, int]]:
    """Count the nodes that can hold actors with GPUs, by the room of each: ``(actors, bundles)``."""
    rooms = Counter((_actors_on_cpus(section, node), _gpu_groups(section, node)) for node in nodes)
    return Counter({(actors, groups): count for (actors, groups), count in rooms.items() if actors and groups})


def _actors_placed(rooms: Counter[tuple[int, int]], num_actors: int, num_bundles: int) -> int:
    """Return how many actors find room if they are divided among bundles, the larger ones being placed first."""
    size, larger = divmod(num_actors, num_bundles)
    smaller, placed = num_bundles - larger, 0
    for (actors, groups), count in sorted(rooms.items(), key=lambda room: -room[0][0] / room[0][1]):
        for nodes, own_larger in _spread(larger, min(groups, actors // (size + 1)), count):
            own_smaller = min(groups - own_larger, (actors - own_larger * (size + 1)) // size) if size else 0
            own_smaller = min(smaller, nodes * own_smaller)
            larger, smaller = larger - nodes * own_larger, smaller - own_smaller
            placed += nodes * own_larger * (size + 1) + own_smaller * size
    return placed


def _spread(bundles: int, per_node: int, nodes: int) -> list[tuple[int, int]]:
    """Fill ``nodes`` equal nodes with at most ``per_node`` bundles each: ``(nodes, bundles on each of them)``."""
    full, rest = divmod(bundles, per_node) if per_node else (0, 0)
    if full >= nodes:
        return [(nodes, per_node)]
    return [(full, per_node), (1, rest), (nodes - full - 1, 0)]


def _actors_on_cpus(section: ClusterSection, node: Resources) -> int:
    return math.floor(node.get("CPU", 0.0) / section.cpus_per_actor + ROUNDING)


def _gpu_groups(section: ClusterSection, node: Resources) -> int:
    """Return how many bundles the GPUs of a node are enough for: single ones, or groups of whole ones."""
    return math.floor(node.get("GPU", 0.0) / max(1.0, section.gpus_per_actor))


def num_actors_here(section: ClusterSection) -> int:
    """Return how many actors work side by side on the CPUs of this machine, at least one."""
    room = max(1, int(this_machine().get("CPU", 1) // (section.cpus_per_actor or 1)))
    return min(room, section.num_actors) if isinstance(section.num_actors, int) else room
