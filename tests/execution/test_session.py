"""Connecting and fitting: what cannot work is refused at once, with the key to change."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sylva_ray.config.cluster import ClusterSection
from sylva_ray.core.errors import UserError
from sylva_ray.execution.ray.session import ray_session, require_reachable
from sylva_ray.provisioning.placement import (
    actors_per_gpu,
    actors_that_fit,
    check_resources,
    gpu_bundles,
    resolve_num_actors,
)

ray = pytest.importorskip("ray")

LAPTOP = [{"CPU": 4.0}]
TWO_GPU_NODES = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 2.0}]
SPLIT = [{"CPU": 16.0}, {"CPU": 1.0, "GPU": 8.0}]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":6379", "ray://localhost:10001", "localhost:99999"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=r"cluster\.address = .*must be host:port"):
        require_reachable(address, timeout_s=1)


def test_a_closed_port_is_refused_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cluster\.address = .*no Ray cluster answers there"):
        require_reachable(f"127.0.0.1:{closed_port()}", timeout_s=30)
    assert time.monotonic() - started < 5


def test_a_port_that_is_not_rays_is_given_up_in_time(silent_port: int) -> None:
    with pytest.raises(UserError, match=r"no answer within 1 s"):
        require_reachable(f"127.0.0.1:{silent_port}", timeout_s=1)


def test_auto_does_not_hang_on_a_stale_address(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent_port}")
    with pytest.raises(UserError, match=r"cluster\.address = 'auto'.*no answer within 1 s"):
        require_reachable("auto", timeout_s=1)


@pytest.mark.parametrize(
    ("wish", "nodes", "key"),
    [
        ({"gpus_per_actor": 0.5}, LAPTOP, "cluster.gpus_per_actor"),
        ({"gpus_per_actor": 4}, TWO_GPU_NODES, "cluster.gpus_per_actor"),
        ({"gpus_per_actor": 1.5}, TWO_GPU_NODES, "cluster.gpus_per_actor"),
        ({"cpus_per_actor": 5}, LAPTOP, "cluster.cpus_per_actor"),
        ({"cpus_per_actor": 2, "gpus_per_actor": 1}, SPLIT, "cluster.cpus_per_actor"),
    ],
)
def test_an_actor_that_fits_no_node_is_refused(wish: dict[str, Any], nodes: list[Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        check_resources(ClusterSection(**wish), nodes)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("wish", "nodes", "expected"),
    [
        ({}, LAPTOP, 4),  # a CPU each
        ({"cpus_per_actor": 0.1}, LAPTOP, 6),  # 40 would fit, there is work for 6
        ({"cpus_per_actor": 3}, LAPTOP, 1),
        ({"gpus_per_actor": 0.5}, TWO_GPU_NODES, 6),  # 4 on the first node, 3 CPUs on the second: 7 would fit
        ({"gpus_per_actor": 1}, TWO_GPU_NODES, 4),
        ({"gpus_per_actor": 0.4, "cpus_per_actor": 0.1}, TWO_GPU_NODES[:1], 4),  # two shares per GPU, a rest of 0.2
        ({"gpus_per_actor": 2}, TWO_GPU_NODES, 2),
        ({"num_actors": 3}, LAPTOP, 3),
        ({"num_actors": 4, "cpus_per_actor": 0.5}, LAPTOP, 4),
        ({"num_actors": 50, "cpus_per_actor": 0.5}, LAPTOP, 6),  # never more than cohorts
        ({"num_actors": "per_client", "cpus_per_actor": 0.25}, LAPTOP, 12),
        ({"num_actors": 5, "address": "head:6379"}, LAPTOP, 5),  # an autoscaler may bring the fifth
    ],
)
def test_number_of_actors(wish: dict[str, Any], nodes: list[Any], expected: int) -> None:
    assert resolve_num_actors(ClusterSection(**wish), num_cohorts=6, num_clients=12, nodes=nodes) == expected


@pytest.mark.parametrize("num_actors", [5, "per_client"])
def test_more_actors_than_this_machine_holds_are_refused(num_actors: int | str) -> None:
    with pytest.raises(UserError, match=r"cluster\.num_actors = .*4 fit on this machine"):
        resolve_num_actors(ClusterSection(num_actors=num_actors), num_cohorts=6, num_clients=12, nodes=LAPTOP)


@pytest.mark.parametrize(
    ("wish", "num_actors", "num_gpus", "expected"),
    [
        ({}, 4, 2, []),
        ({"gpus_per_actor": 0.5}, 2, 2, [(1, 1), (1, 1)]),  # nobody shares while a GPU is free
        ({"gpus_per_actor": 0.5, "cpus_per_actor": 2}, 3, 2, [(1, 4), (1, 2)]),  # actors 0 and 2 share the first
        ({"gpus_per_actor": 0.5}, 1, 8, [(1, 1)]),
        ({"gpus_per_actor": 0.5}, 5, 1, [(1, 2), (1, 2), (1, 1)]),  # two more GPUs are to come
        ({"gpus_per_actor": 2}, 2, 5, [(2, 1), (2, 1)]),
    ],
)
def test_gpu_bundles(wish: dict[str, Any], num_actors: int, num_gpus: int, expected: list[tuple[int, int]]) -> None:
    """(GPUs, CPUs) to reserve: a GPU is never shared by more actors than it has room for."""
    bundles = gpu_bundles(ClusterSection(**wish), num_actors, [{"CPU": 64, "GPU": num_gpus}], [{"CPU": 64, "GPU": 8}])
    assert [(bundle["GPU"], bundle["CPU"]) for bundle in bundles] == expected


@pytest.mark.parametrize(
    ("wish", "num_actors", "nodes", "expected"),
    [
        ({"gpus_per_actor": 0.2}, 4, [{"CPU": 4, "GPU": 1}], [4]),
        ({"gpus_per_actor": 0.2}, 5, [{"CPU": 4, "GPU": 1}], [3, 2]),  # five shares, four CPUs: three actors start
        ({"gpus_per_actor": 0.25}, 5, [{"CPU": 5, "GPU": 4}], [3, 2]),
        ({"gpus_per_actor": 0.5}, 6, [{"CPU": 3, "GPU": 2}] * 2, [2, 2, 1, 1]),
        ({"gpus_per_actor": 0.2}, 21, [{"CPU": 4, "GPU": 1}] * 4 + [{"CPU": 16, "GPU": 1}], [5, 4, 4, 4, 4]),
        ({"gpus_per_actor": 0.25, "cpus_per_actor": 0.5}, 4, [{"CPU": 1, "GPU": 1}] * 2, [1, 1]),
        ({"gpus_per_actor": 2}, 2, [{"CPU": 4, "GPU": 4}], [1, 1]),
        ({"gpus_per_actor": 0.5}, 2, [{"CPU": 4}], [2]),  # nothing is known of nodes with GPUs
    ],
)
def test_bundles_find_room_where_a_gpu_has_more_shares_than_its_node_has_cpus(
    wish: dict[str, Any], num_actors: int, nodes: list[Any], expected: list[float]
) -> None:
    """Ray never finds room for a bundle that is larger than every node, and none of its actors would start."""
    bundles = gpu_bundles(ClusterSection(**wish), num_actors, [], nodes)
    assert [bundle["CPU"] for bundle in bundles] == expected


def placed(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> float:
    """CPUs of the bundles that find room, the largest first; the better of two orders of the nodes."""
    totals = []
    for is_fixed in (False, True):
        free, total = [dict(node) for node in sorted(nodes, key=lambda node: -node["CPU"] / node["GPU"])], 0.0
        for bundle in sorted(bundles, key=lambda bundle: -bundle["CPU"]):
            fitting = [node for node in free if all(node[name] >= value for name, value in bundle.items())]
            if fitting:
                node = fitting[0] if is_fixed else max(fitting, key=lambda node: node["CPU"] / node["GPU"])
                for name, value in bundle.items():
                    node[name] -= value
                total += bundle["CPU"]
        totals.append(total)
    return max(totals)


@pytest.mark.parametrize("all_present", [False, True])
def test_hardly_ever_do_fewer_actors_find_room_than_in_bundles_of_all_shares(all_present: bool) -> None:
    """What finds room is reckoned greedily, so that another way to place the bundles may be better."""
    rng = np.random.default_rng(0)
    better = worse = 0
    for _ in range(1000):
        nodes = [
            {"CPU": float(rng.integers(1, 17)), "GPU": float(rng.integers(1, 5))} for _ in range(rng.integers(1, 5))
        ]
        section = ClusterSection(gpus_per_actor=float(rng.choice([0.2, 0.25, 0.33, 0.5, 1])))
        count, shares = actors_that_fit(section, nodes), actors_per_gpu(section)
        present = nodes if all_present else []
        found = placed(gpu_bundles(section, count, present, nodes), nodes)
        num_plain = max(-(-count // shares), min(count, sum(int(node["GPU"]) for node in present)))
        sizes = [len(range(bundle, count, num_plain)) for bundle in range(num_plain)]
        plain = placed([{"CPU": float(size), "GPU": 1.0} for size in sizes], nodes)
        worse += found < plain
        better += found > plain
    assert worse <= 2
    assert better > 100


@pytest.mark.usefixtures("local_ray")
def test_a_running_cluster_is_reachable() -> None:
    require_reachable(ray.get_runtime_context().gcs_address, timeout_s=60)


@pytest.mark.usefixtures("local_ray")
def test_a_session_uses_the_connection_there_is_and_leaves_it() -> None:
    with ray_session(ClusterSection()):
        assert ray.is_initialized()
    assert ray.is_initialized()
    no_gpu = r"cluster\.gpus_per_actor = 1\.0: no node of the cluster has a GPU"
    with pytest.raises(UserError, match=no_gpu), ray_session(ClusterSection(gpus_per_actor=1)):
        pass
    assert ray.is_initialized()
