"""Predictions on disk, and paired comparisons made from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sylva_ray.core.errors import UserError
from sylva_ray.metrics.predictions import paired_difference, read_correct, write_predictions
from sylva_ray.storage.run_folder import RunFolder


def test_what_was_written_comes_back_per_client_and_condition(tmp_path: Path) -> None:
    labels = [np.array([0, 1, 2]), np.array([1, 1])]
    answers = [{"benign": np.array([0, 1, 1]), "pgd20-eps4": np.array([3, 1, 1])}, {"benign": np.array([1, 0])}]
    answers[1]["pgd20-eps4"] = np.array([0, 0])
    folder = RunFolder(tmp_path)
    write_predictions(folder, answers, labels)
    assert [own.tolist() for own in read_correct(folder, "benign")] == [[True, True, False], [True, False]]
    assert [own.tolist() for own in read_correct(folder, "pgd20-eps4")] == [[False, True, False], [False, False]]
    with pytest.raises(UserError, match="available: benign, pgd20-eps4"):
        read_correct(folder, "pgd50-eps4")
    with pytest.raises(UserError, match="not finished"):
        read_correct(RunFolder(tmp_path / "nothing"), "benign")


def test_equal_predictions_differ_by_nothing() -> None:
    own = [[np.array([True, False, True])], [np.array([False, False])]]
    assert paired_difference(own, own, np.random.default_rng(0)) == (0.0, 0.0, 0.0)


def test_the_difference_is_the_mean_over_clients_not_over_images() -> None:
    first = [[np.ones(10, bool), np.ones(90, bool)]]
    second = [[np.zeros(10, bool), np.ones(90, bool)]]
    assert paired_difference(first, second, np.random.default_rng(0))[0] == pytest.approx(0.5)


def test_one_seeds_bounds_are_those_of_the_normal_approximation() -> None:
    rng = np.random.default_rng(1)
    gap = rng.choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=2000)
    first, second = [[gap > 0]], [[gap < 0]]
    difference, low, high = paired_difference(first, second, rng, confidence=0.9)
    error = gap.std() / np.sqrt(len(gap))
    assert difference == pytest.approx(gap.mean())
    assert low == pytest.approx(difference - 1.645 * error, abs=0.1 * error)
    assert high == pytest.approx(difference + 1.645 * error, abs=0.1 * error)


def test_disagreeing_seeds_widen_the_bounds() -> None:
    right, wrong = [np.ones(200, bool)], [np.zeros(200, bool)]
    agreeing = paired_difference([right, right], [right, right], np.random.default_rng(0))
    disagreeing = paired_difference([right, wrong], [wrong, right], np.random.default_rng(0))
    assert agreeing[1:] == (0.0, 0.0)
    assert disagreeing[1] < -0.9
    assert disagreeing[2] > 0.9
