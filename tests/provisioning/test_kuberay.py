"""A RayCluster is read as Ray's own autoscaler reads it; any damage to it, or to cluster.yaml, is one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sylva_ray.config import schema
from sylva_ray.core.errors import UserError

pytest.importorskip("ray")

from sylva_ray.execution.ray.launcher import RayLauncher
from sylva_ray.provisioning import kuberay
from sylva_ray.provisioning.demand import file_lines
from sylva_ray.provisioning.kuberay import HEAD, NO_LIMIT, pod_groups
from sylva_ray.provisioning.launcher_file import LauncherFile, load_launcher_file, load_promised

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy/raycluster.yaml"
WORKER = "spec.workerGroupSpecs.0"
ASKED = f"{WORKER}.template.spec.containers.0.resources"

Change = Callable[[dict[str, Any]], Any]
"""Of the shipped manifest's ``spec``."""


def _group(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["workerGroupSpecs"][0]


def _changed(change: Change) -> dict[str, Any]:
    documents = list(yaml.safe_load_all(MANIFEST.read_text()))
    manifest = copy.deepcopy(next(d for d in documents if d["kind"] == "RayCluster"))
    change(manifest["spec"])
    return manifest


def _asks(group: dict[str, Any], **resources: Any) -> None:
    group["template"]["spec"]["containers"][0]["resources"] = resources


def _load(tmp_path: Path, manifest: dict[str, Any]) -> Any:
    path = tmp_path / "raycluster.yaml"
    path.write_text(json.dumps(manifest))
    return load_launcher_file(path, RayLauncher())


def checked(path: Path) -> LauncherFile:
    """The file, checked as `sylva-ray cluster check` does."""
    return load_launcher_file(path, RayLauncher())


@pytest.mark.parametrize(
    ("change", "resources"),
    [
        (lambda spec: spec, {"CPU": 4, "GPU": 1}),
        (lambda spec: _asks(_group(spec), limits={"cpu": "3500m"}), {"CPU": 4}),
        (lambda spec: _asks(_group(spec), limits={"cpu": 2.5}), {"CPU": 3}),
        (lambda spec: _asks(_group(spec), requests={"cpu": "500m"}), {"CPU": 1}),
        (
            lambda spec: _asks(_group(spec), requests={"cpu": 9}, limits={"cpu": 2, "amd.com/gpu": "2"}),
            {"CPU": 2, "GPU": 2},
        ),
        (lambda spec: _group(spec).update(rayStartParams={"num-cpus": "3", "num-gpus": "0"}), {"CPU": 3}),
        (lambda spec: _group(spec).update(resources={"CPU": "6", "GPU": "2"}), {"CPU": 6, "GPU": 2}),
        (lambda spec: _group(spec).update(numOfHosts=2), {"CPU": 4, "GPU": 1}),
    ],
)
def test_a_pod_holds_what_rays_autoscaler_takes_it_to_hold(change: Change, resources: dict[str, int]) -> None:
    autoscaling = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    manifest = _changed(change)
    head, worker = pod_groups(manifest)
    assert worker.resources == resources
    manifest["metadata"]["namespace"] = "default"
    rays = autoscaling._derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    for group in (head, worker):
        own = rays[group.name]
        assert group.resources == {k: v for k, v in own["resources"].items() if k in ("CPU", "GPU") and v}
        assert group.max_pods == own["max_workers"]
    assert HEAD == autoscaling._HEAD_GROUP_NAME


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda spec: spec.update(authOptions=None), "anyone who reaches the port"),
        (lambda spec: spec.pop("authOptions"), "anyone who reaches the port"),
        (lambda spec: _group(spec).pop("maxReplicas"), str(NO_LIMIT)),
        (lambda spec: spec.update(enableInTreeAutoscaling=False), "no autoscaler"),
    ],
)
def test_what_kubernetes_takes_and_a_reader_should_change_is_said(tmp_path: Path, change: Change, says: str) -> None:
    launcher = _load(tmp_path, _changed(change))
    assert len(launcher.warnings) == 1
    assert says in launcher.warnings[0]
    assert len(launcher.largest_cluster({"small": 1})) <= 100_001  # of two billion


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        (lambda spec: spec.pop("headGroupSpec"), "spec.headGroupSpec", "missing"),
        (lambda spec: spec.update(authOptions="x"), "spec.authOptions", "mapping"),
        (lambda spec: _group(spec).update(groupName=None), f"{WORKER}.groupName", "missing"),
        (lambda spec: _group(spec).update(groupName=["small"]), f"{WORKER}.groupName", "must be a name"),
        (lambda spec: _group(spec).update(groupName=HEAD), f"{WORKER}.groupName", "another group"),
        (lambda spec: _group(spec).update(maxReplicas=-1), f"{WORKER}.maxReplicas", "whole number"),
        (lambda spec: _group(spec).update(minReplicas=5), f"{WORKER}.maxReplicas", "at least minReplicas (5)"),
        (
            lambda spec: _group(spec).update(rayStartParams={"num-cpus": 4}),
            f"{WORKER}.rayStartParams.num-cpus",
            "quotes",
        ),
        (lambda spec: _asks(_group(spec)), f"{ASKED}.limits.cpu", "missing"),
        (lambda spec: _asks(_group(spec), limits={"cpu": "four"}), f"{ASKED}.limits.cpu", "3500m"),
        (
            lambda spec: _asks(_group(spec), requests={"cpu": 4, "nvidia.com/gpu": 1}),
            f"{ASKED}.limits.nvidia.com/gpu",
            "starts no pod",
        ),
        (lambda spec: _group(spec)["template"]["spec"].update(containers=[]), ASKED.rsplit(".", 2)[0], "first"),
    ],
)
def test_damage_is_one_line_that_names_the_place(tmp_path: Path, change: Change, key: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        _load(tmp_path, _changed(change))
    assert caught.value.key == key
    assert says in caught.value.fix


def test_a_file_for_kubernetes_without_a_raycluster_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kind = \['RayJob'\]: no document of this file is a RayCluster"):
        _load(tmp_path, {"apiVersion": "ray.io/v1", "kind": "RayJob"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cluster_name: [", "is not valid YAML"),
        ("cluster_name: a\ncluster_name: b\n", "line 2: the key 'cluster_name' is given twice"),
        ("", "is empty"),
    ],
)
def test_a_file_that_is_no_yaml_is_told_so(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    for load in (checked, load_promised):
        with pytest.raises(UserError, match=says):
            load(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", [MANIFEST, ROOT / "cluster.yaml"])
def test_no_single_damage_is_a_traceback(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key and list entry deleted, and replaced by something else: a launcher file, or a `UserError` of one line.

    The parser is replaced and not fed: it takes most of the time of a load.
    """
    lines: list[str] = []
    num_loaded = num_refused = 0
    for damaged in _damaged(list(yaml.safe_load_all(path.read_text()))):
        monkeypatch.setattr(kuberay, "parse_documents", lambda _, given=damaged: copy.deepcopy(given))
        monkeypatch.setattr(schema, "parse_yaml", lambda _, given=damaged: copy.deepcopy(given)[0])
        for load in (checked, load_promised):
            try:
                launcher = load(path)
            except UserError as error:
                lines.append(str(error))
                num_refused += 1
                continue
            num_loaded += 1
            if launcher is not None:
                lines += file_lines(launcher)
                RayLauncher().nodes_for(launcher, [{"CPU": 1}, {"CPU": 2, "GPU": 1}])
                launcher.largest_cluster({kind.name: 1 for kind in launcher.workers})
    assert not [line for line in lines if "\n" in line]
    assert min(num_loaded, num_refused) > 100


def _damaged(tree: list[Any]) -> Iterator[list[Any]]:
    """Copies of a file's documents with one damage each."""
    for *way, last in _ways(tree):
        values: list[Any] = ["delete", None, [], {}, "x", -1]
        for value in values:
            damaged = _unshared(tree)
            node = damaged
            for key in way:
                node = node[key]
            if value == "delete":
                del node[last]
            else:
                node[last] = value
            if damaged:
                yield damaged


def _unshared(tree: Any) -> Any:
    """A copy without YAML's anchors, so that a damage has one place."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(value) for value in tree] if isinstance(tree, list) else tree


def _ways(tree: Any) -> Iterator[list[Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield [key]
        yield from ([key, *way] for way in _ways(value))
