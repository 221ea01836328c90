"""``cluster.yaml``: what an autoscaler may bring, and whether Ray will take the file, without a cloud and without a network.

Ray's own schema knows the top of the file and the node types. What it lets pass and a cloud would refuse after minutes, a typo in
``provider:`` or ``node_config:``, is looked up here; so is what would be accepted and is unwise, an open port or no token.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sylva_ray.config.schema import read_yaml
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.text import did_you_mean
from sylva_ray.provisioning.aws import NODE_CONFIG, aws_findings, check_aws
from sylva_ray.provisioning.kuberay import manifest_findings, pod_groups, read_manifests

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""Where `ray up` leaves the file on the head it makes."""

FILL_IN = "FILL_IN"
"""Stands in the shipped files where only the reader knows the value."""

Resources = Mapping[str, float]
"""What one node has, e.g. ``{"CPU": 16, "GPU": 1}``."""

_ANY_PROVIDER = (
    "type region availability_zone cache_stopped_nodes use_internal_ips use_external_head_ip disable_node_updaters "
    "disable_launch_config_check foreground_node_launch worker_liveness_check worker_rpc_drain"
)
PROVIDER_KEYS: dict[str, frozenset[str]] = {
    "aws": frozenset(f"{_ANY_PROVIDER} key_pair security_group cloudwatch aws_credentials".split()),
    "local": frozenset(f"{_ANY_PROVIDER} head_ip external_head_ip worker_ips coordinator_address".split()),
}
"""What Ray 2.60 reads under ``provider:``; other providers are left to Ray's schema."""

NODE_CONFIG_KEYS: dict[str, frozenset[str]] = {"aws": frozenset(NODE_CONFIG), "local": frozenset()}

MAX_NODES = 100_000
"""More than any cluster has; where a file sets no limit, arithmetic stops here."""

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class NodeType:
    """A kind of node; ``max_workers`` of it may run at once (the head's is 0: there is one, always)."""

    name: str
    resources: Resources
    max_workers: int


@dataclass(frozen=True)
class LauncherFile:
    """What a cluster launcher's file promises.

    Attributes:
        path: as given.
        provider: e.g. ``aws``.
        head: its node type.
        workers: the other node types.
        max_workers: of all types together.
        findings: what Ray accepts and a reader should change: one sentence each.
        blanks: dotted keys that still hold `FILL_IN`.
    """

    path: Path
    provider: str
    head: NodeType
    workers: tuple[NodeType, ...]
    max_workers: int
    findings: tuple[str, ...] = ()
    blanks: tuple[str, ...] = ()

    @property
    def node_types(self) -> tuple[NodeType, ...]:
        """Head first."""
        return self.head, *self.workers

    def fullest(self, worth: Mapping[str, int]) -> list[Resources]:
        """The nodes of the cluster at its largest: the head, and workers, those of most ``worth[name]`` first."""
        nodes: list[Resources] = [self.head.resources]
        most = min(self.max_workers, MAX_NODES)
        for kind in sorted(self.workers, key=lambda kind: (-worth[kind.name], -kind.resources.get("GPU", 0))):
            free = most - (len(nodes) - 1)
            nodes += [kind.resources] * min(kind.max_workers, free)
        return nodes

    def nodes_for(self, bundles: Sequence[Resources]) -> tuple[dict[str, int], int]:
        """How many workers of which type Ray's autoscaler adds for ``bundles``, and how many bundles then still wait.

        What fits on the head is placed there first."""
        scheduler, summary = _scheduler()
        types = {k.name: {"resources": dict(k.resources), "max_workers": k.max_workers} for k in self.node_types}
        left, _ = scheduler.get_bin_pack_residual([dict(self.head.resources)], [dict(bundle) for bundle in bundles])
        score = functools.partial(scheduler._default_utilization_scorer, node_availability_summary=summary)
        added, waiting = scheduler.get_nodes_for(
            types, {self.head.name: 1}, self.head.name, self.max_workers, left, score
        )
        return dict(added), len(waiting)


