"""Traffic: the table against arithmetic by hand and against the wire; bytes to target on curves with known results."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from sylva_ray.algorithms.registry import ALGORITHMS, create_algorithm
from sylva_ray.config.experiment import (
    DEFAULT_BACKBONE,
    AlgorithmSection,
    BackboneSection,
    CompressionSection,
    ExperimentConfig,
    LoraSection,
)
from sylva_ray.core.records import ClientAccuracies, StageRecord
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import FunctionalStack
from sylva_ray.models.lora import LoraStack
from sylva_ray.reports.traffic import (
    RULES,
    TrafficRow,
    bytes_to_target,
    reference_targets,
    terminal_table,
    traffic_table,
    write_csv,
)
from sylva_ray.transport.codecs import array_shapes
from sylva_ray.transport.wire import Wire
from tests.federation.runs import bare_record

SMALL = BackboneSection(name=DEFAULT_BACKBONE)
FULL, WIDTH, DEPTH = 343_225_384, 768, 12
"""ViT-B/16 with a 10-class head: 85,798,656 + 7,690 parameters of 4 bytes."""
HEAD = 4 * 10 * (WIDTH + 1)
ATTENTION = LoraSection(target_modules=("attn.qkv", "attn.proj"))


def row_of(rows: list[TrafficRow], method: str, compression: str = "none", rank: str | None = None) -> TrafficRow:
    """Return the only row of a method under a compression, at a rank."""
    matches = [
        row
        for row in rows
        if method in row.methods and row.compression == compression and (rank is None or row.rank == rank)
    ]
    assert len(matches) == 1, matches
    return matches[0]


def ratio_of(rows: list[TrafficRow], method: str, compression: str = "none", rank: str | None = None) -> float:
    """Return the ratio in that row, which must have one."""
    ratio = row_of(rows, method, compression, rank).ratio
    assert ratio is not None
    return ratio


@pytest.fixture(scope="module")
def small() -> list[TrafficRow]:
    return traffic_table(SMALL, LoraSection(), [4, 8], num_classes=10)


@pytest.fixture(scope="module")
def vit_base() -> list[TrafficRow]:
    """Rows of methods with adapters on ViT-B/16; the full model is built for its shapes."""
    adapters = ["sylva_paper_like", "lorica", "ffa_lora_at", "fedit_at", "fedsa_lora_at", "hetlora_at", "per_lora"]
    return traffic_table(BackboneSection(name="vit_base_patch16_224"), ATTENTION, [8, 32], 10, adapters)


# -- ViT-B/16, by hand -------------------------------------------------------------------------------------------------


def test_vit_base_by_arithmetic(vit_base: list[TrafficRow]) -> None:
    both = 4 * 8 * DEPTH * ((WIDTH + 3 * WIDTH) + (WIDTH + WIDTH))  # qkv and proj, r (d_in + d_out) each
    b_alone = 4 * 8 * DEPTH * (3 * WIDTH + WIDTH)
    assert row_of(vit_base, "sylva_paper_like", rank="8").upload == both == 1_769_472
    assert row_of(vit_base, "fedit_at", rank="8").upload == both + HEAD
    assert row_of(vit_base, "lorica", rank="8").upload == b_alone == 1_179_648
    assert row_of(vit_base, "lorica*", rank="8").upload == b_alone + HEAD
    assert row_of(vit_base, "fedsa_lora_at", rank="8").upload == both - b_alone
    assert row_of(vit_base, "hetlora_at", rank="2,4,8").upload == round(both * (2 + 4 + 8) / (3 * 8))
    assert row_of(vit_base, "lorica", rank="32").upload == 4 * b_alone
    for row in vit_base:
        if row.compression == "none" and row.upload:
            assert row.ratio == pytest.approx(FULL / row.upload)


def test_the_default_layers_of_vit_base_by_arithmetic() -> None:
    rows = traffic_table(BackboneSection(name="vit_base_patch16_224"), LoraSection(), [8], 10, ["sylva_paper_like"])
    pairs = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    upload = 4 * 8 * DEPTH * sum(d_in + d_out for d_in, d_out in pairs)
    assert row_of(rows, "sylva_paper_like").upload == upload == 4_718_592
    assert ratio_of(rows, "sylva_paper_like") == pytest.approx(72.7, abs=0.1)


def test_vit_base_reaches_the_expected_ratios(vit_base: list[TrafficRow]) -> None:
    for method in ("sylva_paper_like", "sylva_paper_like*"):
        assert ratio_of(vit_base, method, rank="8") >= 190
    for method in ("lorica", "ffa_lora_at", "lorica*", "ffa_lora_at*"):
        assert ratio_of(vit_base, method, rank="8") >= 280
        assert ratio_of(vit_base, method, "int4", rank="8") >= 1000
    for method in ("sylva_paper_like", "sylva_paper_like*"):
        assert ratio_of(vit_base, method, "int4", rank="8") >= 1000


def test_quantised_against_quantised_the_ratio_is_that_of_the_adapters(vit_base: list[TrafficRow]) -> None:
    for method in ("sylva_paper_like", "lorica*"):
        plain = ratio_of(vit_base, method, rank="8")
        for kind in ("int8", "int4"):
            assert row_of(vit_base, method, kind, rank="8").ratio_same_compression == pytest.approx(plain, rel=1e-3)


# -- T11 ---------------------------------------------------------------------------------------------------------------


def test_the_payload_is_the_arithmetic_plus_a_header(small: list[TrafficRow]) -> None:
    """T11.1: the header names the arrays; a codec's wire has two, whatever the model."""
    for row in small:
        header = row.payload - row.upload
        assert header == 0 if row.content == "nothing" else 0 < header <= 200 * 80
        if row.compression != "none":
            assert header < 200
    low, high = row_of(small, "sylva_paper_like", rank="4"), row_of(small, "sylva_paper_like", rank="8")
    assert high.upload == 2 * low.upload
    assert abs((high.payload - high.upload) - (low.payload - low.upload)) <= 48 * 4  # only digits of shapes and offsets


