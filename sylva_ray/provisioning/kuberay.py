"""A RayCluster for Kubernetes: what its pods hold and how many may come, read as Ray's autoscaler reads them.

Kubernetes takes a null for an absent key, and so does this. Whatever else is not what the autoscaler needs is one line that
names the dotted place; the rest of the manifest is left to the server that takes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sylva_ray.core.errors import UserError

HEAD = "headgroup"
"""The head's group, which has no name in the manifest; Ray's autoscaler calls it so."""

NO_LIMIT = 2**31 - 1
"""KubeRay's ``maxReplicas`` where none is given, and the largest that it can be."""

_QUANTITY = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?)([KMGTPE]i|[numkMGTPE])?")
_SUFFIX = {
    **{suffix: Decimal(1000) ** power for power, suffix in zip((-3, -2, -1, 1, 2, 3, 4, 5, 6), "numkMGTPE")},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)},
}


class PodGroup(NamedTuple):
    """A kind of pod; ``max_pods`` of it may run at once beside the head (whose own is 0)."""

    name: str
    resources: Mapping[str, float]
    max_pods: int


@dataclass(frozen=True)
class _Part:
    """A value of the manifest, and the dotted place where it stands (or would)."""

    place: str
    value: Any

    def get(self, key: str) -> _Part:
        """What stands under ``key``; its value is None where nothing does."""
        if not isinstance(self.value, dict):
            raise self.refuse("must be a mapping")
        return _Part(f"{self.place}.{key}", self.value.get(key))

    def section(self, key: str) -> _Part:
        """A mapping that may be left out."""
        part = self.get(key)
        if not isinstance(part.value, dict | None):
            raise part.refuse("must be a mapping")
        return _Part(part.place, part.value or {})

    def entries(self) -> list[_Part]:
        """Of a list."""
        if not isinstance(self.value, list):
            raise self.refuse("must be a list")
        return [_Part(f"{self.place}.{index}", value) for index, value in enumerate(self.value)]

    def count(self, default: int, least: int = 0) -> int:
        """A whole number, ``default`` where none is given."""
        value = default if self.value is None else self.value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= NO_LIMIT:
            raise self.refuse(f"must be a whole number from {least} to {NO_LIMIT}")
        return value

    def quantity(self) -> int:
        """Kubernetes' notation (``4``, ``"500m"``, ``14Gi``), rounded up to a whole number as Ray does."""
        match = _QUANTITY.fullmatch(str(self.value))
        if match is None or not isinstance(self.value, str | int | float) or isinstance(self.value, bool):
            raise self.refuse("must be a quantity such as 4, 3500m or 14Gi")
        number, suffix = match.groups()
        return int((Decimal(number) * (_SUFFIX[suffix] if suffix else 1)).to_integral_value(ROUND_CEILING))

    def parameter(self) -> int:
        """Of `ray start`; Kubernetes takes nothing but strings there."""
        if not isinstance(self.value, str) or re.fullmatch(r"\d{1,9}", self.value) is None:
            raise self.refuse('must be a whole number in quotes, e.g. "4"')
        return int(self.value)

    def refuse(self, fix: str) -> UserError:
        """One line that names this place."""
        return UserError(self.place, self.value, f"is missing; {fix}" if self.value is None else fix)


def read_manifests(path: Path) -> list[dict[str, Any]] | None:
    """The documents of a file for Kubernetes, a RayCluster first; None: it is none, or no YAML (`read_yaml` tells why).

    Raises:
        UserError: for Kubernetes, and without a RayCluster.
    """
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text()) if isinstance(d, dict)]
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not any({"apiVersion", "kind"} & document.keys() for document in documents):
        return None
    kinds = [document.get("kind") for document in documents]
    if "RayCluster" not in kinds:
        raise UserError("kind", kinds, "no document of this file is a RayCluster; its node types are what is read here")
    return [documents.pop(kinds.index("RayCluster")), *documents]


