"""Read a cluster file without a cloud: which nodes an autoscaler may add, and whether Ray accepts the file.

Two kinds are known: ``cluster.yaml`` for Ray's cluster launcher, and a RayCluster for Kubernetes. Ray's schema covers
the top of a cluster.yaml and the node types. This module checks what that schema lets pass and a cloud refuses after
minutes, such as a misspelt key under ``provider:`` or ``node_config:``, and warns of what is accepted but unsafe, such
as an open port.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sylva_ray.config.schema import FileKind, build, leaves, read_yaml
from sylva_ray.core.errors import UserError
from sylva_ray.core.locations import local_path
from sylva_ray.provisioning.aws import NODE_CONFIG, aws_warnings, check_aws
from sylva_ray.provisioning.cards import MACHINES, Machine
from sylva_ray.provisioning.kuberay import manifest_warnings, pod_groups, read_manifests
from sylva_ray.provisioning.launcher_config import PROVIDER_KEYS, LauncherConfig, check_keys

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` leaves the cluster file on the head that it makes."""

FILL_IN = "FILL_IN"
"""The placeholder in the shipped files for a value that only the reader knows."""

Resources = Mapping[str, float]
"""The resources of one node or bundle, e.g. ``{"CPU": 16, "GPU": 1}``."""

NODE_CONFIG_KEYS: dict[str, frozenset[str]] = {"aws": frozenset(NODE_CONFIG), "local": frozenset()}
"""The keys that a provider takes under ``node_config:``; those of other providers are not checked."""

MAX_NODES = 100_000
"""The most nodes that are counted for a file without a limit."""

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class NodeType:
    """A kind of node. At most ``max_workers`` of it run beside the head; the head's own number is 0.

    Attributes:
        name: of the node type.
        resources: of one node.
        max_workers: see above.
        instance: the cloud's name of the machine, e.g. ``g6.xlarge``; None: not known.
    """

    name: str
    resources: Resources
    max_workers: int
    instance: str | None = field(default=None, compare=False)

    @property
    def machine(self) -> Machine | None:
        """What is known of its instance type; None: nothing."""
        return MACHINES.get(self.instance or "")


@dataclass(frozen=True)
class LauncherFile:
    """The nodes that a cluster file allows.

    Attributes:
        path: where it was read.
        provider: e.g. ``aws``.
        head: the head's node type.
        workers: the other node types.
        max_workers: nodes beside the head, of all types together.
        warnings: what Ray accepts but a reader should change, one sentence each.
        blanks: dotted keys that still hold `FILL_IN`.
        object_store: bytes of every node's object store; None: not known.
    """

    path: Path
    provider: str
    head: NodeType
    workers: tuple[NodeType, ...]
    max_workers: int
    warnings: tuple[str, ...] = ()
    blanks: tuple[str, ...] = ()
    object_store: int | None = None

    @property
    def node_types(self) -> tuple[NodeType, ...]:
        """All node types, the head's first."""
        return self.head, *self.workers

    def largest_cluster(self, value: Mapping[str, int]) -> list[Resources]:
        """Return the nodes of the largest cluster: the head, then workers, those of highest ``value[name]`` first."""
        nodes: list[Resources] = [self.head.resources]
        limit = min(self.max_workers, MAX_NODES)
        for kind in sorted(self.workers, key=lambda kind: (-value[kind.name], -kind.resources.get("GPU", 0))):
            remaining = limit - (len(nodes) - 1)
            nodes += [kind.resources] * min(kind.max_workers, remaining)
        return nodes


class ClusterLauncher(Protocol):
    """Ray's cluster launcher and autoscaler, as `sylva_ray.execution.ray.launcher` asks them."""

    def validate(self, path: Path, raw: Mapping[str, object]) -> LauncherConfig:
        """Fill in Ray's defaults and check the file against Ray's schema.

        Raises:
            UserError: Ray refuses the file; names the dotted key.
            RunError: this version of Ray has no cluster launcher.
        """
        ...

    def nodes_for(self, file: LauncherFile, bundles: Sequence[Resources]) -> tuple[dict[str, int], int]:
        """Return the workers that the autoscaler adds for ``bundles``, and how many bundles then still wait.

        Raises:
            RunError: this version of Ray has no autoscaler.
        """
        ...


CLUSTER_FILE = FileKind(
    example="a cluster file is a cluster.yaml for `ray up`, or a RayCluster for Kubernetes",
    smallest="a cluster file has a provider and node types",
    sections="provider: and available_node_types:",
)


def load_launcher_file(path: Path, launcher: ClusterLauncher) -> LauncherFile:
    """Read and check a cluster file as `ray up` would, offline. Of a RayCluster only the node types are read.

    Args:
        path: a cluster.yaml or a manifest for Kubernetes.
        launcher: Ray's schema and defaults.

    Raises:
        UserError: the file does not exist or is not YAML, or Ray or its provider would refuse it; names the dotted key.
    """
    documents = read_manifests(path)
    if documents is not None:
        return _from_manifests(path, documents)
    raw = read_yaml(path, CLUSTER_FILE)
    config = launcher.validate(path, raw)
    _check_config(config)
    return _from_config(path, config, tuple(_warnings(config)), _blanks(raw))


def load_promised(path: Path) -> LauncherFile | None:
    """Read the node types of a cluster that is running; its file is not checked.

    Returns:
        None if the file does not say what its nodes hold.

    Raises:
        UserError: the file does not exist or is not YAML, or its node types cannot be read.
    """
    documents = read_manifests(path)
    if documents is not None:
        return _from_manifests(path, documents)
    raw = read_yaml(path, CLUSTER_FILE)
    if not raw.get("available_node_types") or not raw.get("head_node_type"):
        return None
    try:
        config = build(LauncherConfig, raw)
    except UserError as error:
        fix = f"{error.key} cannot be read; `sylva-ray cluster check` reports what is wrong"
        raise UserError("cluster file", str(path), fix) from None
    types = config.available_node_types
    if config.head_node_type not in types or not all(kind.resources for kind in types.values()):
        return None
    return _from_config(path, config)


