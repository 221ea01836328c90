"""Read a RayCluster for Kubernetes: what its pods hold and how many may run, as Ray's autoscaler reads them.

Ray derives the same from a RayCluster that runs (`ray.autoscaler._private.kuberay.autoscaling_config`), and a test
holds the two equal. Ray's function is not used here because it expects what the Kubernetes server has already checked
and completed: a file with a mistake ends in a `KeyError` there, and in one line that names the dotted place here. As
for Kubernetes, a null is an absent key. The rest of the manifest is left to the server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import NamedTuple

from sylva_ray.core.errors import UserError
from sylva_ray.core.files import read_text_file
from sylva_ray.core.yaml import YamlError, parse_documents

HEAD = "headgroup"
"""The name of the head's group in Ray's autoscaler; the manifest gives it none."""

NO_LIMIT = 2**31 - 1
"""The largest ``maxReplicas``, and KubeRay's default."""

_QUANTITY = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?)([KMGTPE]i|[numkMGTPE])?")
_SUFFIX = {
    **{suffix: Decimal(1000) ** power for power, suffix in zip((-3, -2, -1, 1, 2, 3, 4, 5, 6), "numkMGTPE")},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)},
}


class PodGroup(NamedTuple):
    """A kind of pod. At most ``max_pods`` of it run beside the head; the head's own number is 0."""

    name: str
    resources: Mapping[str, float]
    max_pods: int


@dataclass(frozen=True)
class _Field:
    """A value of the manifest and its dotted place; the value is None where the manifest has none."""

    place: str
    value: object

    def get(self, key: str) -> _Field:
        """Return the field under ``key``."""
        if not isinstance(self.value, dict):
            raise self.error("must be a mapping")
        return _Field(f"{self.place}.{key}", self.value.get(key))

    def section(self, key: str) -> _Field:
        """Return the mapping under ``key``, empty where the manifest has none."""
        field = self.get(key)
        if not isinstance(field.value, dict | None):
            raise field.error("must be a mapping")
        return _Field(field.place, field.value or {})

    def keys(self) -> list[str]:
        """Return the keys of a mapping."""
        return list(self.value) if isinstance(self.value, dict) else []

    def entries(self) -> list[_Field]:
        """Return the entries of a list."""
        if not isinstance(self.value, list):
            raise self.error("must be a list")
        return [_Field(f"{self.place}.{index}", value) for index, value in enumerate(self.value)]

    def whole_number(self, default: int, minimum: int = 0) -> int:
        """Return a whole number, ``default`` where the manifest has none."""
        value = default if self.value is None else self.value
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= NO_LIMIT:
            raise self.error(f"must be a whole number from {minimum} to {NO_LIMIT}")
        return value

    def quantity(self) -> int:
        """Return a quantity in Kubernetes' notation (``4``, ``"500m"``, ``14Gi``), rounded up as Ray does."""
        match = _QUANTITY.fullmatch(str(self.value))
        if match is None or not isinstance(self.value, str | int | float) or isinstance(self.value, bool):
            raise self.error("must be a quantity such as 4, 3500m or 14Gi")
        number, suffix = match.groups()
        return int((Decimal(number) * (_SUFFIX[suffix] if suffix else 1)).to_integral_value(ROUND_CEILING))

    def start_parameter(self) -> int:
        """Return a number among the parameters of `ray start`, which Kubernetes takes as strings only."""
        if not isinstance(self.value, str) or re.fullmatch(r"\d{1,9}", self.value) is None:
            raise self.error('must be a whole number in quotes, e.g. "4"')
        return int(self.value)

    def error(self, fix: str) -> UserError:
        """Build the error that names this place."""
        return UserError(self.place, self.value, f"is missing; {fix}" if self.value is None else fix)


def read_manifests(path: Path) -> list[Mapping[str, object]] | None:
    """Return the documents of a file for Kubernetes, the RayCluster first.

    Returns:
        None if the file is not for Kubernetes or cannot be read (`read_yaml` reports why).

    Raises:
        UserError: the file is for Kubernetes and has no RayCluster.
    """
    try:
        documents = [d for d in parse_documents(read_text_file(path)) if isinstance(d, dict)]
    except (UserError, YamlError):
        return None
    if not any({"apiVersion", "kind"} & document.keys() for document in documents):
        return None
    kinds = [document.get("kind") for document in documents]
    if "RayCluster" not in kinds:
        raise UserError("kind", kinds, "no document of this file is a RayCluster, whose node types are read")
    return [documents.pop(kinds.index("RayCluster")), *documents]


