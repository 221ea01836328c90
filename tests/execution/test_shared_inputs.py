"""Trials with the same data set and backbone share one copy of them in the object store, and compute the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.preparation.experiment import Prepared, create_worker
from tests.execution.test_ray_pool import assert_same_bits, states

ray = pytest.importorskip("ray")

from sylva_ray.execution.ray.pool import RayPool  # noqa: E402
from sylva_ray.execution.ray.shared_inputs import FleetReference, put_inputs, share_inputs  # noqa: E402


def dataset_of(inputs: object) -> object:
    """The reference to the images in what was put."""
    fleet = ray.get(inputs.fleet)  # type: ignore[attr-defined]
    assert isinstance(fleet, FleetReference)
    return fleet.dataset


def test_equal_inputs_are_put_once_and_others_are_not(local_ray: None, on_ray: Prepared) -> None:  # noqa: ARG001
    shared = share_inputs()
    fleet = on_ray.fleet
    divided = dataclasses.replace(on_ray, fleet=dataclasses.replace(fleet, clients=fleet.clients[::-1]))
    relabelled = dataclasses.replace(fleet.dataset, class_names=tuple("abcdefghij"))
    other = dataclasses.replace(on_ray, fleet=dataclasses.replace(fleet, dataset=relabelled))
    first, second, third = (put_inputs(prepared, shared) for prepared in (on_ray, divided, other))
    assert dataset_of(first) == dataset_of(second) != dataset_of(third)
    assert first.backbone == second.backbone == third.backbone
    assert ray.get(second.fleet).clients[0].train.tolist() == fleet.clients[-1].train.tolist()
    assert [key.split("/")[0] for key in ray.get(shared.keys.remote())] == ["data", "backbone", "data"]


def test_without_the_process_that_shares_everybody_puts_its_own(local_ray: None, on_ray: Prepared) -> None:  # noqa: ARG001
    lost = share_inputs()
    ray.kill(lost)
    alone = put_inputs(on_ray, lost)
    assert ray.get(alone.fleet).num_clients == on_ray.fleet.num_clients


@pytest.mark.long
def test_tasks_on_shared_inputs_give_the_same_bits(
    local_ray: None,  # noqa: ARG001
    tiny: Prepared,
    on_ray: Prepared,
    train_task: Callable[..., CohortTask],
) -> None:
    shared = share_inputs()  # it ends with its handle
    inputs = put_inputs(on_ray, shared)
    pool = RayPool(on_ray.config, inputs.fleet, inputs.backbone, 1, Observer())
    try:
        found = pool.run([train_task((0, 2))])
    finally:
        pool.close()
    expected = InProcessPool(create_worker(tiny.config, tiny.fleet, tiny.backbone)).run([train_task((0, 2))])
    assert_same_bits(states(found), states(expected))
