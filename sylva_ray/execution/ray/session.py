"""The driver's connection to Ray: start Ray on this machine or join a running cluster, and see what fits on it.

Every wait is limited. Ray itself retries an address that does not answer for minutes, and an actor that fits on no node
waits for ever. So the address is probed first, and what an actor requests is compared with the nodes that there are, or
that an autoscaler may add.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from sylva_ray.config.cluster import ClusterSection
from sylva_ray.core.errors import RunError, UserError, asked_as
from sylva_ray.core.locations import local_path
from sylva_ray.core.processes import AfterDeath
from sylva_ray.provisioning.launcher_file import LauncherFile, Resources, bootstrap_file, load_promised
from sylva_ray.provisioning.placement import check_resources, largest_cluster

NAMESPACE = "sylva_ray"

END_SESSION = """
exec > /dev/null 2>&1
passes=0 passes_without=0
sleep 5
while [ $passes_without -lt 3 ] && [ $passes -lt 30 ]; do
    passes=$((passes + 1)) passes_without=$((passes_without + 1))
    for process in /proc/[0-9]*; do
        case "$(cat "$process/comm")" in
            ray*|gcs_server*) shown=$(ls -l "$process/fd") ;;
            python*) shown=$(tr '\\0' ' ' < "$process/cmdline" | grep 'ray/_private/\\|ray/dashboard/') ;;
            *) continue ;;
        esac
        case "$shown" in *"$1/"*) kill -9 "${process#/proc/}" && passes_without=0 ;; esac
    done
    sleep 2
done
"""
"""A script that ends what is left of a session of Ray on this machine: Ray's processes with a file of it open, and
those that have just been started and so are still called Python: a program of Ray's, with a path of the session among
its arguments. It looks until three passes find none, for about a minute at most, since Ray's services replace their
agents. Most processes end by themselves when the driver dies; the agents first try for a minute to reach a service that
is gone."""

GCS_TIMEOUT_S = "15"
"""Seconds after which Ray's processes on this machine end, once its control service (GCS) has been lost. On a cluster
Ray's default (60) stays, in which a head may restart it."""

LOOPBACK = "127.0.0.1"
"""The address of a Ray that this process starts."""

STORE_VARIABLES = "MLFLOW_"
"""Prefix of the variables that hold the address and the password of MLflow's store. The coordinator gets them in a
message, and the environment of Ray's processes does not show them."""


@contextmanager
def ray_session(section: ClusterSection) -> Iterator[None]:
    """Connect to Ray for as long as the block lasts. A connection that exists already is used, and stays open.

    Raises:
        UserError: no cluster answers at ``cluster.address`` or it refuses our token, Ray would ask for no token, or an
            actor fits on no node.
        RunError: Ray cannot be started on this machine.
    """
    started = not ray.is_initialized()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    cleaner: AfterDeath | None = None
    try:
        if started:
            cleaner = _connect(section)
            if callable(on_sigterm):  # Ray replaces it by a handler that aborts the process
                signal.signal(signal.SIGTERM, on_sigterm)
        check_resources(section, possible_nodes(section))
        yield
    finally:
        if started:
            ray.shutdown()
        if cleaner is not None:  # if Ray has lost a service, `shutdown` does not end all others, and says nothing
            cleaner.close()


@contextmanager
def _without(prefix: str) -> Iterator[None]:
    """Hide environment variables from the processes that the block starts."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(prefix)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def check_authentication(section: ClusterSection) -> None:
    """Check that Ray asks every process for its token.

    Raises:
        UserError: it would not, and the configuration does not say that this is meant.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token" and not section.allow_unauthenticated:
        fix = (
            "whoever reaches a port of Ray could run code: unset it, or set it to token "
            "(or accept that with cluster.allow_unauthenticated=true)"
        )
        raise UserError("RAY_AUTH_MODE", mode, fix)