def pod_groups(manifest: Mapping[str, object]) -> list[PodGroup]:
    """Return the groups of a RayCluster, the head's first.

    Raises:
        UserError: names the dotted place of what Ray or Kubernetes would refuse.
    """
    spec = _Field("spec", manifest.get("spec"))
    groups = [PodGroup(HEAD, _resources(spec.get("headGroupSpec")), 0)]
    for group in _worker_groups(spec):
        name = group.get("groupName")
        if not isinstance(name.value, str) or not name.value:
            raise name.error("must be a name")
        if name.value in {other.name for other in groups}:
            raise name.error("is the name of another group")
        min_replicas, max_replicas = group.get("minReplicas").whole_number(0), group.get("maxReplicas")
        if max_replicas.whole_number(NO_LIMIT) < min_replicas:
            raise max_replicas.error(f"must be at least minReplicas ({min_replicas})")
        hosts = group.get("numOfHosts").whole_number(1, minimum=1)
        groups.append(PodGroup(name.value, _resources(group), max_replicas.whole_number(NO_LIMIT) * hosts))
    return groups


def manifest_warnings(manifest: Mapping[str, object]) -> Iterator[str]:
    """Yield what Kubernetes accepts but a reader should change.

    Raises:
        UserError: as `pod_groups`.
    """
    spec = _Field("spec", manifest.get("spec"))
    if spec.section("authOptions").get("mode").value != "token":
        yield "spec.authOptions.mode is not token: anyone who reaches the port can run code"
    autoscales = spec.get("enableInTreeAutoscaling")
    if not isinstance(autoscales.value, bool | None):
        raise autoscales.error("must be true or false")
    for group in _worker_groups(spec):
        if not autoscales.value:
            yield f"{group.place}: no autoscaler (spec.enableInTreeAutoscaling), so only its replicas run"
        elif group.get("maxReplicas").value is None:
            yield f"{group.place} has no maxReplicas: KubeRay's default is {NO_LIMIT}, which limits no bill"


def _worker_groups(spec: _Field) -> list[_Field]:
    groups = spec.get("workerGroupSpecs")
    return [] if groups.value is None else groups.entries()


def _resources(group: _Field) -> dict[str, float]:
    """Return what Ray will see in a pod.

    The group's own resources count first, then its start parameters, the first container's limits, and its requests.
    """
    own, start = group.section("resources"), group.section("rayStartParams")
    containers = group.get("template").get("spec").get("containers")
    if not containers.entries():
        raise containers.error("must list Ray's container first")
    container = containers.entries()[0].section("resources")
    limits, requests = container.section("limits"), container.section("requests")
    counts = {"CPU": _num_cpus(own, start, limits, requests), "GPU": _num_gpus(own, start, limits, requests)}
    return {name: float(count) for name, count in counts.items() if count}


def _num_cpus(own: _Field, start: _Field, limits: _Field, requests: _Field) -> int:
    if own.get("CPU").value is not None:
        return own.get("CPU").quantity()
    if start.get("num-cpus").value is not None:
        return start.get("num-cpus").start_parameter()
    given = next((field.get("cpu") for field in (limits, requests) if field.get("cpu").value is not None), None)
    if given is None:
        raise limits.get("cpu").error("Ray's autoscaler needs it, or requests.cpu, or rayStartParams.num-cpus")
    return given.quantity()


def _num_gpus(own: _Field, start: _Field, limits: _Field, requests: _Field) -> int:
    for name in filter(_is_gpu, requests.keys()):
        if limits.get(name).value is None:
            raise limits.get(name).error("Kubernetes grants GPUs by their limit; a request alone starts no pod")
    if own.get("GPU").value is not None:
        return own.get("GPU").quantity()
    if start.get("num-gpus").value is not None:
        return start.get("num-gpus").start_parameter()
    return next((count for name in filter(_is_gpu, limits.keys()) if (count := limits.get(name).quantity())), 0)


def _is_gpu(name: object) -> bool:
    """Return whether a resource of Kubernetes is a GPU for Ray, e.g. ``nvidia.com/gpu`` or ``amd.com/gpu``."""
    return str(name).endswith("gpu")