def load_launcher_file(path: Path) -> LauncherFile:
    """Read and validate ``path`` as `ray up` would, offline. Of a RayCluster for Kubernetes only the node types are read.

    Raises:
        UserError: no such file, no YAML, or what Ray or its provider would refuse; names the dotted key.
    """
    documents = read_manifests(path)
    if documents is not None:
        return _of_manifests(path, documents)
    raw = read_yaml(path)
    config = _as_ray_reads_it(path, raw)
    provider = str(config["provider"]["type"])
    _check_keys("provider", config["provider"], PROVIDER_KEYS.get(provider))
    for name, node_type in config["available_node_types"].items():
        own = f"available_node_types.{name}"
        _check_keys(f"{own}.node_config", node_type["node_config"], NODE_CONFIG_KEYS.get(provider))
        if not {"CPU", "GPU"} & node_type["resources"].keys() and provider != "local":
            fix = "must say CPU (and GPU): the instance type's, which nobody can look up offline"
            raise UserError(f"{own}.resources", node_type["resources"], fix)
        for key in ("min_workers", "max_workers"):
            if node_type.get(key, 0) < 0:
                raise UserError(f"{own}.{key}", node_type[key], "must be 0 or more")
    auth = config.get("auth") or {}
    if provider in PROVIDER_KEYS and not auth.get("ssh_user"):
        raise UserError("auth.ssh_user", auth.get("ssh_user"), "is missing; on Ubuntu's images it is ubuntu")
    if provider == "aws":
        check_aws(config)
    return _of_config(path, config, tuple(_findings(config, provider)), _blanks(raw))


def load_promised(path: Path) -> LauncherFile | None:
    """The node types of a cluster that is running, hence is not judged; None where the file does not say what nodes hold.

    Raises:
        UserError: no such file, or no YAML.
    """
    documents = read_manifests(path)
    if documents is not None:
        return _of_manifests(path, documents)
    config = read_yaml(path)
    try:
        types = config.get("available_node_types") or {}
        if config.get("head_node_type") not in types or not all(kind.get("resources") for kind in types.values()):
            return None
        return _of_config(path, config)
    except (AttributeError, TypeError, ValueError):
        fix = "its node types are garbled; `sylva-ray cluster check` tells where"
        raise UserError("cluster file", str(path), fix) from None


def _of_config(
    path: Path, config: Mapping[str, Any], findings: tuple[str, ...] = (), blanks: tuple[str, ...] = ()
) -> LauncherFile:
    most = int(config.get("max_workers", 0))
    kinds = {
        name: NodeType(name, _numbers(kind["resources"]), int(kind.get("max_workers", most)))
        for name, kind in config["available_node_types"].items()
    }
    head = kinds.pop(config["head_node_type"])
    provider = str(config.get("provider", {}).get("type"))
    return LauncherFile(path, provider, head, tuple(kinds.values()), most, findings, blanks)


def _numbers(resources: Mapping[str, Any]) -> Resources:
    return {name: float(value) for name, value in resources.items()}


def _of_manifests(path: Path, documents: Sequence[Mapping[str, Any]]) -> LauncherFile:
    """``documents``: the RayCluster first."""
    head, *workers = (NodeType(*group) for group in pod_groups(documents[0]))
    findings = tuple(manifest_findings(documents[0]))
    blanks = [*_blanks(documents[0])]
    for other in documents[1:]:
        blanks += [f"{other.get('kind')}: {place}" for place in _blanks(other)]
    most = sum(kind.max_workers for kind in workers)
    return LauncherFile(path, "kuberay", head, tuple(workers), most, findings, tuple(blanks))


def bootstrap_file() -> Path | None:
    """The file that made this machine the head of a cluster, if it is one."""
    path = BOOTSTRAP.expanduser()
    return path if path.is_file() else None


