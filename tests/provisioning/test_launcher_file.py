"""cluster.yaml: the shipped one is valid and closed to the world, typos are found offline, demand is Ray's own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sylva_ray.config.cluster import ClusterSection
from sylva_ray.config.experiment import load_config
from sylva_ray.core.errors import UserError

pytest.importorskip("ray")

from sylva_ray.execution.ray.launcher import RayLauncher
from sylva_ray.execution.ray.session import possible_nodes
from sylva_ray.provisioning.aws import NODE_CONFIG
from sylva_ray.provisioning.demand import demand_lines, estimate_demand, file_lines
from sylva_ray.provisioning.launcher_file import LauncherFile, NodeType, load_launcher_file, load_promised
from sylva_ray.provisioning.placement import check_resources, largest_cluster, resolve_num_actors

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "cluster.yaml"

Change = Callable[[dict[str, Any]], None]


NODE = "available_node_types.small.node_config"


def _small(config: dict[str, Any]) -> dict[str, Any]:
    return config["available_node_types"]["small"]


def _node(config: dict[str, Any]) -> dict[str, Any]:
    return _small(config)["node_config"]


@pytest.fixture(scope="module")
def launcher() -> LauncherFile:
    return load_launcher_file(SHIPPED, RayLauncher())


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Change], Path]:
    """The shipped file with one change."""

    def write(change: Change) -> Path:
        raw = copy.deepcopy(yaml.safe_load(SHIPPED.read_text()))
        change(raw)
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


def test_the_shipped_file_is_valid_and_scales_from_nothing(launcher: LauncherFile) -> None:
    assert launcher.provider == "aws"
    assert "GPU" not in launcher.head.resources
    assert all(kind.resources["GPU"] >= 1 for kind in launcher.workers)
    raw = yaml.safe_load(SHIPPED.read_text())
    for kind in launcher.workers:
        assert raw["available_node_types"][kind.name]["min_workers"] == 0
        assert raw["available_node_types"][kind.name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_the_shipped_file_checks_gpus_where_they_are_and_installs_no_cuda_on_the_head() -> None:
    raw = yaml.safe_load(SHIPPED.read_text())
    head, worker = raw["head_setup_commands"], raw["worker_setup_commands"]
    assert worker[-1] == "~/sylva/bin/sylva-ray cluster gpu"
    installs = [c for c in [*raw["setup_commands"], *head, *worker] if "uv pip install" in c]
    assert installs == [head[1], worker[0]]
    assert [" --torch-backend cpu " in command for command in installs] == [True, False]
    for kind in ("small", "large"):
        (disk,) = raw["available_node_types"][kind]["node_config"]["BlockDeviceMappings"]
        assert 125 < disk["Ebs"]["Throughput"] <= 0.25 * 3000  # of gp3, whose baseline is 3,000 IOPS


def test_the_worker_type_that_is_a_comment_is_valid_without_its_marks(tmp_path: Path) -> None:
    text = SHIPPED.read_text()
    start = text.index("  # huge:")
    end = text.index("\n\n", start)
    path = tmp_path / "cluster.yaml"
    path.write_text(text[:start] + text[start:end].replace("  # ", "  ") + text[end:])
    loaded = load_launcher_file(path, RayLauncher())
    assert loaded.warnings == ()
    assert loaded.workers[-1] == NodeType("huge", {"CPU": 16, "GPU": 1}, 1)


def test_the_shipped_file_is_closed_to_the_world_and_asks_for_what_only_the_reader_knows(
    launcher: LauncherFile,
) -> None:
    assert launcher.warnings == ()
    assert launcher.blanks == ("metadata.image", "metadata.security_groups", "metadata.settings")
    assert "fill in: metadata.image" in file_lines(launcher)


def test_the_shipped_file_installs_this_version() -> None:
    from sylva_ray import __version__

    assert f"SYLVA_RAY_VERSION={__version__}" in SHIPPED.read_text()


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        (lambda c: c.update(max_wrokers=3), "max_wrokers", "did you mean 'max_workers'"),
        (
            lambda c: c["provider"].update(cache_stoped_nodes=True),
            "provider.cache_stoped_nodes",
            "'cache_stopped_nodes'",
        ),
        (
            lambda c: c["available_node_types"]["small"]["node_config"].update(InstanceTyp="g6.xlarge"),
            "available_node_types.small.node_config.InstanceTyp",
            "'InstanceType'",
        ),
        (
            lambda c: c["available_node_types"]["small"].update(min_worker=1),
            "available_node_types.small.min_worker",
            "'min_workers'",
        ),
        (
            lambda c: c["available_node_types"]["small"]["resources"].update(GPU="one"),
            "available_node_types.small.resources.GPU",
            "not of type 'integer'",
        ),
        (lambda c: c.update(head_node_type="haed"), "cluster file", "head_node_type"),
        (lambda c: c["available_node_types"]["large"].pop("resources"), "available_node_types.large", "resources"),
        (
            lambda c: c["available_node_types"]["large"].update(resources={}),
            "available_node_types.large.resources",
            "GPU",
        ),
        (lambda c: c.pop("provider"), "provider", "missing"),
        (lambda c: c["provider"].pop("region"), "provider.region", "missing"),
        (lambda c: c["provider"].update(key_pair="mine"), "provider.key_pair", "must be a mapping"),
        (lambda c: c["auth"].clear(), "auth.ssh_user", "missing"),
        (lambda c: _small(c).update(max_workers=-1), "available_node_types.small.max_workers", "0 or more"),
        (lambda c: _small(c).update(min_workers=-1), "available_node_types.small.min_workers", "0 or more"),
        (lambda c: _node(c).pop("InstanceType"), f"{NODE}.InstanceType", "missing"),
        (lambda c: _node(c).update(InstanceType=""), f"{NODE}.InstanceType", "must be a string"),
        (lambda c: (_node(c).pop("ImageId"), c["provider"].update(region="xx-1")), f"{NODE}.ImageId", "missing"),
        (lambda c: _node(c).update(SecurityGroupIds=[]), f"{NODE}.SecurityGroupIds", "must be a list of strings"),
        (lambda c: _node(c).update(SecurityGroupIds=None), f"{NODE}.SecurityGroupIds", "must be a list of strings"),
        (
            lambda c: _node(c).update(BlockDeviceMappings="x"),
            f"{NODE}.BlockDeviceMappings",
            "must be a list of mappings",
        ),
        (lambda c: _node(c).update(InstanceMarketOptions="spot"), f"{NODE}.InstanceMarketOptions", "must be a mapping"),
        (lambda c: c["auth"].update(ssh_private_key="~/x.pem"), NODE.replace("small", "head") + ".KeyName", "missing"),
    ],
)
def test_a_typo_is_one_line_that_names_the_key(
    changed: Callable[[Change], Path], change: Change, key: str, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_launcher_file(changed(change), RayLauncher())
    assert caught.value.key == key
    assert says in caught.value.fix


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda c: c.update(worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]),
            "RAY_AUTH_MODE=token",
        ),
        (
            lambda c: c.update(
                head_start_ray_commands=["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"]
            ),
            "dashboard",
        ),
        (lambda c: c["available_node_types"]["head"]["node_config"].pop("SecurityGroupIds"), "port 22 to the world"),
        (
            lambda c: c["provider"].update(
                security_group={"IpPermissions": [{"IpRanges": [{"CidrIp": "0.0.0.0/0"}], "FromPort": 22}]}
            ),
            "to the world",
        ),
        (lambda c: _node(c).pop("ImageId"), "small has no ImageId"),
        (lambda c: c["file_mounts"].pop("~/.ray/auth_token"), "~/.ray/auth_token"),
        (lambda c: c["head_start_ray_commands"].append("mlflow server --host=0.0.0.0"), "MLflow"),
        (lambda c: c["head_start_ray_commands"].append("mlflow server --port 5000 -h 0.0.0.0"), "MLflow"),
        (lambda c: _head_command(c, "--dashboard-host=127.0.0.1", "--dashboard-host 0.0.0.0"), "dashboard"),
    ],
)
def test_what_ray_accepts_and_is_unsafe_is_warned_of(
    changed: Callable[[Change], Path], change: Change, says: str
) -> None:
    warnings = load_launcher_file(changed(change), RayLauncher()).warnings
    assert len(warnings) == 1
    assert says in warnings[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: _head_command(c, "--dashboard-host=127.0.0.1", "--dashboard-host 127.0.0.1"),
        lambda c: _head_command(c, "--dashboard-host=127.0.0.1", "--dashboard-host='localhost'"),
        lambda c: _head_command(c, "--dashboard-host=127.0.0.1", ""),  # Ray's own default
        lambda c: _head_command(c, "--host 127.0.0.1", "--host=127.0.0.1"),
        lambda c: _head_command(c, "--host 127.0.0.1", ""),  # MLflow's
        lambda c: c.pop("auth"),  # Ray's: ubuntu
        lambda c: c.update(file_mounts={"/home/ubuntu/.ray/": "~/.ray"}),
        lambda c: _node(c).update(InstanceMarketOptions={}),  # on demand
        lambda c: _small(c).update(node_config={"LaunchTemplate": {"LaunchTemplateName": "mine"}}),
    ],
)
def test_another_safe_setting_has_no_warning(changed: Callable[[Change], Path], change: Change) -> None:
    assert load_launcher_file(changed(change), RayLauncher()).warnings == ()


def _head_command(config: dict[str, Any], old: str, new: str) -> None:
    commands = config["head_start_ray_commands"]
    assert sum(old in command for command in commands) == 1
    commands[:] = [command.replace(old, new) for command in commands]


SMALL = NodeType("small", {"CPU": 4, "GPU": 1}, 4)
LARGE = NodeType("large", {"CPU": 48, "GPU": 4}, 1)
CLUSTER = LauncherFile(Path("cluster.yaml"), "aws", NodeType("head", {"CPU": 8}, 0), (SMALL, LARGE), max_workers=3)


def test_the_largest_cluster_keeps_both_limits() -> None:
    """Three machines beside the head, at most one large; the large one holds the most of half-GPU actors."""
    nodes = largest_cluster(ClusterSection(gpus_per_actor=0.5), CLUSTER)
    assert nodes == [{"CPU": 8}, {"CPU": 48, "GPU": 4}, {"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}]


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"gpus_per_actor": 0.5}, 12),  # six GPUs, though not one is there before the first actor asks
        ({"gpus_per_actor": 2}, 2),  # on the large one alone
        ({}, 64),  # 8 + 48 + 2 * 4 CPUs
    ],
)
def test_auto_counts_what_an_autoscaler_may_bring(wish: dict[str, Any], expected: int) -> None:
    section = ClusterSection(address="auto", **wish)
    nodes = largest_cluster(section, CLUSTER)
    assert resolve_num_actors(section, num_cohorts=100, num_clients=100, nodes=nodes) == expected


def test_more_gpus_than_any_node_type_has_are_refused() -> None:
    section = ClusterSection(address="auto", gpus_per_actor=8)
    with pytest.raises(UserError, match=r"cluster\.gpus_per_actor = 8\.0: the largest node has 4 GPUs"):
        check_resources(section, largest_cluster(section, CLUSTER))


def test_a_launcher_file_counts_only_on_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        possible_nodes(ClusterSection(address="auto", launcher=str(tmp_path / "none.yaml")))


def test_what_a_running_cluster_was_made_from_is_not_judged(changed: Callable[[Change], Path]) -> None:
    """Ray adds keys on the way to the head; where nodes are found out at their start, the file does not count."""

    def as_ray_does(config: dict[str, Any]) -> None:
        config.update(head_node={})
        config["provider"].update(_config_cache_path="x")

    path = changed(as_ray_does)
    promised = load_promised(path)
    assert promised is not None
    assert {*map(str, promised.workers)} == {*map(str, load_launcher_file(SHIPPED, RayLauncher()).workers)}
    section = ClusterSection(address="auto", launcher=str(path), gpus_per_actor=1)
    assert sum(node.get("GPU", 0) for node in possible_nodes(section)) == 8
    assert load_promised(changed(lambda c: c["available_node_types"]["head"].update(resources={}))) is None


def test_the_manifest_for_kubernetes_says_the_same_of_its_nodes() -> None:
    launcher = load_launcher_file(ROOT / "deploy/raycluster.yaml", RayLauncher())
    assert launcher.head.resources == {"CPU": 7}  # MLflow beside it, and what Kubernetes keeps: a machine of 8
    assert launcher.workers == (NodeType("small", {"CPU": 4, "GPU": 1}, 4),)
    assert launcher.warnings == ()
    assert launcher.blanks == (
        "spec.headGroupSpec.template.spec.containers.image",
        "PersistentVolumeClaim: spec.storageClassName",
    )


@pytest.mark.parametrize(
    ("bundles", "expected"),
    [
        ([{"GPU": 1, "CPU": 2}] * 2, ({"small": 2}, 0)),
        ([{"GPU": 1, "CPU": 2}] * 4, ({"small": 3}, 1)),  # it takes the type that is filled best, up to max_workers: 3
        ([{"GPU": 2, "CPU": 2}], ({"large": 1}, 0)),
        ([{"CPU": 1}] * 8, ({}, 0)),  # on the head
    ],
)
def test_nodes_are_those_that_rays_autoscaler_adds(bundles: list[dict[str, int]], expected: tuple[Any, int]) -> None:
    assert RayLauncher().nodes_for(CLUSTER, bundles) == expected


def test_demand_of_a_run(launcher: LauncherFile) -> None:
    """Six clients, two cohorts of three: two quarter-GPU actors share one GPU; bytes are those of the run."""
    overrides = ["cluster.gpus_per_actor=0.25", "training.device=cpu"]
    demand = estimate_demand(load_config(ROOT / "configs/digits.yaml", overrides), launcher, RayLauncher())
    assert (demand.num_cohorts, demand.cohort_size, demand.num_actors) == (2, 3, 2)
    assert demand.bundles == ({"GPU": 1.0, "CPU": 2.0},)
    assert (demand.nodes, demand.waiting) == ({"small": 1}, 0)
    assert demand.traffic.upload_bytes == 597_544  # what `sylva-ray bytes` says of rank 8
    assert demand.actors_per_node == 2
    assert demand.worker_store_bytes == demand.head_store_bytes
    text = "\n".join(demand_lines(demand, launcher))
    for part in ("2 with 1 CPUs, 0.25 GPUs each", "1 x {GPU: 1, CPU: 2}", "1 small", "597,544 B per client"):
        assert part in text


def test_actors_that_share_a_gpu_do_not_wait_for_cpus_that_no_node_has(launcher: LauncherFile) -> None:
    """A GPU has five shares of 0.2, and the small nodes have four CPUs beside theirs."""
    overrides = ["cluster.gpus_per_actor=0.2", "training.device=cpu", "partition.num_clients=100"]
    demand = estimate_demand(load_config(ROOT / "configs/vit_base.yaml", overrides), launcher, RayLauncher())
    assert demand.waiting == 0


def test_no_more_actors_are_said_to_fit_while_some_wait_for_a_node(launcher: LauncherFile) -> None:
    overrides = ["cluster.gpus_per_actor=0.5", "training.device=cpu", "training.cohort_size=2"]
    demand = estimate_demand(load_config(ROOT / "configs/digits.yaml", overrides), launcher, RayLauncher())
    says = "such actors would fit"
    assert says in "\n".join(demand_lines(demand, launcher))
    assert says not in "\n".join(demand_lines(dataclasses.replace(demand, waiting=1), launcher))


@pytest.mark.parametrize(
    ("overrides", "nodes", "per_node"),
    [
        (["cluster.gpus_per_actor=0.25"], {"small": 2}, 3),  # six actors in two bundles, though a fourth would fit
        (["cluster.gpus_per_actor=0.5"], {"small": 3}, 2),
        (["cluster.gpus_per_actor=2"], {"large": 1}, 2),
        (["cluster.gpus_per_actor=1", "cluster.cpus_per_actor=4"], {"large": 1, "small": 2}, 4),
        (["cluster.cpus_per_actor=3"], {"small": 3}, 1),  # two on the head's 8 CPUs
        ([], {}, 0),  # all on the head
    ],
)
def test_a_worker_stores_what_its_own_actors_have_under_way_and_the_head_stores_all(
    overrides: list[str], nodes: dict[str, int], per_node: int
) -> None:
    """Six clients, one each. Once data and backbone; thrice an actor's states."""
    config = load_config(ROOT / "configs/digits.yaml", ["training.cohort_size=1", "training.device=cpu", *overrides])
    demand = estimate_demand(config, CLUSTER, RayLauncher())
    assert (demand.nodes, demand.actors_per_node) == (nodes, per_node)
    once, states = demand.traffic.broadcast_bytes, demand.traffic.state_bytes
    assert demand.head_store_bytes == once + 3 * demand.num_actors * states
    assert demand.worker_store_bytes == once + 3 * per_node * states
    assert any("a worker:" in line for line in demand_lines(demand, CLUSTER)) == bool(nodes)