def pod_groups(manifest: Mapping[str, Any]) -> list[PodGroup]:
    """The groups of a RayCluster, the head's first.

    Raises:
        UserError: names the dotted place of what Ray or Kubernetes would not take.
    """
    spec = _Part("spec", manifest.get("spec"))
    groups = [PodGroup(HEAD, _resources(spec.get("headGroupSpec")), 0)]
    for part in _worker_groups(spec):
        name = part.get("groupName")
        if not isinstance(name.value, str) or not name.value:
            raise name.refuse("must be a name")
        if name.value in {group.name for group in groups}:
            raise name.refuse("is the name of another group")
        least, most = part.get("minReplicas").count(0), part.get("maxReplicas")
        if most.count(NO_LIMIT) < least:
            raise most.refuse(f"must be at least minReplicas ({least})")
        hosts = part.get("numOfHosts").count(1, least=1)
        groups.append(PodGroup(name.value, _resources(part), most.count(NO_LIMIT) * hosts))
    return groups


def manifest_findings(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What would work, and should not be done.

    Raises:
        UserError: as `pod_groups`.
    """
    spec = _Part("spec", manifest.get("spec"))
    if spec.section("authOptions").get("mode").value != "token":
        yield "spec.authOptions.mode is not token: whoever reaches the port may run code"
    grows = spec.get("enableInTreeAutoscaling")
    if not isinstance(grows.value, bool | None):
        raise grows.refuse("must be true or false")
    for part in _worker_groups(spec):
        if not grows.value:
            yield f"{part.place}: no autoscaler (spec.enableInTreeAutoscaling), hence no more pods than its replicas"
        elif part.get("maxReplicas").value is None:
            yield f"{part.place} gives no maxReplicas: KubeRay's own is {NO_LIMIT}, which bounds no bill"


def _worker_groups(spec: _Part) -> list[_Part]:
    groups = spec.get("workerGroupSpecs")
    return [] if groups.value is None else groups.entries()


def _resources(group: _Part) -> dict[str, float]:
    """What Ray will see in a pod: what the group says itself, else its start parameters, else the first container's limits,
    else its requests."""
    own, start = group.section("resources"), group.section("rayStartParams")
    containers = group.get("template").get("spec").get("containers")
    if not containers.entries():
        raise containers.refuse("must list Ray's container first")
    asked = containers.entries()[0].section("resources")
    limits, requests = asked.section("limits"), asked.section("requests")
    found = {"CPU": _cpus(own, start, limits, requests), "GPU": _gpus(own, start, limits, requests)}
    return {name: float(count) for name, count in found.items() if count}


def _cpus(own: _Part, start: _Part, limits: _Part, requests: _Part) -> int:
    if own.get("CPU").value is not None:
        return own.get("CPU").quantity()
    if start.get("num-cpus").value is not None:
        return start.get("num-cpus").parameter()
    given = next((part.get("cpu") for part in (limits, requests) if part.get("cpu").value is not None), None)
    if given is None:
        raise limits.get("cpu").refuse("Ray's autoscaler asks for it, for requests.cpu or for rayStartParams.num-cpus")
    return given.quantity()


def _gpus(own: _Part, start: _Part, limits: _Part, requests: _Part) -> int:
    for name in filter(_is_gpu, requests.value):
        if limits.get(name).value is None:
            raise limits.get(name).refuse("Kubernetes grants GPUs by their limit; a request alone starts no pod")
    if own.get("GPU").value is not None:
        return own.get("GPU").quantity()
    if start.get("num-gpus").value is not None:
        return start.get("num-gpus").parameter()
    return next((count for name in filter(_is_gpu, limits.value) if (count := limits.get(name).quantity())), 0)


def _is_gpu(name: object) -> bool:
    """As Ray has it: ``nvidia.com/gpu``, ``amd.com/gpu``."""
    return str(name).endswith("gpu")
