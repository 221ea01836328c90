"""What is read of a cluster.yaml, and the keys that Ray's own schema does not check."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

from sylva_ray.core.errors import UserError
from sylva_ray.core.text import did_you_mean

T = TypeVar("T")


def _empty_if_none(kind: type[T]) -> BeforeValidator:
    return BeforeValidator(lambda value: kind() if value is None else value)


RawMapping = Annotated[dict[str, object], _empty_if_none(dict)]
Commands = Annotated[list[str], _empty_if_none(list)]


class NodeTypeSection(BaseModel):
    """One entry of ``available_node_types``. ``node_config`` is passed on to the cloud as it is."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    resources: dict[str, float] = {}
    min_workers: int = 0
    max_workers: int | None = None
    node_config: RawMapping = {}


class LauncherConfig(BaseModel):
    """A file for Ray's cluster launcher; the keys that are not read here are kept in ``model_extra``."""

    model_config = ConfigDict(frozen=True, extra="allow")

    provider: RawMapping = {}
    auth: RawMapping = {}
    available_node_types: dict[str, NodeTypeSection]
    head_node_type: str
    max_workers: int = 0
    file_mounts: RawMapping = {}
    head_start_ray_commands: Commands = []
    worker_start_ray_commands: Commands = []

    @property
    def provider_type(self) -> str:
        """The provider's name, e.g. ``aws``."""
        return str(self.provider.get("type"))

    @property
    def start_commands(self) -> Mapping[str, Sequence[str]]:
        """The commands that start Ray, by key."""
        return {
            "head_start_ray_commands": self.head_start_ray_commands,
            "worker_start_ray_commands": self.worker_start_ray_commands,
        }


_ANY_PROVIDER = (
    "type region availability_zone cache_stopped_nodes use_internal_ips use_external_head_ip disable_node_updaters "
    "disable_launch_config_check foreground_node_launch worker_liveness_check worker_rpc_drain"
)
PROVIDER_KEYS: dict[str, frozenset[str]] = {
    "aws": frozenset(f"{_ANY_PROVIDER} key_pair security_group cloudwatch aws_credentials".split()),
    "local": frozenset(f"{_ANY_PROVIDER} head_ip external_head_ip worker_ips coordinator_address".split()),
}
"""The keys that Ray 2.60 reads under ``provider:``; of other providers only what Ray's schema says is checked."""


def check_keys(place: str, section: Mapping[str, object], allowed: Collection[str]) -> None:
    """Refuse a key that is not ``allowed``.

    Args:
        place: dotted place of the section.
        section: its keys and values.
        allowed: the keys that it may have.

    Raises:
        UserError: names the dotted key and the allowed key that is most similar.
    """
    for key, value in section.items():
        if key not in allowed:
            raise unknown_key(f"{place}.{key}", value, key, allowed)


def unknown_key(place: str, value: object, key: str, allowed: Collection[str]) -> UserError:
    """Build the error for a key that nothing reads.

    Args:
        place: the whole dotted key.
        value: its value.
        key: its last part.
        allowed: the keys that are known there.
    """
    hint = did_you_mean(key, allowed)
    return UserError(place, value, f"unknown key; {hint}Allowed here: {', '.join(sorted(allowed)) or 'nothing'}")