def test_a_run_that_fits_no_node_type_is_refused_by_the_check(launcher: LauncherFile) -> None:
    config = load_config(ROOT / "configs/digits.yaml", ["cluster.gpus_per_actor=8"])
    with pytest.raises(
        UserError, match=r"cluster\.gpus_per_actor = 8\.0: the largest node has 4 GPUs; use at most that"
    ):
        estimate_demand(config, launcher, RayLauncher())


def test_the_keys_of_node_config_are_those_of_ec2() -> None:
    """By botocore's own model of RunInstances; botocore is installed for the tests only."""
    loaders = pytest.importorskip("botocore.loaders")
    shapes = loaders.Loader().load_service_model("ec2", "service-2")["shapes"]

    def type_of(name: str) -> str:
        shape = shapes[name]
        return f"{type_of(shape['member']['shape'])}s" if shape["type"] == "list" else str(shape["type"])

    names = {"a string": "string", "a list of strings, not empty": "strings", "a mapping": "structure"}
    names |= {"a list of mappings": "structures", "true or false": "boolean", "a whole number": "integer"}
    members = shapes["RunInstancesRequest"]["members"]
    for key in NODE_CONFIG.keys() - {"SubnetIds"}:
        assert type_of(members[key]["shape"]) == names[NODE_CONFIG[key]], key
