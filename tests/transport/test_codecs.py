"""Codecs: how wrong an entry can be, how many bytes travel, and that error feedback loses nothing in the long run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sylva_ray.core.types import ClientState, state_bytes
from sylva_ray.transport.codecs import (
    MIN_STEP,
    BlockQuantizer,
    Codec,
    TopK,
    array_shapes,
    create_codec,
    file_content,
)
from sylva_ray.transport.compression import transmit

pytestmark = pytest.mark.filterwarnings("error")  # no division by 0, no invalid cast

CODECS = {
    "none": create_codec("none"),
    "int8": create_codec("int8"),
    "int4": create_codec("int4"),
    "int4-block5": BlockQuantizer(4, block=5),
    "topk": create_codec("topk", fraction=0.1),
}
LOSSY = {name: codec for name, codec in CODECS.items() if name != "none"}
QUANTIZERS = {name: codec for name, codec in CODECS.items() if isinstance(codec, BlockQuantizer)}

SHAPES = {
    "blocks.0.qkv.lora_B": (21, 8),
    "blocks.0.qkv.lora_A": (8, 13),
    "head.weight": (3, 7),
    "head.bias": (3,),
    "empty": (0, 5),
    "scalar": (),
}

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
lossy = pytest.mark.parametrize("codec", LOSSY.values(), ids=LOSSY)
quantizers = pytest.mark.parametrize("codec", QUANTIZERS.values(), ids=QUANTIZERS)

finite_arrays = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=20),
    elements=st.floats(-(2.0**126), 2.0**126, width=32),
)


def update(
    seed: int = 0, scale: float = 1.0, shapes: Mapping[str, tuple[int, ...]] = SHAPES, dtype: npt.DTypeLike = np.float32
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(scale * rng.normal(size=shape) * 10 ** rng.uniform(-3, 0)).astype(dtype)
        for name, shape in shapes.items()
    }


def roundtrip(codec: Codec, state: ClientState) -> dict[str, np.ndarray]:
    return codec.decode(codec.encode(state), array_shapes(state))


def flat(state: ClientState) -> np.ndarray:
    return np.concatenate([np.ravel(state[name]).astype(np.float64) for name in sorted(state)])


def norm(state: ClientState) -> float:
    return float(np.linalg.norm(flat(state)))


def blocks(values: np.ndarray, size: int) -> list[np.ndarray]:
    values = np.ravel(values).astype(np.float64)
    return [values[i : i + size] for i in range(0, len(values), size)]


@codecs
@settings(max_examples=60, deadline=None)
@given(first=finite_arrays, second=finite_arrays)
def test_what_arrives_has_the_shapes_and_bytes_that_were_declared(
    codec: Codec, first: np.ndarray, second: np.ndarray
) -> None:
    state = {"b": first, "a": second}
    wire, decoded = codec.encode(state), roundtrip(codec, state)
    assert {name: (value.dtype, value.shape) for name, value in decoded.items()} == {
        name: (np.dtype(np.float32), value.shape) for name, value in state.items()
    }
    assert list(decoded) == list(state)
    assert codec.num_bytes(array_shapes(state)) == sum(value.nbytes for value in wire.values())


@codecs
@pytest.mark.parametrize("shapes", [{}, {"e": (0,)}, {"s": ()}, {"odd": (63,)}, {"x": (65,), "y": (1, 1)}, SHAPES])
def test_empty_scalar_and_odd_updates(codec: Codec, shapes: dict[str, tuple[int, ...]]) -> None:
    state = update(shapes=shapes)
    assert array_shapes(roundtrip(codec, state)) == shapes
    assert codec.num_bytes(shapes) == sum(value.nbytes for value in codec.encode(state).values())
    assert len(file_content(codec.encode(state))) >= codec.num_bytes(shapes)


@pytest.mark.parametrize("residual", [None, {}, {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}])
def test_without_a_codec_the_bits_stay(residual: ClientState | None) -> None:
    state = update()
    state["head.bias"] = np.array([-0.0, 1e-45, 3e38], np.float32)
    sent = transmit(CODECS["none"], state, residual)
    assert {name: value.tobytes() for name, value in sent.decoded.items()} == {
        name: value.tobytes() for name, value in state.items()
    }
    assert residual is None or (sent.residual is not None and not flat(sent.residual).any())


@quantizers
@settings(max_examples=100, deadline=None)
@given(array=finite_arrays)
def test_an_entry_is_wrong_by_half_a_step_at_most(codec: BlockQuantizer, array: np.ndarray) -> None:
    decoded = roundtrip(codec, {"x": array})["x"]
    for sent, meant in zip(blocks(decoded, codec.block), blocks(array, codec.block), strict=True):
        step = max(np.abs(meant).max() / codec.levels, MIN_STEP)
        assert np.abs(sent - meant).max() <= step * (1 + 1 / 257) * (1 + 1e-7) / 2


@quantizers
@settings(max_examples=100, deadline=None)
@given(array=finite_arrays)
def test_coding_what_was_decoded_changes_nothing(codec: BlockQuantizer, array: np.ndarray) -> None:
    once = roundtrip(codec, {"x": array})
    assert roundtrip(codec, once)["x"].tobytes() == once["x"].tobytes()


@lossy
def test_coding_a_whole_update_twice_changes_nothing(codec: Codec) -> None:
    once = roundtrip(codec, update())
    np.testing.assert_array_equal(flat(roundtrip(codec, once)), flat(once))


@quantizers
@pytest.mark.parametrize("exponent", [-42, -38, -30, -20, -8, -3, 0, 20, 37])
def test_steps_neither_vanish_nor_overflow(codec: BlockQuantizer, exponent: int) -> None:
    x = (np.random.default_rng(1).uniform(-1, 1, 200) * 10.0**exponent).astype(np.float32)
    decoded = roundtrip(codec, {"x": x})["x"]
    assert np.isfinite(decoded).all()
    if exponent >= -30:
        assert np.linalg.norm(decoded.astype(np.float64) - x) < np.linalg.norm(x.astype(np.float64)) / codec.levels
    else:
        assert np.abs(decoded - x).max() <= max(10.0**exponent / codec.levels, MIN_STEP)


@codecs
def test_zeros_arrive_as_zeros(codec: Codec) -> None:
    state = {"x": np.zeros(130, np.float32), "y": np.array([0.0, 1.0, -2.0], np.float32)}
    decoded = roundtrip(codec, state)
    assert not decoded["x"].any()
    assert decoded["y"][0] == 0
    assert decoded["y"][2] == -2 or isinstance(codec, BlockQuantizer)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_codes_by_hand(bits: int, levels: int) -> None:
    """A step of 1/4 is a bfloat16, so multiples of it are exact; the blocks of two arrays do not mix."""
    x = np.array([levels, -levels, 1, 0, -3], np.float32) / np.float32(4)
    state: dict[str, np.ndarray] = {"b": x, "a": np.array([1000.0], np.float32)}
    wire = BlockQuantizer(bits).encode(state)
    np.testing.assert_array_equal(roundtrip(BlockQuantizer(bits), state)["b"], x)
    assert wire["steps"].shape == (2,)
    assert wire["codes"].nbytes == {8: 6, 4: 3}[bits]
    if bits == 4:  # a: 7; b: 7, -7, 1, 0, -3; each plus 8, the first in the low bits
        np.testing.assert_array_equal(wire["codes"], [15 + 16 * 15, 1 + 16 * 9, 8 + 16 * 5])


@codecs
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["head.bias", "scalar", "blocks.0.qkv.lora_B"])
def test_a_bad_number_never_becomes_a_good_one(codec: Codec, bad: float, name: str) -> None:
    state = update()
    state[name] = np.asarray(state[name]).copy()
    state[name].flat[-1] = bad
    assert not np.isfinite(roundtrip(codec, state)[name].flat[-1])
    kept = update(seed=5)
    sent = transmit(codec, state, kept)
    assert not np.isfinite(flat(sent.decoded)).all()
    assert sent.residual is not None
    np.testing.assert_array_equal(flat(sent.residual), flat(kept))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_float32_cannot_hold_is_bad_too(bits: int) -> None:
    assert np.isnan(roundtrip(BlockQuantizer(bits), {"x": np.array([1.0, 1e300])})["x"]).all()


@settings(max_examples=100, deadline=None)
@given(
    array=npst.arrays(np.float32, st.integers(1, 60), elements=st.integers(-5, 5).map(float)),
    fraction=st.floats(0.01, 1),
)
def test_top_k_keeps_exactly_the_largest(array: np.ndarray, fraction: float) -> None:
    codec = TopK(fraction)
    wire = codec.encode({"x": array})
    kept = set(wire["indices"].tolist())
    assert len(wire["indices"]) == len(kept) == codec.count(len(array)) >= 1
    order = sorted(range(len(array)), key=lambda i: (-abs(array[i]), i))  # the first of equals
    assert kept == set(order[: len(kept)])
    decoded = codec.decode(wire, {"x": array.shape})["x"]
    np.testing.assert_array_equal(decoded, [value if i in kept else 0 for i, value in enumerate(array)])


def test_top_k_is_over_the_whole_update() -> None:
    state = {"b": np.ones(5, np.float32), "a": np.full((5, 1), 0.1, np.float32)}
    decoded = roundtrip(TopK(0.5), state)
    assert decoded["b"].all()
    assert not decoded["a"].any()


@lossy
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-20, 1e20))
def test_codecs_contract(codec: Codec, seed: int, scale: float) -> None:
    state = update(seed, scale)
    share = (np.linalg.norm(flat(state) - flat(roundtrip(codec, state))) / norm(state)) ** 2
    if isinstance(codec, TopK):
        size = len(flat(state))
        delta = codec.count(size) / size
    else:  # the largest entry of a block is wrong by 1 / (2 levels) of itself, the others by no more than themselves
        assert isinstance(codec, BlockQuantizer)
        delta = (1 - (0.502 / codec.levels) ** 2) / codec.block
    assert share <= 1 - delta + 1e-12


@lossy
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_error_feedback_loses_nothing_in_the_long_run(codec: Codec, dtype: npt.DTypeLike) -> None:
    meant, arrived = np.zeros(len(flat(update()))), np.zeros(len(flat(update())))
    residual: ClientState = {}
    largest: list[float] = []
    for t in range(200):
        step = update(seed=t % 7, dtype=dtype)
        sent = transmit(codec, step, residual)
        assert sent.residual is not None
        meant, arrived, residual = meant + flat(step), arrived + flat(sent.decoded), sent.residual
        largest.append(norm(residual))
    rounding = 1e-12 if dtype == np.float64 else 200 * 2.0**-24 * 10
    np.testing.assert_allclose(arrived - meant, -flat(residual), atol=rounding)
    assert max(largest[100:]) <= 1.1 * max(largest[:100])  # bounded: it has stopped growing
    assert residual["head.bias"].dtype == dtype


@lossy
def test_a_residual_is_exact_in_float32(codec: Codec) -> None:
    residual: ClientState = {}
    for t in range(20):
        step = update(seed=t)
        target = {name: value + residual.get(name, np.float32(0)) for name, value in step.items()}
        sent = transmit(codec, step, residual)
        assert sent.residual is not None
        residual = sent.residual
        np.testing.assert_array_equal(flat(sent.decoded) + flat(residual), flat(target))


def test_what_is_too_small_to_send_arrives_in_the_end_only_with_error_feedback() -> None:
    step = {"x": np.array([1.0, 0.01], np.float32)}  # half a 4-bit step is 1/14
    with_feedback, without = np.zeros(2), np.zeros(2)
    residual: ClientState = {}
    for _ in range(100):
        sent = transmit(CODECS["int4"], step, residual)
        assert sent.residual is not None
        residual = sent.residual
        with_feedback += sent.decoded["x"]
        without += transmit(CODECS["int4"], step).decoded["x"]
    assert abs(with_feedback[1] - 1) < 0.1
    assert without[1] == 0


@codecs
def test_a_transmission_counts_its_bytes(codec: Codec) -> None:
    state = update()
    sent = transmit(codec, state)
    assert sent.residual is None
    assert state_bytes(sent.encoded) == codec.num_bytes(SHAPES)
    assert len(file_content(sent.encoded)) == len(file_content(codec.encode(state)))
    assert state_bytes(sent.encoded) < len(file_content(sent.encoded)) < state_bytes(sent.encoded) + 1000


def test_the_wire_does_not_depend_on_the_order_of_the_names() -> None:
    state = update()
    for codec in CODECS.values():
        assert file_content(codec.encode(state)) == file_content(codec.encode(dict(reversed(state.items()))))


@lossy
def test_a_wire_of_another_model_is_refused(codec: Codec) -> None:
    with pytest.raises(AssertionError, match="not an update of these shapes"):
        codec.decode(codec.encode(update()), SHAPES | {"more": (100,)})


@pytest.mark.parametrize("classes", [0, 10])
def test_four_bits_send_a_thousandth_of_vit_b16(classes: int) -> None:
    """LoRA r = 8 on qkv and proj of ViT-B/16 against 85,798,656 float32 parameters; scales and header included."""
    width, rank = 768, 8
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(12):
        for module, d_out in (("qkv", 3 * width), ("proj", width)):
            shapes[f"blocks.{layer}.attn.{module}.lora_A"] = (rank, width)
            shapes[f"blocks.{layer}.attn.{module}.lora_B"] = (d_out, rank)
    assert CODECS["none"].num_bytes(shapes) == 4 * 442_368
    if classes:
        shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    full = 4 * (85_798_656 + classes * (width + 1))
    assert full / CODECS["int4"].num_bytes(shapes) == pytest.approx(1435.5 if classes else 1460.4, abs=0.1)
    assert full / len(file_content(CODECS["int4"].encode(update(shapes=shapes)))) >= 1000
    assert 700 < full / CODECS["int8"].num_bytes(shapes) < 1000
    alike = CODECS["int4"].num_bytes(
        {"full": (full // 4,)}
    )  # quantised against quantised: no more than LoRA's own ratio
    assert alike / CODECS["int4"].num_bytes(shapes) == pytest.approx(194, abs=4)


@pytest.mark.parametrize(
    "create",
    [
        lambda: create_codec("zip"),
        lambda: create_codec("int2"),
        lambda: BlockQuantizer(5),
        lambda: BlockQuantizer(4, block=0),
        lambda: create_codec("topk", fraction=0),
    ],
)
def test_no_such_codec(create: Callable[[], object]) -> None:
    with pytest.raises(AssertionError):
        create()
