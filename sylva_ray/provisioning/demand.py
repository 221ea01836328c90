"""What one run asks of a cluster, by arithmetic: actors, GPUs, nodes, shared memory, bytes on the wire. Nothing is started.

config ──► cohorts ──► actors ──► bundles ──► nodes (Ray's own autoscaler says which)
   └─────► model ────► bytes of data, backbone and states
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sylva_ray.config.experiment import ClusterSection, ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.preparation.traffic import TrafficEstimate, estimate_traffic
from sylva_ray.provisioning.launcher_file import LauncherFile, Resources
from sylva_ray.provisioning.placement import (
    actors_that_fit,
    check_resources,
    fullest_cluster,
    gpu_bundles,
    resolve_num_actors,
)


@dataclass(frozen=True)
class Demand:
    """Of one run on one cluster.

    Attributes:
        traffic: bytes of what is sent, see `sylva_ray.preparation.traffic.TrafficEstimate`.
        num_cohorts: tasks of a round that can run side by side.
        num_actors: client processes.
        bundles: what is reserved: one per GPU (or group of whole GPUs), on CPUs one per actor.
        nodes: workers that the autoscaler adds, ``{node type: count}``.
        waiting: bundles that find no room even then; the actors that are up do their work.
        actors_per_node: the most that one of those workers can hold; 0 where none is added.
    """

    config: ResolvedConfig
    traffic: TrafficEstimate
    num_cohorts: int
    num_actors: int
    bundles: tuple[Resources, ...]
    nodes: Mapping[str, int]
    waiting: int
    actors_per_node: int

    @property
    def head_store_bytes(self) -> int:
        """Shared memory on the head, where the driver puts data and backbone, and where every task and result passes."""
        return self._store_bytes(self.num_actors)

    @property
    def worker_store_bytes(self) -> int:
        """Shared memory on the fullest worker: its one copy of data and backbone, and what its own actors have under way."""
        return self._store_bytes(self.actors_per_node)

    def _store_bytes(self, num_actors: int) -> int:
        """An actor's clients' states lie there as its task, as its result, and as a result before that Ray still has."""
        return self.traffic.broadcast_bytes + 3 * num_actors * self.cohort_size * self.traffic.state_bytes

    @property
    def cohort_size(self) -> int:
        """Clients in one stacked forward."""
        return self.config.training.cohort_size

    @property
    def participants(self) -> int:
        """Clients of a round."""
        return self.config.training.clients_per_round or self.config.partition.num_clients


def demand_of(config: ExperimentConfig, launcher: LauncherFile) -> Demand:
    """What a run of ``config`` would ask of the cluster that ``launcher`` describes.

    Raises:
        UserError: the config cannot run, its data set cannot be sized here, or an actor fits no node type.
    """
    section = config.cluster.model_copy(update={"address": config.cluster.address or "auto"})
    nodes = fullest_cluster(section, launcher)
    check_resources(section, nodes)
    traffic = estimate_traffic(config)
    resolved = traffic.config
    size, num_clients = resolved.training.cohort_size, resolved.partition.num_clients
    num_cohorts = -(-(resolved.training.clients_per_round or num_clients) // size)
    num_actors = resolve_num_actors(section, -(-num_clients // size), num_clients, nodes)
    bundles: Sequence[Resources] = gpu_bundles(section, num_actors, num_gpus=0)
    bundles = bundles or [{"CPU": section.cpus_per_actor}] * num_actors
    added, waiting = launcher.nodes_for(bundles)
    hosts = [kind.resources for kind in launcher.workers if kind.name in added]
    fullest = max((_most_actors(section, bundles, node) for node in hosts), default=0)
    return Demand(resolved, traffic, num_cohorts, num_actors, tuple(bundles), added, waiting, fullest)


def _most_actors(section: ClusterSection, bundles: Sequence[Resources], node: Resources) -> int:
    """How many a node can hold at once: its GPUs bound the bundles, its CPUs the actors in them."""
    sharing = sorted((round(bundle["CPU"] / section.cpus_per_actor) for bundle in bundles), reverse=True)
    if section.gpus_per_actor > 0:
        sharing = sharing[: int(node.get("GPU", 0) // max(1.0, section.gpus_per_actor))]
    return min(sum(sharing), actors_that_fit(section, [node]))


def launcher_lines(launcher: LauncherFile) -> list[str]:
    """What the file promises, what to fill in, and what to change."""
    verdict = f"valid for Ray's cluster launcher, provider {launcher.provider}"
    if launcher.provider == "kuberay":
        verdict = "a RayCluster for Kubernetes, whose own server validates it; read were its node types"
    lines = [f"{launcher.path}: {verdict}"]
    for kind in launcher.node_types:
        what = ", ".join(f"{value:g} {name}" for name, value in kind.resources.items()) or "resources found at start"
        count = "the head" if kind is launcher.head else f"0 to {min(kind.max_workers, launcher.max_workers)}"
        lines.append(f"  {kind.name:<10} {count:<10} {what}")
    lines += [f"fill in: {place}" for place in launcher.blanks]
    lines += [f"warning: {finding}" for finding in launcher.findings]
    return lines


def demand_lines(demand: Demand, launcher: LauncherFile) -> list[str]:
    """The same for people."""
    section, traffic = demand.config.cluster, demand.traffic
    share = f"{section.cpus_per_actor:g} CPUs, {section.gpus_per_actor:g} GPUs each"
    cohorts = f"{demand.participants} clients a round in {demand.num_cohorts} cohorts of {demand.cohort_size}"
    head = f"the head ({launcher.head.name})"
    workers = ", ".join(f"{count} {name}" for name, count in demand.nodes.items())
    nodes = f"{head} and {workers}" if workers else f"{head} alone"
    if demand.waiting:
        nodes += f"; {demand.waiting} of {len(demand.bundles)} bundles find no room, those that do share the work"
    once = f"{_mb(traffic.data_bytes)} data + {_mb(traffic.backbone_bytes)} backbone once"
    lines = [
        f"a run of {demand.config.name} ({demand.config.algorithm.name}) asks for",
        f"  actors        {demand.num_actors} with {share}; {cohorts}",
        f"  bundles       {_bundles(demand.bundles)}",
        f"  nodes         {nodes}",
        f"  object store  head: {_mb(demand.head_store_bytes)} ({once}, and the tasks and results of all actors)",
        f"  upload        {_per_round(traffic.upload_bytes, demand.participants)}",
        f"  download      {_per_round(traffic.download_bytes, demand.participants)}",
    ]
    if demand.nodes:
        own = f"the same, with those of {demand.actors_per_node} actors, the most on one"
        lines.insert(-2, f"                a worker: {_mb(demand.worker_store_bytes)} ({own})")
    most = actors_that_fit(section, fullest_cluster(section, launcher))
    if section.num_actors == "auto" and demand.num_actors < most and demand.cohort_size > 1:
        lines.append(f"  {most} such actors would fit; smaller cohorts (training.cohort_size) would use more of them")
    return lines


def _bundles(bundles: Sequence[Resources]) -> str:
    counts: dict[str, int] = {}
    for bundle in bundles:
        text = "{" + ", ".join(f"{name}: {value:g}" for name, value in bundle.items()) + "}"
        counts[text] = counts.get(text, 0) + 1
    return ", ".join(f"{count} x {text}" for text, count in counts.items())


def _per_round(count: int, participants: int) -> str:
    return f"{count:,} B per client and round, {_mb(participants * count)} a round"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