def _connect(section: ClusterSection) -> AfterDeath | None:
    """Join the cluster, or start one on this machine; return what ends the processes of the latter with this one."""
    check_authentication(section)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # workers' output would disturb the live display; their errors arrive as exceptions
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
    if section.address is None:
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", GCS_TIMEOUT_S)
        try:
            with _without(STORE_VARIABLES):
                context: Any = ray.init(address="local", include_dashboard=False, _node_ip_address=LOOPBACK, **quiet)
                return AfterDeath(END_SESSION, context.address_info["session_dir"])
        except Exception as error:  # Ray raises errors of many types, e.g. if one of its processes is killed meanwhile
            raise RunError(f"Ray does not start on this machine: {_last_line(str(error))}") from error
    require_reachable(section.address, section.connect_timeout_s)
    try:
        ray.init(address=section.address, **quiet)
    except Exception as error:  # Ray raises errors of many types: version mismatch, no node on this machine, ...
        raise _unreachable(section.address, _last_line(str(error))) from error
    return None


def require_reachable(address: str, timeout_s: float) -> None:
    """Check that a Ray cluster answers at an address.

    A TCP connection detects a closed port at once. `ray status` in another process detects a port that does not belong
    to Ray, with which `ray.init` would wait for minutes.

    Args:
        address: ``host:port`` or ``auto``.
        timeout_s: how long to wait for each of the two.

    Raises:
        UserError: the address is malformed, nothing answers, or the cluster refuses our token.
    """
    if address != "auto":
        host, colon, port = address.rpartition(":")
        if "://" in address or not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            fix = "must be host:port of a Ray head, seen from a machine of that cluster, or auto"
            raise UserError("cluster.address", address, fix)
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
        except OSError as error:
            raise _unreachable(address, error.strerror or str(error)) from None
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise _unreachable(address, f"no answer within {timeout_s:g} s") from None
    if "auth token" in answer.stderr.lower() or "authentication token" in answer.stderr.lower():
        raise UserError("cluster.address", address, _TOKEN)
    if answer.returncode != 0:
        raise _unreachable(address, _last_line(answer.stderr))


_TOKEN = (
    "the cluster refuses our token; export RAY_AUTH_MODE=token, and have the cluster's token in ~/.ray/auth_token "
    "(or name it in RAY_AUTH_TOKEN_PATH)"
)


def _unreachable(address: str, reason: str) -> UserError:
    fix = f"no Ray cluster answers there ({reason}); start one with `ray start --head`, or leave it out to run Ray here"
    return UserError("cluster.address", address, fix)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1].strip()


def live_nodes() -> list[dict[str, Any]]:
    """Return Ray's descriptions of the nodes that are alive."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"]]


def cluster_gpus() -> float:
    """Return the number of GPUs of the cluster, busy or not."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0.0)


def node_resources() -> list[Resources]:
    """Return the total resources of every live node, busy or not."""
    return [node["Resources"] for node in live_nodes()]


def own_node_resources() -> Resources:
    """Return the total resources of the node of this process, busy or not."""
    own_id = ray.get_runtime_context().get_node_id()
    return next(node["Resources"] for node in live_nodes() if node["NodeID"] == own_id)


def possible_nodes(section: ClusterSection) -> list[Resources]:
    """Return the resources of the nodes; on a cluster with an autoscaler, those of the nodes that it may add.

    Raises:
        UserError: ``cluster.launcher`` is not a cluster file.
    """
    promised = promised_cluster(section)
    return node_resources() if promised is None else largest_cluster(section, promised)


def promised_cluster(section: ClusterSection) -> LauncherFile | None:
    """Return what an autoscaler may add to the connected cluster; None where there is none, or no file about it.

    Raises:
        UserError: ``cluster.launcher`` is not a cluster file.
    """
    path = local_path("cluster.launcher", section.launcher) if section.launcher else bootstrap_file()
    if section.address is None or path is None:
        return None
    with asked_as("cluster.launcher", "file", "cluster file"):
        return load_promised(path)
