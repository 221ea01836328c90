"""The plan fits its budget, refuses what cannot fit, and leaves what fits as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import AlgorithmSection, ExperimentConfig
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.config.schema import build
from sylva_ray.config.training import Windows
from sylva_ray.core.errors import UserError
from sylva_ray.federation.client.worker import build_model
from sylva_ray.models.memory import LiveBytes, PassCost, measure_pass, peak_bytes
from sylva_ray.preparation import memory_budget
from sylva_ray.preparation.experiment import Prepared, initial_states, prepare
from sylva_ray.preparation.memory import MemoryPlan, plan_memory, plan_windows
from sylva_ray.preparation.memory_budget import actor_budget, actors_per_node
from sylva_ray.preparation.memory_costs import MemoryCosts, measure_costs
from sylva_ray.preparation.resolve import resolve_config
from tests.conftest import TINY

CPU = torch.device("cpu")

PLANNED = {**TINY["training"], "windows": "auto"}
"""Training whose windows are planned."""


def test_live_bytes_are_those_of_the_tensors_that_exist_at_once() -> None:
    kept = torch.ones(1000)
    with LiveBytes() as counter:
        first = kept + 1  # 4000
        second = first.view(10, 100) * 2  # 4000 more; the view is the same memory
        del first
        third = second + second  # 4000 again, in place of the first
        kept.mul_(2)
    assert (counter.peak, counter.live) == (8000, 8000)
    assert third.sum() == 8000
    assert peak_bytes(lambda: torch.ones(500).relu(), CPU) == 4000


def test_a_pass_costs_a_fixed_part_and_a_part_per_image() -> None:
    weight = torch.ones(64, 64)

    def run(num_images: int) -> None:
        images = torch.ones(num_images, 64)
        copy = weight.clone()
        (images @ copy).sum()

    cost = measure_pass(run, CPU)
    assert cost == PassCost(fixed=64 * 64 * 4 + 4, per_image=2 * 64 * 4)
    assert cost.num_bytes(10) == 16388 + 5120
    assert cost.num_images(16388 + 5120) == 10
    assert cost.num_images(100) == 0


def resolved(**sections: Any) -> ResolvedConfig:
    return resolve_config(build(ExperimentConfig, sections))


def costs(per_image: Mapping[str, int] | None = None, state: int = 1000, image: int = 10) -> MemoryCosts:
    given = dict.fromkeys(Windows.model_fields, 100) | dict(per_image or {})
    return MemoryCosts({name: PassCost(50, value) for name, value in given.items()}, 5000, state, image)


def plan(budget: int, of: MemoryCosts, auto: bool = False, **sections: Any) -> MemoryPlan:
    config = resolved(**sections)
    return plan_memory(config, create_algorithm(config.algorithm), of, budget, base=10_000, auto_cohorts=auto)


def test_what_fits_keeps_the_largest_windows() -> None:
    found = plan(10**9, costs())
    assert found.windows == Windows()
    assert found.peak < 10**9


def test_what_passes_at_once_on_a_cpu_depends_on_the_model_alone() -> None:
    assert plan(10**13, costs({"attack": 93_750_000})).windows == Windows(at_once=8)  # 750 MB / 93.75 MB
    assert plan(10**13, costs({"attack": 10**6})).windows == Windows(at_once=512)  # 750, rounded down
    assert plan(10**13, costs({"attack": 10**9})).windows == Windows(at_once=1)
    assert plan(10**13, costs({"attack": 10**5})).windows == Windows()


def test_a_gpu_takes_what_its_memory_holds_and_a_client_with_batch_statistics_is_whole() -> None:
    config, large = resolved(), costs({"attack": 10**9})
    on_gpu = config.model_copy(update={"training": config.training.model_copy(update={"device": "cuda"})})
    method = create_algorithm(config.algorithm)
    assert plan_memory(on_gpu, method, large, 10**13, base=0).windows == Windows()
    assert plan_memory(config, method, replace(large, couples_images=True), 10**13, base=0).windows == Windows()


def test_budgets_of_4_and_8_gb_compute_vit_base_in_the_same_windows() -> None:
    """The bytes are those measured for ViT-B/16 at 224 px in float32, in a process with a second copy of the model."""
    measured = {"train": 119_100_000, "attack": 78_200_000, "evaluate": 78_300_000, "forward": 7_900_000}
    of = costs(measured | {"walk": 13_900_000}, state=4_700_000, image=602_112)
    sections: dict[str, Any] = {"training": {"cohort_size": 4, "batch_size": 8}, "algorithm": {"name": "fedavg_at"}}
    config = resolved(**sections)
    method = create_algorithm(config.algorithm)
    small, large = (plan_memory(config, method, of, gb * 10**9, base=1_900_000_000).windows for gb in (4, 8))
    assert small.train < large.train, "what is kept depends on the memory"
    for kind in ("train", "attack", "evaluate", "forward", "walk"):
        assert small.of(kind) == large.of(kind) == 8, kind


@pytest.mark.parametrize("budget", [80_000, 100_000, 150_000, 300_000])
def test_no_window_exceeds_the_budget(budget: int) -> None:
    of = costs({"train": 2000, "attack": 900, "walk": 30})
    found = plan(budget, of, training={"cohort_size": 2, "batch_size": 4}, algorithm={"name": "fedavg_at"})
    assert found.peak <= 0.9 * budget
    for name, count in found.windows.model_dump().items():
        assert found.base + found.held + of.passes[name].num_bytes(count) <= 0.9 * budget
        assert count == 2048 or of.passes[name].num_bytes(2 * count) > 0.9 * budget - found.base - found.held


def test_a_cohort_of_automatic_size_shrinks_to_what_its_states_need() -> None:
    full_model = costs(state=10**6)
    sections: dict[str, Any] = {"partition": {"num_clients": 16}, "training": {"batch_size": 4}}
    assert plan(10**9, full_model, auto=True, **sections).cohort_size == 8
    found = plan(10**8, full_model, auto=True, **sections)
    assert found.cohort_size == 4
    assert found.held <= 0.5 * (0.9 * 10**8)


def test_what_is_needed_is_enough_for_the_costliest_pass() -> None:
    of = costs({"forward": 10**6, "attack": 10**8, "train": 3 * 10**8})
    with pytest.raises(UserError, match=r"at least 334 MB .* one image \(train\) 300 MB"):
        plan(10**6, of, training={"cohort_size": 1}, algorithm={"name": "fedavg_at"})
    assert plan(334 * 10**6, of, training={"cohort_size": 1}, algorithm={"name": "fedavg_at"}).windows.train == 1


def test_a_budget_below_one_image_is_refused_with_what_is_needed() -> None:
    with pytest.raises(UserError, match=r"cluster\.memory_per_actor.*too small: at least .* is needed \(process"):
        plan(12_000, costs(), algorithm={"name": "fedavg_at"})
    with pytest.raises(UserError, match=r"a smaller training\.cohort_size would fit"):
        plan(100_000, costs(state=2000), training={"cohort_size": 8, "batch_size": 1}, algorithm={"name": "fedavg_at"})


def test_a_budget_is_what_there_is_divided_among_the_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "node_memory", lambda: 16 * 10**9)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert actor_budget(resolved(cluster={"pool": "in_process"})) == 12 * 10**9
    assert actor_budget(resolved(partition={"num_clients": 40})) == 3 * 10**9
    assert actors_per_node(resolved(partition={"num_clients": 40}, cluster={"cpus_per_actor": 2})) == 2
    assert actors_per_node(resolved(cluster={"num_actors": 3})) == 3
    assert actor_budget(resolved(cluster={"memory_per_actor": "5 GB"})) == 5 * 10**9
    with pytest.raises(UserError, match=r"cluster.memory_per_actor = '17.00 GB': this machine has 16.00 GB"):
        actor_budget(resolved(cluster={"memory_per_actor": "17 GB"}))


def test_the_share_of_a_card_bounds_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (20 * 10**9, 24 * 10**9))
    assert actor_budget(resolved(cluster={"gpus_per_actor": 1})) == 18 * 10**9
    assert actor_budget(resolved(cluster={"gpus_per_actor": 0.25})) == round(0.9 * 6 * 10**9)
    assert actor_budget(resolved(cluster={"gpus_per_actor": 0.25, "memory_per_actor": "5 GB"})) == 5 * 10**9
    with pytest.raises(UserError, match=r"share \(cluster.gpus_per_actor\) of this GPU is 6.00 GB"):
        actor_budget(resolved(cluster={"gpus_per_actor": 0.25, "memory_per_actor": "8 GB"}))


def test_prepared_experiments_have_windows_and_keep_those_they_are_given(tiny: Prepared) -> None:
    assert tiny.config.training.windows == Windows()
    sections = TINY | {"training": TINY["training"] | {"windows": {"train": 7}}}
    assert prepare(build(ExperimentConfig, sections)).config.training.windows == Windows(train=7)


def test_a_small_budget_makes_small_windows_and_a_smaller_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sylva_ray.preparation.memory.resident_bytes", lambda: 1_000_000_000)  # of a fresh process

    def windows(budget: str) -> Windows:
        sections = {"cluster": TINY["cluster"] | {"memory_per_actor": budget}, "training": PLANNED}
        return prepare(build(ExperimentConfig, TINY | sections)).config.training.windows

    large, small = windows("4 GB"), windows("1.9 GB")
    assert small.train < large.train
    assert small.walk <= large.walk
    with pytest.raises(UserError, match="too small: at least"):
        windows("50 MB")


def test_a_device_without_room_for_the_measurement_is_refused(monkeypatch: pytest.MonkeyPatch, tiny: Prepared) -> None:
    def full(*_: object) -> MemoryCosts:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr("sylva_ray.preparation.memory.measure_costs", full)
    asked = resolved(cluster={"memory_per_actor": "2 GB"})
    auto = build(ExperimentConfig, {"cluster": {"memory_per_actor": "2 GB"}})
    method = create_algorithm(asked.algorithm)
    with pytest.raises(UserError, match=r"memory_per_actor = '2.00 GB': is used up by a few images \(CUDA out of mem"):
        plan_windows(auto, asked, method, None, [{}], tiny.fleet)  # type: ignore[arg-type]


def test_every_pass_with_gradients_keeps_activations(tiny: Prepared) -> None:
    """An attack on images that are misclassified already would compute nothing, and seem to need nothing."""
    config = tiny.config
    algorithm = create_algorithm(config.algorithm)
    model = build_model(algorithm, config, 10, tiny.backbone)
    states = initial_states(algorithm, model, config, 10, tiny.backbone)
    passes = measure_costs(config, algorithm, model, states[0], 32).passes
    assert passes["forward"].per_image < passes["walk"].per_image < passes["attack"].per_image
    assert passes["attack"].per_image <= passes["evaluate"].per_image < 2 * passes["attack"].per_image
    assert passes["attack"].per_image < passes["train"].per_image


def test_a_batch_that_cannot_be_divided_is_refused_or_fits_as_a_whole() -> None:
    sections: dict[str, Any] = {
        "training": {"cohort_size": 1, "batch_size": 21},
        "algorithm": {"name": "fedavg_at", "model": "full"},
    }
    coupled = replace(costs({"train": 2000}), couples_images=True)
    held = plan(10**6, coupled, **sections).held
    exactly = int((10_000 + held + 50 + 21 * 2000 + 2000) / 0.9) + 1
    assert plan(exactly, coupled, **sections).windows.train == 21, "not rounded down to 16"
    with pytest.raises(UserError, match=r"training\.batch_size = 21: the images of a batch cannot be divided.*20 fit"):
        plan(exactly - 3000, coupled, **sections)


def test_coalitions_are_counted_where_they_are_evaluated(tiny: Prepared) -> None:
    def names(**algorithm: Any) -> set[str]:
        config = tiny.config.model_copy(update={"algorithm": AlgorithmSection.model_validate(algorithm)})
        method = create_algorithm(config.algorithm)
        model = build_model(method, config, 10, tiny.backbone)
        states = initial_states(method, model, config, 10, tiny.backbone)
        return set(measure_costs(config, method, model, states[0], 32).passes)

    assert "walk" in names(name="sylva")
    assert "walk" not in names(name="lorica")  # its gates evaluate none
    assert "walk" not in names(name="fedavg_at", model="full")