def test_b_alone_over_both_factors_is_b_over_a_plus_b(small: list[TrafficRow]) -> None:
    """T11.2."""
    shapes = array_shapes(LoraStack(create_backbone(SMALL, 10), LoraSection(rank=8)).initial_state(torch.Generator()))
    size = {f: sum(int(np.prod(s)) for n, s in shapes.items() if n.endswith(f"lora_{f}")) for f in "AB"}
    b_alone, both = row_of(small, "lorica", rank="8").upload, row_of(small, "sylva_paper_like", rank="8").upload
    assert b_alone / both == size["B"] / (size["A"] + size["B"])


def test_methods_without_sharing_send_nothing(small: list[TrafficRow]) -> None:
    """T11.3: in one row, without a rank."""
    for method in ("per_lora", "per_adv"):
        row = row_of(small, method)
        assert (row.upload, row.payload, row.download, row.ratio, row.content) == (0, 0, 0, None, "nothing")


def test_a_method_against_itself_is_one(small: list[TrafficRow]) -> None:
    """T11.5, and under every compression against itself alike."""
    assert ratio_of(small, "fedavg_at") == 1
    for kind in ("none", "int8", "int4"):
        assert row_of(small, "fedavg_at", kind).ratio_same_compression == 1


# -- the table and the wire --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_the_table_equals_what_the_wire_counts(small: list[TrafficRow], method: str, kind: str) -> None:
    algorithm = create_algorithm(AlgorithmSection(name=method))
    backbone = create_backbone(SMALL, 10)
    full = algorithm.parameters.model == "full"
    model: Any = FunctionalStack(backbone) if full else LoraStack(backbone, LoraSection(rank=8))
    algorithm.bind_model(model, 10, algorithm.auxiliary_weights(10), torch.device("cpu"))
    common = model.initial_state(torch.Generator().manual_seed(0))
    clients = range(3 if method == "hetlora_at" else 1)
    config = ExperimentConfig(
        algorithm=AlgorithmSection(name=method), compression=CompressionSection(kind=kind, error_feedback=False)
    )
    wire = Wire(algorithm, algorithm.postprocessors(config))
    states = [algorithm.initial_state(client, common) for client in clients]
    wire.upload(1, states, dict(enumerate(states)))
    for client in clients:
        wire.download(1, client, states[client], states[client])
    counted = wire.traffic
    sends = counted.upload > 0
    row = row_of(
        small, method, kind if sends else "none", None if full or not sends else "2,4,8" if len(clients) > 1 else "8"
    )
    in_table = (row.upload, row.payload, row.download)
    expected = (counted.upload, counted.upload_payload, counted.download)
    assert in_table == tuple(round(value / len(clients)) for value in expected)


def test_every_method_has_its_rows_and_every_rule_one_for_each_rank(small: list[TrafficRow]) -> None:
    for method in ALGORITHMS:
        assert any(method in row.methods for row in small)
    for rule in RULES:
        rows = [row for row in small if row.methods == (f"{rule}/10",)]
        assert [row.rank for row in rows] == ["4", "8"]
        assert all(row.upload == row_of(small, "sylva_paper_like", rank=row.rank).upload for row in rows)
        assert all(row.payload == row_of(small, "sylva_paper_like", rank=row.rank).payload for row in rows)
        assert all(row.download == 10 * row.upload for row in rows)  # FedEx-LoRA: mean and 9 residual factors


def test_fedex_sends_the_dense_residual_when_that_is_less() -> None:
    rows = traffic_table(SMALL, ATTENTION, [64], 10, None, num_clients=100)
    upload = row_of(rows, "sylva_paper_like", rank="64").upload
    dense = sum(4 * d_in * d_out for d_in, d_out in 6 * [(192, 576), (192, 192)])
    assert next(row for row in rows if row.methods == ("FedEx-LoRA/100",)).download == upload + dense