def bootstrap_file() -> Path | None:
    """Return the file that made this machine the head of a cluster, or None."""
    try:
        path = local_path("cluster.launcher", BOOTSTRAP)
    except UserError:  # the user has no home folder
        return None
    return path if path.is_file() else None


def _check_config(config: LauncherConfig) -> None:
    """Refuse what Ray's schema lets pass and a provider would refuse later."""
    provider = config.provider_type
    if provider in PROVIDER_KEYS:
        check_keys("provider", config.provider, PROVIDER_KEYS[provider])
    for name, node_type in config.available_node_types.items():
        place = f"available_node_types.{name}"
        if provider in NODE_CONFIG_KEYS:
            check_keys(f"{place}.node_config", node_type.node_config, NODE_CONFIG_KEYS[provider])
        if not {"CPU", "GPU"} & node_type.resources.keys() and provider != "local":
            fix = "must give CPU (and GPU): those of the instance type, which cannot be looked up offline"
            raise UserError(f"{place}.resources", dict(node_type.resources), fix)
        for key, count in (("min_workers", node_type.min_workers), ("max_workers", node_type.max_workers or 0)):
            if count < 0:
                raise UserError(f"{place}.{key}", count, "must be 0 or more")
    if provider in PROVIDER_KEYS and not config.auth.get("ssh_user"):
        raise UserError("auth.ssh_user", config.auth.get("ssh_user"), "is missing; on Ubuntu's images it is ubuntu")
    if provider == "aws":
        check_aws(config)


def _from_config(
    path: Path, config: LauncherConfig, warnings: tuple[str, ...] = (), blanks: tuple[str, ...] = ()
) -> LauncherFile:
    kinds = {
        name: NodeType(
            name,
            kind.resources,
            config.max_workers if kind.max_workers is None else kind.max_workers,
            str(kind.node_config.get("InstanceType")),
        )
        for name, kind in config.available_node_types.items()
    }
    head = kinds.pop(config.head_node_type)
    workers = tuple(kinds.values())
    store = re.search(r"OBJECT_STORE_BYTES=(\d{1,15})\b", str(config.model_extra))
    size = int(store[1]) if store else None
    return LauncherFile(path, config.provider_type, head, workers, config.max_workers, warnings, blanks, size)


def _from_manifests(path: Path, documents: Sequence[Mapping[str, object]]) -> LauncherFile:
    """Build the result from the documents of a file for Kubernetes, the RayCluster first."""
    head, *workers = (NodeType(*group) for group in pod_groups(documents[0]))
    warnings = tuple(manifest_warnings(documents[0]))
    blanks = [*_blanks(documents[0])]
    for other in documents[1:]:
        blanks += [f"{other.get('kind')}: {place}" for place in _blanks(other)]
    max_workers = sum(kind.max_workers for kind in workers)
    return LauncherFile(path, "kuberay", head, tuple(workers), max_workers, warnings, tuple(blanks))


def _warnings(config: LauncherConfig) -> Iterator[str]:
    """Yield what Ray accepts but a reader should change."""
    starts = config.start_commands
    for key, commands in starts.items():
        if "ray start" in " ".join(commands) and "RAY_AUTH_MODE=token" not in " ".join(commands):
            yield f"{key} start Ray without RAY_AUTH_MODE=token: anyone who reaches the port can run code"
    if "RAY_AUTH_MODE=token" in str(starts) and not _has_token(config):
        yield "file_mounts copy no ~/.ray/auth_token, without which RAY_AUTH_MODE=token keeps Ray from starting"
    head = config.head_start_ray_commands
    if _hosts(r"--dashboard-host", head) - _LOOPBACK:
        yield "head_start_ray_commands open the dashboard beyond the loopback; use --dashboard-host=127.0.0.1"
    if _hosts(r"mlflow server\b.*?\s(?:--host|-h)", head) - _LOOPBACK:
        yield "head_start_ray_commands open MLflow beyond the loopback; use --host 127.0.0.1"
    if config.provider_type == "aws":
        yield from aws_warnings(config)


def _hosts(option: str, commands: Sequence[str]) -> set[str]:
    """Return the values of an option in ``commands``, after a blank or an equals sign."""
    matches = (re.findall(rf"{option}(?:=|\s+)([^\s;&|)]*)", command, re.DOTALL) for command in commands)
    return {host.strip("'\"") for hosts in matches for host in hosts}


def _has_token(config: LauncherConfig) -> bool:
    """Return whether a mount of the token or its folder, or any command, brings the token to the nodes."""
    mounts = [str(place).rstrip("/") for place in config.file_mounts]
    commands = {key: value for key, value in (config.model_extra or {}).items() if key.endswith("_commands")}
    text = str([*commands.values(), *config.start_commands.values()])
    return any(place.endswith((".ray/auth_token", "/.ray")) for place in mounts) or any(
        word in text for word in (".ray/auth_token", "RAY_AUTH_TOKEN")
    )


def _blanks(raw: Mapping[str, object]) -> tuple[str, ...]:
    """Return the places that hold `FILL_IN`; of a value with an anchor, which has several, the first."""
    places: dict[str, str] = {}
    for place, value in leaves(raw, into_lists=True):
        if FILL_IN in str(value):
            places.setdefault(str(value), place)
    return tuple(places.values())
