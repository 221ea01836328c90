"""Check on several raylets that actors spread by GPU fraction, and that data and backbone are sent to every node once.

    head (no GPU) ──► put once ──► node 1: one GPU, two actors of half a GPU, one copy in shared memory
                             └───► node 2: likewise

    python scripts/several_nodes.py [--out result.json]

The GPUs exist in name only; placement and shared memory are real. Needs `unshare`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from sandbox import ROOT, SMALL, enter, finish, result_file, say, temporary_home, wait_until

OVERRIDES = [*SMALL, "partition.num_clients=4", "cluster.gpus_per_actor=0.5", "cluster.cpus_per_actor=0.5"]
NODES, ACTORS_PER_GPU = 2, 2


def shared_memory(node: Mapping[str, Any]) -> int:
    """Return the bytes in a node's object store, for which Ray has no public function."""
    from ray._private.internal_api import node_stats

    stats: Any = node_stats(  # type: ignore[no-untyped-call]
        node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False
    )
    return int(stats.store_stats.object_store_bytes_used)


def place(_: object) -> tuple[str, str]:
    """Return where an actor runs: its node and its GPU."""
    import ray

    context = ray.get_runtime_context()
    (gpu,) = context.get_accelerator_ids()["GPU"]
    return context.get_node_id(), gpu


def main() -> None:
    """Run the scenario."""
    out = result_file(__doc__)
    enter()
    work = temporary_home()
    os.environ["RAY_TMPDIR"] = str(work)
    import ray
    from ray.cluster_utils import Cluster

    from sylva_ray.config.experiment import load_config
    from sylva_ray.execution.ray.pool import RayPool
    from sylva_ray.federation.observer import Observer
    from sylva_ray.preparation.experiment import prepare
    from sylva_ray.preparation.traffic import estimate_traffic

    config = load_config(ROOT / "configs/digits.yaml", OVERRIDES)
    traffic, prepared = estimate_traffic(config), prepare(config)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    for _ in range(NODES):
        cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=200_000_000)
    ray.init(address=cluster.address, log_to_driver=False)
    say(f"{NODES} nodes of one GPU, and a head without one")

    fleet, backbone = ray.put(prepared.fleet), ray.put(prepared.backbone)
    pool = RayPool(prepared.config, fleet, backbone, num_actors=NODES * ACTORS_PER_GPU, observer=Observer())
    slots = [slot for slot in pool._slots if slot is not None]
    places: Counter[tuple[str, str]] = Counter(ray.get([slot.actor.__ray_call__.remote(place) for slot in slots]))
    say(f"{len(slots)} actors of half a GPU on {len(places)} GPUs, {sorted(places.values())} on each")

    live = ray.nodes()  # type: ignore[no-untyped-call]
    workers = {node["NodeID"]: node for node in live if node["Resources"].get("GPU")}
    wait_until(
        lambda: all(shared_memory(node) >= traffic.broadcast_bytes for node in workers.values()),
        "a copy on every node",
        30,
    )
    copies = {node_id: shared_memory(node) for node_id, node in workers.items()}
    say(f"shared memory: {list(copies.values())} bytes per node; estimated for one copy: {traffic.broadcast_bytes}")
    result = {
        "actors": len(slots),
        "gpus": len(places),
        "nodes": len({node for node, _ in places}),
        "actors_per_gpu": sorted(places.values()),
        "reckoned_bytes": traffic.broadcast_bytes,
        "bytes_per_node": sorted(copies.values()),
    }
    pool.close()
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    shutil.rmtree(work, ignore_errors=True)
    finish(result, out)


if __name__ == "__main__":
    main()