def test_a_chosen_method_and_other_targets(tmp_path: Path) -> None:
    rows = traffic_table(SMALL, LoraSection(target_modules=("attn.qkv",)), [2], 100, ["sylva_paper_like"])
    assert row_of(rows, "sylva_paper_like").upload == 4 * 2 * 6 * (192 + 576)
    assert row_of(rows, "sylva_paper_like*").upload == row_of(rows, "sylva_paper_like").upload + 4 * 100 * 193
    assert {name for row in rows for name in row.methods} == {"sylva_paper_like", "sylva_paper_like*"}
    write_csv(rows, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 6
    assert (lines[0]["methods"], int(lines[0]["upload"])) == ("sylva_paper_like", rows[0].upload)
    assert terminal_table(rows, "title").row_count == 2


# -- bytes to target ---------------------------------------------------------------------------------------------------


def accuracies(*values: float) -> ClientAccuracies:
    return ClientAccuracies(accuracy=list(values), balanced_accuracy=list(values))


def run_of(
    benign: Sequence[float | None], robust: Sequence[float | None] | None = None, each: int = 10
) -> list[StageRecord]:
    """Return records of two clients with the given mean accuracies; None is a round without an evaluation."""
    records = []
    for number, value in enumerate(benign):
        table = {} if value is None else {"benign": accuracies(value - 0.05, value + 0.05)}
        attacked = None if robust is None else robust[number]
        if attacked is not None:
            table["pgd20-eps2.55"] = accuracies(attacked, attacked)
        bytes_moved = {"upload_bytes": each, "download_bytes": 2 * each}
        records.append(bare_record(number).model_copy(update={"evaluation": table or None, **bytes_moved}))
    return records


def test_rounds_to_target_on_a_curve_by_hand() -> None:
    """T11.4: moving means .4, .567, .6 from the third evaluation on."""
    curve = run_of([0.1, 0.5, 0.6, 0.6, 0.6])
    assert bytes_to_target(curve, {"benign.accuracy": 0.55}) == 4 * 30
    assert bytes_to_target(curve, {"benign.accuracy": 0.6}) == 5 * 30
    assert bytes_to_target(curve, {"benign.accuracy": 0.61}) is None
    assert bytes_to_target(curve, {"benign.accuracy": 0.55}, window=1) == 3 * 30
    assert bytes_to_target(run_of([0.9, 0.9]), {"benign.accuracy": 0.5}) is None  # no window of three


def test_the_bytes_of_rounds_without_an_evaluation_count() -> None:
    curve = run_of([0.6, None, 0.6, None, None, 0.6])
    assert bytes_to_target(curve, {"benign.accuracy": 0.6}) == 6 * 30


def test_all_metrics_must_be_there_at_once() -> None:
    targets = {"benign.accuracy": 0.6, "pgd20-eps2.55.accuracy": 0.3}
    assert bytes_to_target(run_of([0.7] * 6, [0.0, 0.3, 0.3, 0.3, 0.3, 0.3]), targets) == 4 * 30
    benign_falls = run_of([0.7, 0.7, 0.7, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.4, 0.4, 0.4])
    assert bytes_to_target(benign_falls, targets) is None
    passed_over = run_of([0.7] * 5, [0.3, None, 0.3, None, 0.3])  # evaluated under another attack in between
    assert bytes_to_target(passed_over, targets) == 5 * 30


def test_the_mean_may_be_over_honest_clients_only() -> None:
    curve = run_of([0.5, 0.5, 0.5])
    assert bytes_to_target(curve, {"benign.accuracy": 0.55}) is None
    assert bytes_to_target(curve, {"benign.accuracy": 0.55}, clients=[1]) == 90


def test_targets_are_nine_tenths_of_the_references_best() -> None:
    runs = {
        "fedavg_at-0": run_of([0.5] * 4, [0.2, 0.3, 0.3, 0.3], each=1000),
        "fedavg_at-1": run_of([0.6] * 4, [0.1] * 4, each=1000),
        "sylva": run_of([0.6] * 4, [0.3] * 4, each=5),
        "weak": run_of([0.9] * 4, [0.1] * 4),
    }
    paths = ["benign.accuracy", "pgd20-eps2.55.accuracy"]
    reference = ["fedavg_at-0", "fedavg_at-1"]
    targets = reference_targets([runs[name] for name in reference], paths)
    assert targets == pytest.approx({paths[0]: 0.9 * 0.6, paths[1]: 0.9 * 0.3})
    needed = {name: bytes_to_target(records, targets) for name, records in runs.items()}
    assert needed == {"fedavg_at-0": None, "fedavg_at-1": None, "sylva": 3 * 15, "weak": None}
    with pytest.raises(ValueError, match="set evaluation"):
        reference_targets([run_of([0.5, 0.5])], paths)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_every_number_whole(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(
        terminal_table(traffic_table(BackboneSection(), LoraSection(), [8], 10, ["sylva", "fedavg_at"]), "title", width)
    )
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert max(map(len, text.splitlines())) <= width
    assert ("10,935,336" in text) == (width == 120)
    assert ("10.9\xa0MB" in text) == (width < 100)
