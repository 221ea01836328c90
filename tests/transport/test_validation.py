"""Uploads are checked once, at the border: names, shapes, finite entries, norms against the fleet's."""

from __future__ import annotations

import numpy as np
import pytest

from sylva_ray.core.types import ClientState
from sylva_ray.transport.validation import MAX_NORM_RATIO, validate_uploads

NAMES = ("head", "m.lora_A")


def start() -> dict[str, np.ndarray]:
    return {"head": np.zeros(3, np.float32), "m.lora_A": np.ones((2, 4), np.float32), "kept at home": np.ones(2)}


def moved_by(norm: float) -> dict[str, np.ndarray]:
    """An upload whose update has this norm."""
    received = start()
    return {"head": np.array([norm, 0, 0], np.float32), "m.lora_A": received["m.lora_A"]}


def check(*uploads: ClientState) -> tuple[list[int], dict[int, str]]:
    clients = range(len(uploads))
    accepted, refused = validate_uploads(
        dict(zip(clients, uploads, strict=True)), [start() for _ in clients], dict.fromkeys(clients, NAMES)
    )
    return list(accepted), refused


def test_honest_uploads_pass_however_different_they_are() -> None:
    uploads = [moved_by(norm) for norm in (0.0, 0.01, 1.0, 3.0, 0.99 * MAX_NORM_RATIO)]
    assert check(*uploads) == ([0, 1, 2, 3, 4], {})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_an_upload_with_one_entry_that_is_not_finite_is_refused(bad: float, name: str) -> None:
    broken = moved_by(1)
    broken[name] = broken[name].copy()
    broken[name].flat[1] = bad
    assert check(moved_by(1), broken, moved_by(2)) == ([0, 2], {1: "not finite"})


@pytest.mark.parametrize("norm", [1.01 * MAX_NORM_RATIO, 1e18, 1e30, 3e38])
def test_an_update_far_above_the_median_is_refused(norm: float) -> None:
    """Also where its square overflows in float32, and where the other client is the only one to compare with."""
    accepted, refused = check(moved_by(1), moved_by(1), moved_by(norm))
    assert accepted == [0, 1]
    assert refused == {2: "the norm of the update exceeds 1,000 times the median"}
    assert check(moved_by(norm), moved_by(1))[0] == [1]


def test_where_nobody_moved_the_received_arrays_are_the_scale() -> None:
    """The norm of the arrays that travel is sqrt(8) there."""
    assert check(*[moved_by(0)] * 3, moved_by(2.8 * MAX_NORM_RATIO))[0] == [0, 1, 2, 3]
    assert check(*[moved_by(0)] * 3, moved_by(2.9 * MAX_NORM_RATIO))[0] == [0, 1, 2]


def test_other_arrays_than_the_expected_ones_are_named() -> None:
    good = moved_by(1)
    short = {"head": good["head"]}
    odd = good | {"m.lora_A": np.ones((3, 4), np.float32)}
    surplus = good | {"kept at home": np.ones(2)}
    assert check(good, short, odd, surplus)[1] == {
        1: "m.lora_A is missing",
        2: "m.lora_A has shape [3, 4], not [2, 4]",
        3: "kept at home was not asked for",
    }


def test_without_uploads_there_is_nothing_to_refuse() -> None:
    assert check() == ([], {})


@pytest.mark.parametrize("count", [1, 2, 3])
def test_huge_updates_are_refused_where_they_are_the_majority(count: int) -> None:
    """Every upload is its own median then; they are compared with what the clients received."""
    accepted, refused = check(*[moved_by(1e30)] * count, moved_by(1))
    assert accepted == [count]
    assert set(refused) == set(range(count))
    assert check(moved_by(1e30))[0] == []


@pytest.mark.parametrize("dtype", ["complex64", "int64", "bool", "object"])
def test_an_upload_of_another_kind_of_number_is_refused(dtype: str) -> None:
    other = moved_by(1)
    name = sorted(other)[0]
    other[name] = np.zeros(other[name].shape, dtype)
    assert check(moved_by(1), other)[1] == {1: f"{name} has dtype {dtype}, not a float"}
