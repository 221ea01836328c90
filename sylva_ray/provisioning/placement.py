"""How many actors fit on which nodes, and what they reserve: arithmetic, without Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sylva_ray.config.experiment import ClusterSection
from sylva_ray.core.errors import UserError
from sylva_ray.provisioning.launcher_file import LauncherFile, Resources

ROUNDING = 1e-9
"""Slack for fractions: 1 CPU holds ten actors of 0.1 each, whatever 1 / 0.1 is in binary."""


def fullest_cluster(section: ClusterSection, launcher: LauncherFile) -> list[Resources]:
    """The cluster grown as large as the file allows, by the nodes that hold the most of our actors."""
    return launcher.fullest({kind.name: actors_that_fit(section, [kind.resources]) for kind in launcher.workers})


def check_resources(section: ClusterSection, nodes: Sequence[Resources]) -> None:
    """Refuse an actor that fits none of ``nodes``.

    Raises:
        UserError: more GPUs or CPUs per actor than any node has.
    """
    gpus, cpus = section.gpus_per_actor, section.cpus_per_actor
    most_gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    most_cpus = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    if gpus > 1 and gpus != int(gpus):
        raise UserError("cluster.gpus_per_actor", gpus, "must be a whole number above 1 (Ray splits one GPU only)")
    if gpus > 0 and most_gpus == 0:
        fix = "no node of the cluster has a GPU; use 0 to run on CPUs, or name in cluster.launcher what an autoscaler brings"
        raise UserError("cluster.gpus_per_actor", gpus, fix)
    if gpus > most_gpus:
        raise UserError("cluster.gpus_per_actor", gpus, f"the largest node has {most_gpus:g} GPUs; use at most that")
    if cpus > most_cpus:
        raise UserError("cluster.cpus_per_actor", cpus, f"the largest node has {most_cpus:g} CPUs; use at most that")
    if actors_that_fit(section, nodes) == 0:
        fix = f"no node has {cpus:g} CPUs and {gpus:g} GPUs together; ask for less of either"
        raise UserError("cluster.cpus_per_actor", cpus, fix)


def resolve_num_actors(section: ClusterSection, num_cohorts: int, num_clients: int, nodes: Sequence[Resources]) -> int:
    """How many actors to make; never more than there are cohorts to work on.

    ``auto``: as many as fit on ``nodes``. ``per_client``: one for each client (whose cohorts hold one client each). On a cluster
    that we joined, more than fit may be asked for: an autoscaler sees them waiting, and those that are up do the work. A Ray
    that we started here cannot grow.

    Raises:
        UserError: more actors than this machine can ever hold.
    """
    fit = max(1, actors_that_fit(section, nodes))
    if section.num_actors == "auto":
        return min(num_cohorts, fit)
    wanted = num_clients if section.num_actors == "per_client" else min(num_cohorts, int(section.num_actors))
    if section.address is None and wanted > fit:
        fix = f"{wanted} actors are wanted and {fit} fit on this machine; lower cluster.cpus_per_actor or use auto"
        raise UserError("cluster.num_actors", section.num_actors, fix)
    return wanted


def actors_per_gpu(section: ClusterSection) -> int:
    """How many actors share one GPU; 1 where an actor has whole ones."""
    return max(1, math.floor(1 / section.gpus_per_actor + ROUNDING))


def actors_that_fit(section: ClusterSection, nodes: Sequence[Resources]) -> int:
    """How many, when nothing else runs on ``nodes``."""
    total = 0
    for node in nodes:
        fit = math.floor(node.get("CPU", 0.0) / section.cpus_per_actor + ROUNDING)
        if section.gpus_per_actor > 0:
            shares = math.floor(node.get("GPU", 0.0) / max(1.0, section.gpus_per_actor)) * actors_per_gpu(section)
            fit = min(fit, shares)
        total += fit
    return total


def gpu_bundles(section: ClusterSection, num_actors: int, num_gpus: int) -> list[dict[str, float]]:
    """What to reserve, one bundle per GPU (or per group of whole GPUs): actor i goes to bundle i modulo their number.

    Ray packs plain fractional actors onto the first GPU until it is full. Here all GPUs that the cluster has now are used
    before two actors share one; more than that, where the actors need them, are for an autoscaler to bring.
    """
    if section.gpus_per_actor == 0:
        return []
    whole = max(1.0, section.gpus_per_actor)
    needed = -(-num_actors // actors_per_gpu(section))
    num_bundles = max(needed, min(num_actors, int(num_gpus // whole)))
    sharing = [len(range(bundle, num_actors, num_bundles)) for bundle in range(num_bundles)]
    return [{"GPU": whole, "CPU": actors * section.cpus_per_actor} for actors in sharing]
