"""A check fails only where a difference is more than chance on so few images; what was measured is said either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sylva_ray.core.summary import CheckResult
from sylva_ray.metrics import checks
from sylva_ray.metrics.intervals import effective_images

FEW, MANY = [9, 9], [100, 100]
NUM_FEW, NUM_MANY = 18, 200

DIFFERENCES: dict[str, Callable[[float, list[int]], CheckResult]] = {
    "S3": lambda gap, images: checks.falls_with_epsilon({0.0: 0.5, 1 / 255: 0.5 + gap}, images),
    "S5 rises": lambda gap, images: checks.falls_with_steps({50.0: 0.5, 200.0: 0.5 + gap}, images),
    "S5 drops": lambda gap, images: checks.falls_with_steps({50.0: 0.5, 200.0: 0.5 - gap}, images),
    "S6": lambda gap, images: checks.iterative_beats_single(0.5 + gap, 0.5, images),
    "S7": lambda gap, images: checks.restarts_add_little(0.5, 0.5 - gap, images),
    "S8": lambda gap, images: checks.black_box_is_weaker(0.5, {"square": 0.5 - gap}, images),
    "S9": lambda gap, images: checks.noise_is_harmless(
        0.5 - gap, 0.5 - 1.5 * gap, 0.5, images
    ),  # beyond half of what the attack breaks
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_needs_five_images(name: str) -> None:
    check = DIFFERENCES[name]
    assert check(0.0, FEW).passed
    assert "may be chance" not in check(0.0, FEW).meaning
    one = check(1 / NUM_FEW, FEW)
    assert one.passed, one.meaning
    assert "fewer than 5 of 18 images, which may be chance" in one.meaning
    five = check(5 / NUM_FEW, FEW)
    assert not five.passed
    assert "may be chance" not in five.meaning
    assert check(4 / NUM_MANY, MANY).passed
    assert not check(5 / NUM_MANY, MANY).passed, "of 200 images, 5 are above every margin"


def test_many_small_rises_are_a_large_one() -> None:
    images = [5000, 5000]
    curve = {0.0: 0.5} | {n / 255: 0.44 + 0.009 * n for n in range(1, 7)}
    result = checks.falls_with_epsilon(curve, images)
    assert not result.passed
    assert result.value == pytest.approx(0.045)
    assert not checks.falls_with_steps({2.0**n: 0.4 + 0.009 * n for n in range(5)}, images).passed
    assert checks.falls_with_epsilon({0.0: 0.5, 1 / 255: 0.3, 2 / 255: 0.305, 3 / 255: 0.3}, images).passed


def test_logits_that_are_no_numbers_fail() -> None:
    result = checks.gradients_are_useful(0.0, 1.0, float("nan"), 0.0, MANY)
    assert not result.passed
    assert result.meaning == "logits are not numbers"


def test_with_many_images_the_margins_decide() -> None:
    images = [5000, 5000]
    assert checks.falls_with_epsilon({0.0: 0.5, 1 / 255: 0.509}, images).passed
    assert not checks.falls_with_epsilon({0.0: 0.5, 1 / 255: 0.511}, images).passed
    assert checks.iterative_beats_single(0.5019, 0.5, images).passed
    assert not checks.iterative_beats_single(0.5021, 0.5, images).passed


@pytest.mark.parametrize(
    "check",
    [
        lambda rate, images: checks.gradients_are_useful(0.0, rate, 0.0, 0.0, images),
        lambda rate, images: checks.planted_points_are_found(1.0, rate, 0.1, images),
    ],
    ids=["S10", "S13"],
)
def test_a_share_of_95_percent_is_judged_by_its_interval(check: Callable[[float, Any], CheckResult]) -> None:
    one_missing = check(17 / 18, FEW)
    assert one_missing.passed, "one image of 18"
    assert "the error of so few images (18)" in one_missing.meaning
    assert "so few" not in check(1.0, FEW).meaning
    assert not check(10 / 18, FEW).passed
    assert not check(0.9, [500, 500]).passed
    assert check(0.96, [500, 500]).passed


def test_clients_with_few_images_make_a_mean_less_certain() -> None:
    """Each client counts the same, so one of 2 images weighs as much as one of 98."""
    assert effective_images([2, 98]) < 8
    assert checks.iterative_beats_single(0.55, 0.5, [2, 98]).passed
    assert not checks.iterative_beats_single(0.55, 0.5, [50, 50]).passed


def test_points_that_random_search_finds_say_nothing() -> None:
    easy = checks.planted_points_are_found(1.0, 1.0, 0.9, MANY)
    assert not easy.passed
    assert "random corners find 90.0%" in easy.meaning
    assert checks.planted_points_are_found(1.0, 1.0, 0.4, MANY).passed
    assert checks.planted_points_are_found(1.0, 1.0, 0.6, [10]).passed, "10 images do not tell 0.6 from 0.5"
    assert "on 25.0% of the images" in checks.planted_points_are_found(0.25, 0.25, 0.0, MANY).meaning


def test_an_attack_that_breaks_nothing_says_nothing_about_noise() -> None:
    assert "says nothing" in checks.noise_is_harmless(0.8, 0.8, 0.8, MANY).meaning
    assert "says nothing" not in checks.noise_is_harmless(0.5, 0.79, 0.8, MANY).meaning