def _as_ray_reads_it(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults filled in and schema checked by Ray itself, which has no public function for that."""
    try:
        from jsonschema import ValidationError
        from ray.autoscaler._private.cli_logger import cli_logger
        from ray.autoscaler._private.util import prepare_config, validate_config
    except ImportError as error:
        raise RunError(
            f"this version of Ray has no cluster launcher to ask ({error}); 2.60 is the tested one"
        ) from error
    for logger in ("ray.autoscaler._private.util", "ray.autoscaler._private.docker"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    cli_logger.configure(verbosity=0)
    for key in ("cluster_name", "provider"):
        if key not in raw:
            raise UserError(key, str(path), "is missing; Ray's cluster launcher needs cluster_name and provider")
    if not isinstance(raw["provider"], dict) or "type" not in raw["provider"]:
        raise UserError(
            "provider", raw["provider"], "must be a mapping with a type, e.g. {type: aws, region: us-west-2}"
        )
    try:
        config: dict[str, Any] = prepare_config(dict(raw))
        validate_config(config)
    except ValidationError as error:
        raise _readable(error) from None
    except Exception as error:  # Ray raises whatever its layers raise
        raise UserError("cluster file", str(path), f"Ray refuses it ({' '.join(str(error).split())})") from None
    if not config.get("available_node_types"):
        raise UserError("available_node_types", str(path), "is missing; every node type and its resources belong there")
    return config


def _scheduler() -> tuple[Any, Any]:
    """Ray's own choice of node types, so that we foretell what it does and not what we would do."""
    try:
        from ray.autoscaler._private import resource_demand_scheduler as scheduler
        from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
    except ImportError as error:
        raise RunError(f"this version of Ray has no autoscaler to ask ({error}); 2.60 is the tested one") from error
    logging.getLogger(scheduler.__name__).setLevel(logging.ERROR)
    return scheduler, NodeAvailabilitySummary(node_availabilities={})


def _readable(error: Any) -> UserError:
    """A schema's complaint as one line, with the nearest key where one was misspelt."""
    place = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        allowed = error.schema.get("properties", {})
        unknown = next(key for key in error.instance if key not in allowed)
        return _unknown(f"{place}.{unknown}" if place else unknown, error.instance[unknown], unknown, allowed)
    return UserError(place or "cluster file", error.instance, error.message.splitlines()[0])


def _check_keys(place: str, section: Mapping[str, Any], allowed: frozenset[str] | None) -> None:
    """``allowed`` None: anything goes."""
    if allowed is None:
        return
    for key, value in section.items():
        if key not in allowed:
            raise _unknown(f"{place}.{key}", value, key, allowed)


def _unknown(place: str, value: object, key: str, allowed: Iterable[str]) -> UserError:
    hint = did_you_mean(key, allowed)
    return UserError(place, value, f"unknown key; {hint}Available: {', '.join(sorted(allowed)) or 'nothing'}")


def _findings(config: Mapping[str, Any], provider: str) -> Iterator[str]:
    """What would work, and should not be done."""
    starts = {key: config.get(key) or [] for key in ("head_start_ray_commands", "worker_start_ray_commands")}
    for key, commands in starts.items():
        if "ray start" in " ".join(commands) and "RAY_AUTH_MODE=token" not in " ".join(commands):
            yield f"{key} start Ray without RAY_AUTH_MODE=token: whoever reaches the port may run code"
    if "RAY_AUTH_MODE=token" in str(starts) and not _brings_token(config):
        yield "file_mounts bring no ~/.ray/auth_token, without which a node with RAY_AUTH_MODE=token starts no Ray"
    head = starts["head_start_ray_commands"]
    if _hosts(r"--dashboard-host", head) - _LOOPBACK:
        yield "head_start_ray_commands let the dashboard listen beyond the loopback; say --dashboard-host=127.0.0.1"
    if _hosts(r"mlflow server\b.*?\s(?:--host|-h)", head) - _LOOPBACK:
        yield "head_start_ray_commands let MLflow listen beyond the loopback; say --host 127.0.0.1"
    if provider == "aws":
        yield from aws_findings(config)


def _hosts(option: str, commands: Sequence[str]) -> set[str]:
    """What ``commands`` give for an option, after a blank or an equals sign."""
    found = (re.findall(rf"{option}(?:=|\s+)([^\s;&|)]*)", command, re.DOTALL) for command in commands)
    return {host.strip("'\"") for hosts in found for host in hosts}


def _brings_token(config: Mapping[str, Any]) -> bool:
    """By a mount of the file or its folder, or by any command that names it."""
    mounts = [str(place).rstrip("/") for place in config.get("file_mounts") or {}]
    commands = [value for key, value in config.items() if key.endswith("_commands")]
    return any(place.endswith((".ray/auth_token", "/.ray")) for place in mounts) or any(
        word in str(commands) for word in (".ray/auth_token", "RAY_AUTH_TOKEN")
    )


def _blanks(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Where `FILL_IN` stands; where one value stands in several places (an anchor), the first."""
    places: dict[str, str] = {}
    for place, value in _leaves(raw, ""):
        if FILL_IN in str(value):
            places.setdefault(str(value), place)
    return tuple(places.values())


def _leaves(tree: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, place)
    else:
        yield place, tree
