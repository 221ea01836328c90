"""Estimate what one run asks of a cluster: actors, GPUs, nodes, shared memory, bytes on the network.

Nothing is started::

    config ──► cohorts ──► actors ──► bundles ──► nodes (chosen by Ray's own autoscaler)
       └─────► model ────► bytes of data, backbone and states
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sylva_ray.config.cluster import ClusterSection
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.preparation.sketch import Sketch, sketch_experiment
from sylva_ray.preparation.traffic import TrafficEstimate, traffic_of
from sylva_ray.provisioning.launcher_file import ClusterLauncher, LauncherFile, Resources
from sylva_ray.provisioning.placement import (
    actors_that_fit,
    check_resources,
    gpu_bundles,
    largest_cluster,
    resolve_num_actors,
)


@dataclass(frozen=True)
class Demand:
    """The demand of one run on one cluster.

    Attributes:
        config: the experiment.
        sketch: its model and states.
        traffic: bytes of what is sent.
        num_cohorts: tasks of a round that can run side by side.
        num_actors: client processes.
        bundles: what is reserved: one per GPU (or group of whole GPUs); on CPUs one per actor.
        nodes: workers that the autoscaler adds, ``{node type: count}``.
        waiting: bundles for which no node is left; the other actors then do all the work.
        actors_per_node: the most that one of the added workers can hold; 0 if none is added.
    """

    config: ResolvedConfig
    sketch: Sketch
    traffic: TrafficEstimate
    num_cohorts: int
    num_actors: int
    bundles: tuple[Resources, ...]
    nodes: Mapping[str, int]
    waiting: int
    actors_per_node: int

    @property
    def head_store_bytes(self) -> int:
        """Shared memory on the head: the data, the backbone, and the tasks and results of all actors."""
        return self._store_bytes(self.num_actors)

    @property
    def worker_store_bytes(self) -> int:
        """Shared memory on the worker with the most actors: data, backbone, and the tasks of its own actors."""
        return self._store_bytes(self.actors_per_node)

    def _store_bytes(self, num_actors: int) -> int:
        """Count the states of an actor's clients three times: as its task, as its result, and as the result before."""
        return self.traffic.broadcast_bytes + 3 * num_actors * self.cohort_size * self.traffic.state_bytes

    @property
    def cohort_size(self) -> int:
        """Clients in one stacked forward."""
        return self.config.training.cohort_size

    @property
    def participants(self) -> int:
        """Clients of a round."""
        return self.config.training.clients_per_round or self.config.partition.num_clients


def estimate_demand(config: ExperimentConfig, file: LauncherFile, launcher: ClusterLauncher) -> Demand:
    """Estimate what a run of ``config`` would ask of the cluster that ``file`` describes.

    Args:
        config: the experiment.
        file: the node types of the cluster.
        launcher: Ray's autoscaler.

    Raises:
        UserError: the config cannot run, its data set cannot be sized here, or an actor fits no node type.
    """
    section = config.cluster.model_copy(update={"address": config.cluster.address or "auto"})
    nodes = largest_cluster(section, file)
    check_resources(section, nodes)
    sketch = sketch_experiment(config.model_copy(update={"cluster": section}))
    traffic = traffic_of(sketch)
    resolved = traffic.config
    size, num_clients = resolved.training.cohort_size, resolved.partition.num_clients
    num_cohorts = -(-(resolved.training.clients_per_round or num_clients) // size)
    num_actors = resolve_num_actors(section, -(-num_clients // size), num_clients, nodes)
    bundles: Sequence[Resources] = gpu_bundles(section, num_actors, present=[], possible=nodes)
    bundles = bundles or [{"CPU": section.cpus_per_actor}] * num_actors
    added, waiting = launcher.nodes_for(file, bundles)
    hosts = [kind.resources for kind in file.workers if kind.name in added]
    actors_per_node = max((max_actors(section, bundles, node) for node in hosts), default=0)
    return Demand(resolved, sketch, traffic, num_cohorts, num_actors, tuple(bundles), added, waiting, actors_per_node)


def max_actors(section: ClusterSection, bundles: Sequence[Resources], node: Resources) -> int:
    """Return how many actors a node can hold: its GPUs limit the bundles, its CPUs the actors in them."""
    actors = sorted((round(bundle["CPU"] / section.cpus_per_actor) for bundle in bundles), reverse=True)
    if section.gpus_per_actor > 0:
        actors = actors[: int(node.get("GPU", 0) // max(1.0, section.gpus_per_actor))]
    return min(sum(actors), actors_that_fit(section, [node]))


def file_lines(file: LauncherFile) -> list[str]:
    """Describe a cluster file in lines of text: its node types, the values to fill in, and warnings."""
    verdict = f"valid for Ray's cluster launcher, provider {file.provider}"
    if file.provider == "kuberay":
        verdict = "a RayCluster for Kubernetes; its node types were read, the rest is validated by the server"
    lines = [f"{file.path}: {verdict}"]
    for kind in file.node_types:
        resources = ", ".join(f"{value:g} {name}" for name, value in kind.resources.items())
        count = "the head" if kind is file.head else f"0 to {min(kind.max_workers, file.max_workers)}"
        lines.append(f"  {kind.name:<10} {count:<10} {resources or 'resources detected when the node starts'}")
    lines += [f"fill in: {place}" for place in file.blanks]
    lines += [f"warning: {warning}" for warning in file.warnings]
    return lines


def demand_lines(demand: Demand, file: LauncherFile) -> list[str]:
    """Describe a demand in lines of text."""
    section, traffic = demand.config.cluster, demand.traffic
    per_actor = f"{section.cpus_per_actor:g} CPUs, {section.gpus_per_actor:g} GPUs each"
    cohorts = f"{demand.participants} clients a round in {demand.num_cohorts} cohorts of {demand.cohort_size}"
    shared = f"{_mb(traffic.data_bytes)} data + {_mb(traffic.backbone_bytes)} backbone once"
    lines = [
        f"a run of {demand.config.name} ({demand.config.algorithm.name}) requests",
        f"  actors        {demand.num_actors} with {per_actor}; {cohorts}",
        f"  bundles       {_bundles(demand.bundles)}",
        f"  nodes         {_nodes(demand, file)}",
        f"  object store  head: {_mb(demand.head_store_bytes)} ({shared}, and the tasks and results of all actors)",
        f"  upload        {_per_round(traffic.upload_bytes, demand.participants)}",
        f"  download      {_per_round(traffic.download_bytes, demand.participants)}",
    ]
    if demand.nodes:
        own = f"the same, with those of at most {demand.actors_per_node} actors"
        lines.insert(-2, f"                a worker: {_mb(demand.worker_store_bytes)} ({own})")
    fitting = actors_that_fit(section, largest_cluster(section, file))
    has_room = demand.num_actors < fitting and not demand.waiting
    if section.num_actors == "auto" and has_room and demand.cohort_size > 1:
        lines.append(
            f"  {fitting} such actors would fit; smaller cohorts (training.cohort_size) would use more of them"
        )
    return lines


def _nodes(demand: Demand, file: LauncherFile) -> str:
    head = f"the head ({file.head.name})"
    workers = ", ".join(f"{count} {name}" for name, count in demand.nodes.items())
    nodes = f"{head} and {workers}" if workers else f"{head} alone"
    if demand.waiting:
        nodes += f"; no node is left for {demand.waiting} of {len(demand.bundles)} bundles, the others do their work"
    return nodes


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
