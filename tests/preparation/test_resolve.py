"""Every ``auto`` becomes a value, and the type of what computes says so."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from pydantic import BaseModel

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.config.schema import build
from sylva_ray.config.stored import CHOICES
from sylva_ray.config.training import AttentionKernels
from sylva_ray.core.errors import UserError
from sylva_ray.preparation.assumptions import assumptions
from sylva_ray.preparation.resolve import resolve_cohort_size, resolve_config, resolve_trial, resolve_trial_device


def config(**sections: Any) -> ExperimentConfig:
    """An experiment with these sections."""
    return build(ExperimentConfig, sections)


def literals(annotation: Any) -> set[str]:
    """The texts among the values that an annotation allows."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*(literals(part) for part in get_args(annotation)))


def keys_that_may_be_auto(schema: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted keys of a configuration that accept ``auto``."""
    found: set[str] = set()
    for key, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys_that_may_be_auto(field.annotation, f"{prefix}{key}.")
        elif "auto" in literals(field.annotation):
            found.add(prefix + key)
    return found


def test_the_types_of_a_resolved_config_have_no_auto_but_the_number_of_actors() -> None:
    undecided = {"cluster.num_actors", "cluster.memory_per_actor"}
    assert keys_that_may_be_auto(ExperimentConfig) == undecided | {f"{section}.{key}" for section, key in CHOICES}
    assert keys_that_may_be_auto(ResolvedConfig) == undecided


def test_a_resolved_config_writes_the_same_keys_in_the_same_order() -> None:
    asked = config(algorithm={"name": "sylva", "num_neighbours": 3}, evaluation={"attacks": [{"name": "fgsm"}]})
    resolved = resolve_config(asked)
    written = yaml.safe_load(resolved.to_yaml()), yaml.safe_load(asked.to_yaml())
    assert [list(config) for config in written] == [list(asked.model_dump())] * 2
    assert [list(config["training"]) for config in written] == [list(asked.training.model_dump())] * 2
    for kept in ("algorithm", "dataset", "attack", "cluster", "tracking"):
        assert written[0][kept] == written[1][kept]
    assert build(ExperimentConfig, resolved.model_dump(mode="json")).to_yaml() == resolved.to_yaml()


def test_what_is_not_measured_is_float32_and_fused() -> None:
    training = resolve_config(config()).training
    assert (training.precision, training.attention, training.device) == ("float32", AttentionKernels(), "cpu")
    plain = resolve_config(config(training={"attention": "plain", "precision": "bfloat16"}))
    assert plain.training.attention == AttentionKernels(float32="plain", bfloat16="plain")
    assert (plain.training.precision, plain.evaluation.precision) == ("bfloat16", "float32")


@pytest.mark.parametrize(("clients", "size"), [(1, 1), (6, 3), (10, 5), (16, 8), (17, 5), (100, 8)])
def test_auto_cohorts_come_in_even_numbers_and_are_small(clients: int, size: int) -> None:
    assert resolve_cohort_size(config(partition={"num_clients": clients})) == size


@pytest.mark.parametrize(
    ("cluster", "has_gpu", "device"),
    [
        ({"pool": "in_process"}, True, "cuda"),
        ({"pool": "in_process"}, False, "cpu"),
        ({"gpus_per_actor": 0}, True, "cpu"),
        ({"gpus_per_actor": 1}, True, "cuda"),
        ({"gpus_per_actor": 1}, False, "cpu"),
        ({"gpus_per_actor": 1, "address": "auto"}, False, "cuda"),  # the workers' GPU; the head has none
    ],
)
def test_a_device_of_auto_is_a_gpu_where_actors_ask_for_one(
    monkeypatch: pytest.MonkeyPatch, cluster: dict[str, Any], has_gpu: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert resolve_config(config(cluster=cluster)).training.device == device


def test_a_gpu_that_this_machine_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.device.*cuda.*use cpu or auto"):
        resolve_config(config(training={"device": "cuda"}))


def test_what_is_assumed_of_the_gpus_of_other_machines_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def said(cluster: dict[str, Any] | None = None, training: dict[str, Any] | None = None) -> str:
        on_workers = {"address": "auto", "gpus_per_actor": 1} | (cluster or {})
        asked = config(cluster=on_workers, training=training or {}, evaluation={"precision": "bfloat16"})
        return "; ".join(assumptions(asked, resolve_config(asked)))

    memory, precision = (
        "planned for cards with 22 GiB.*cluster.memory_per_actor",
        "training.precision = auto became float",
    )
    assert re.search(f"{memory}.*{precision}", said())
    assert re.search(memory, said(training={"precision": "bfloat16"}))
    assert not re.search(memory, said({"memory_per_actor": "40 GB"}))
    assert said({"memory_per_actor": "40 GB"}, {"precision": "bfloat16"}) == ""
    assert said({"gpus_per_actor": 0}) == "", "on CPUs this machine is measured"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert said() == ""


def test_a_trial_computes_on_the_cpu_unless_its_actors_reserve_gpus() -> None:
    alone = resolve_trial(config())
    assert (alone.training.device, alone.cluster.num_actors, alone.training.cohort_size) == ("cpu", 1, 5)
    with_gpu = resolve_trial(config(cluster={"gpus_per_actor": 0.5, "num_actors": 9}))
    assert (with_gpu.training.device, with_gpu.cluster.num_actors) == ("auto", 2)  # two cohorts
    assert resolve_trial_device(with_gpu).training.device == "cuda"
    assert resolve_trial_device(alone) is alone
