"""Parameters of methods: what is given in part, and what has no effect."""

from __future__ import annotations

import pytest

from sylva_ray.algorithms.registry import ALGORITHMS, create_algorithm
from sylva_ray.config.experiment import AlgorithmSection
from sylva_ray.config.recipes import recipe_or_path
from sylva_ray.config.schema import read_overridden
from sylva_ray.core.errors import UserError
from sylva_ray.federation.contract import Algorithm
from sylva_ray.federation.parameters import unused_settings


def method(name: str, **parameters: object) -> Algorithm:
    return create_algorithm(AlgorithmSection(name=name, **parameters))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_section_given_in_part_keeps_the_methods_own_defaults(name: str) -> None:
    """E.g. Lorica ranks layers by gates, and FedAvg-AT has no phase 2, whatever else a recipe says of it."""
    default = method(name).parameters
    given = method(name, phase2={"gate_steps": 7}, mixture={"attack_steps": 3}).parameters
    assert given.phase2 == default.phase2.model_copy(update={"gate_steps": 7})
    assert given.mixture == default.mixture.model_copy(update={"attack_steps": 3})


def test_what_is_given_counts() -> None:
    assert method("lorica", phase2={"selection": "all"}).parameters.phase2.selection == "all"
    assert not method("sylva", phase2={"enabled": False}).parameters.phase2.enabled


def test_settings_of_a_phase_that_is_off_are_named() -> None:
    made = method("fedavg_at", phase2={"attack_steps": 3, "max_images": 16})
    (line,) = unused_settings("fedavg_at", made.parameters)
    assert line == (
        "fedavg_at does not use attack_steps, max_images of algorithm.phase2, unless algorithm.phase2.enabled=true"
    )
    assert not unused_settings("sylva", method("sylva", phase2={"attack_steps": 3}).parameters)
    assert not unused_settings("fedavg_at", method("fedavg_at").parameters)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_takes_the_place_of_the_one_in_a_recipe(name: str) -> None:
    raw = read_overridden(recipe_or_path("CONFIG", "digits", "experiment"), [f"algorithm.name={name}"])
    create_algorithm(AlgorithmSection(**raw["algorithm"]))


def test_settings_without_effect_beside_others_are_named() -> None:
    def lines(name: str, **parameters: object) -> list[str]:
        return unused_settings(name, method(name, **parameters).parameters)

    assert "no" not in "".join(lines("sylva"))
    assert "there are none" in lines("sylva", final_local_epochs=0)[0]
    assert "shares neither" in lines("per_lora", mixture={"enabled": True}, final_local_epochs=1)[0]
    assert "weighs all clients alike" in lines("fedavg_at", robust={"rule": "krum"}, weighting="uniform")[0]


@pytest.mark.parametrize("name", ["ffa_lora_at", "fedsa_lora_at", "fedit_at", "sylva_paper_like"])
def test_a_method_about_factors_does_not_train_whole_models(name: str) -> None:
    with pytest.raises(UserError, match=r"algorithm\.model = 'full'"):
        method(name, model="full", phase2={"enabled": False}, mixture={"enabled": False})


def test_a_rule_that_ignores_weights_does_not_go_with_the_method_of_weights() -> None:
    with pytest.raises(UserError, match="use only mean"):
        method("sfat", robust={"rule": "krum"})
