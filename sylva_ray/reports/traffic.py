"""Traffic in bytes: what a client sends and receives per round under each method, and what it takes to reach a target.

The table follows from the methods themselves: `Algorithm.pack` of a model's initial state gives the arrays that are
sent, the codec gives their size by arithmetic, and the file that would be sent is encoded and measured (the payload).
The two sizes differ by the header of the file. Because comparing a quantised adapter to a full model in fp32
exaggerates the gain, the table also gives the ratio to a full model under the same compression.
"""

from __future__ import annotations

import copy
import csv
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from sylva_ray.aggregation.exact import download_floats, upload_floats
from sylva_ray.aggregation.factors import paired_modules
from sylva_ray.algorithms.registry import ALGORITHMS, create_algorithm
from sylva_ray.config.experiment import AlgorithmSection, BackboneSection, LoraSection
from sylva_ray.core.records import StageRecord
from sylva_ray.core.types import ClientState
from sylva_ray.federation.contract import Algorithm
from sylva_ray.models.backbone import create_backbone
from sylva_ray.models.cohort import CohortModel, FunctionalStack
from sylva_ray.models.lora import LoraStack
from sylva_ray.reports.pages.wording import bytes_text
from sylva_ray.transport.codecs import array_shapes, create_codec, file_content

REFERENCE = "fedavg_at"
"""The method that the ratios refer to: federated adversarial training of the full model."""

COMPRESSIONS = ("none", "int8", "int4")
"""Values of ``compression.kind`` in the table."""

WITH_HEAD = "*"
"""Mark of a method whose head, personal by default, is shared here (``algorithm.heads=global``)."""

RULES = {"FLoRA": "flora", "FedEx-LoRA": "fedex"}
"""Rules of `sylva_ray.aggregation.exact`, which change the frozen weights; no registered method uses them."""


@dataclass(frozen=True)
class TrafficRow:
    """Traffic of the methods that send the same arrays, under one compression.

    Bytes are per client and round; where clients have different ranks, they are the mean over the ranks.

    Attributes:
        methods: names of the methods.
        rank: LoRA rank or ranks; empty for full models and where nothing is sent.
        content: what is sent, e.g. ``A, B, head``.
        compression: value of ``compression.kind``.
        upload: bytes of an upload, by arithmetic.
        payload: bytes of the encoded file of an upload.
        download: bytes of a download, by arithmetic.
        ratio: upload of full-model training in fp32, divided by ``upload``; None where nothing is sent.
        ratio_same_compression: the same with the full model under the same compression.
    """

    methods: tuple[str, ...]
    rank: str
    content: str
    compression: str
    upload: int
    payload: int
    download: int
    ratio: float | None
    ratio_same_compression: float | None


def traffic_table(
    backbone: BackboneSection,
    lora: LoraSection,
    ranks: Sequence[int],
    num_classes: int,
    methods: Sequence[str] | None = None,
    num_clients: int = 10,
) -> list[TrafficRow]:
    """Compute the traffic of methods: full models first, then adapters by rank.

    Args:
        backbone: settings of the backbone; its weights are not loaded.
        lora: settings of the adapters; ``rank`` is ignored.
        ranks: LoRA ranks. A method with heterogeneous ranks is computed with a quarter, a half and the whole of each.
        num_classes: number of classes, which determines the size of the head.
        methods: names of methods; None for every registered method, and `RULES`.
        num_clients: number of clients, which the downloads of `RULES` grow with.

    Returns:
        One row per distinct upload and compression.

    Raises:
        UserError: unknown backbone or method, target modules that match nothing, or a rank that is too large.
    """
    model = create_backbone(backbone.model_copy(update={"pretrained": False}), num_classes)
    full = _InitialModel.from_model(FunctionalStack(model), num_classes)
    names = list(ALGORITHMS if methods is None else methods)
    trains_all = {name: create_algorithm(AlgorithmSection(name=name)).parameters.model == "full" for name in names}
    reference = _Traffic.from_method(REFERENCE, full)
    sizes = {kind: reference.upload(kind) for kind in COMPRESSIONS}
    rows = _rows([_Traffic.from_method(name, full) for name in names if trains_all[name]], sizes)
    for rank in ranks:
        stack = LoraStack(copy.deepcopy(model), lora.model_copy(update={"rank": rank}))
        adapted = _InitialModel.from_model(stack, num_classes, rank)
        traffic = [_Traffic.from_method(name, adapted) for name in names if not trains_all[name]]
        shared_head = {
            "heads": "global",
            "robust": {"rule": "mean"},
        }  # a rule does not change the bytes, but some refuse global heads
        traffic += [_Traffic.from_method(one.method, adapted, **shared_head) for one in traffic if one.keeps_head]
        rows += _rows(traffic, sizes)
        if methods is None:
            rows += [_rule_row(rule, adapted, rank, num_clients, sizes["none"]) for rule in RULES]
    return list(dict.fromkeys(rows))  # a method that sends nothing has the same row at every rank


COLUMNS = ("upload", "payload", "download", "ratio,\nfp32", "ratio,\nsame codec")
"""Headings of the numbers in `terminal_table`."""

NARROW = 100
"""Width of a terminal that does not hold them all, with exact numbers of bytes."""


def terminal_table(rows: Sequence[TrafficRow], title: str, width: int = NARROW) -> Table:
    """Format rows for the terminal: those that differ only in the compression become one row with several lines.

    Args:
        rows: as from `traffic_table`.
        title: title of the table.
        width: of the terminal. A narrow one gets fewer columns and rounded sizes; `write_csv` has all.
    """
    is_narrow = width < NARROW
    size = (lambda value: bytes_text(value).replace(" ", "\xa0")) if is_narrow else "{:,}".format
    left_out = ("payload", "ratio,\nsame codec") if is_narrow else ()
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.caption = (
        f"ratio: upload of the full model ({REFERENCE}), in fp32 or under the same codec, divided by this upload; "
        f"{WITH_HEAD}: with algorithm.heads=global; NAME/N: with N clients"
    )
    table.caption_justify = "left"
    table.add_column("method", overflow="fold")
    table.add_column("rank", no_wrap=True)
    table.add_column("content", no_wrap=not is_narrow)
    table.add_column("codec", no_wrap=True)
    for heading in COLUMNS:
        if heading not in left_out:
            table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[Any, ...], list[TrafficRow]] = {}
    for row in rows:
        groups.setdefault((row.methods, row.rank, row.content), []).append(row)
    for (methods, rank, content), group in groups.items():
        cells = []
        for row in group:
            ratios = ("-" if x is None else f"{x:,.1f}x" for x in (row.ratio, row.ratio_same_compression))
            texts = zip(COLUMNS, (*map(size, (row.upload, row.payload, row.download)), *ratios), strict=True)
            shown = [text for heading, text in texts if heading not in left_out]
            cells.append([row.compression.replace("none", "fp32"), *shown])
        table.add_row(", ".join(methods), rank, content, *("\n".join(column) for column in zip(*cells, strict=True)))
    return table


def write_csv(rows: Sequence[TrafficRow], path: Path) -> None:
    """Write one line per row; the methods of a row are separated by spaces."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(TrafficRow)])
        writer.writerows((" ".join(row.methods), *astuple(row)[1:]) for row in rows)


@dataclass(frozen=True)
class _InitialModel:
    """A model and the state that every client starts from, shared by all methods; ``rank`` is None for full models."""

    model: CohortModel
    state: ClientState
    num_classes: int
    rank: int | None

    @classmethod
    def from_model(cls, model: CohortModel, num_classes: int, rank: int | None = None) -> _InitialModel:
        return cls(model, model.initial_state(torch.Generator()), num_classes, rank)


@dataclass(frozen=True)
class _Traffic:
    """The arrays that a method sends.

    Attributes:
        method: name of the method.
        label: name with the mark `WITH_HEAD` where it applies.
        rank: as in `TrafficRow`.
        content: as in `TrafficRow`.
        packed: an upload per rank, of one client each.
        keeps_head: whether the method sends everything that it trains but the head.
    """

    method: str
    label: str
    rank: str
    content: str
    packed: tuple[ClientState, ...]
    keeps_head: bool

    @classmethod
    def from_method(cls, name: str, initial: _InitialModel, **changes: Any) -> _Traffic:
        """Pack the initial state as the method does, with ``changes`` to the algorithm's section."""
        algorithm = create_algorithm(AlgorithmSection(name=name, **changes))
        rank, ranks = initial.rank, [] if initial.rank is None else [initial.rank]
        if rank is not None and hasattr(algorithm.parameters, "ranks"):
            ranks = sorted({max(1, rank // 4), max(1, rank // 2), rank})
            algorithm = create_algorithm(AlgorithmSection(name=name, ranks=ranks, **changes))
        auxiliary = algorithm.auxiliary_weights(initial.num_classes)
        algorithm.bind_model(initial.model, initial.num_classes, auxiliary, torch.device("cpu"))
        packed = tuple(
            algorithm.pack(client, algorithm.initial_state(client, initial.state)) for client in range(len(ranks) or 1)
        )
        return cls(
            method=name,
            label=name + (WITH_HEAD if changes.get("heads") == "global" else ""),
            rank=",".join(map(str, ranks)) if packed[0] else "",
            content=_content(algorithm, packed[0]),
            packed=packed,
            keeps_head=bool(packed[0]) and not any(name in packed[0] for name in algorithm.head_names),
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """A value that is equal for methods whose traffic is the same."""
        return self.rank, tuple(tuple(sorted(array_shapes(p).items())) for p in self.packed)

    def upload(self, compression: str) -> int:
        """Return the bytes of an upload by arithmetic, mean over the ranks."""
        return _mean([create_codec(compression).num_bytes(array_shapes(p)) for p in self.packed])

    def payload(self, compression: str) -> int:
        """Return the bytes of the encoded file of an upload, mean over the ranks."""
        codec = create_codec(compression)
        return _mean([len(file_content(codec.encode(packed))) if packed else 0 for packed in self.packed])


def _rows(traffic: Sequence[_Traffic], full: Mapping[str, int]) -> list[TrafficRow]:
    """Return one row per distinct upload and compression; ``full`` is the upload of the full model by compression.

    A download is as large as an upload, because the server's reply is encoded in the same way.
    """
    groups: dict[tuple[Any, ...], list[_Traffic]] = {}
    for one in traffic:
        groups.setdefault(one.key, []).append(one)
    rows = []
    for group in groups.values():
        labels, first = tuple(one.label for one in group), group[0]
        for kind in COMPRESSIONS if first.packed[0] else COMPRESSIONS[:1]:
            upload = first.upload(kind)
            ratios = (full["none"] / upload, full[kind] / upload) if upload else (None, None)
            rows.append(
                TrafficRow(labels, first.rank, first.content, kind, upload, first.payload(kind), upload, *ratios)
            )
    return rows


def _rule_row(name: str, initial: _InitialModel, rank: int, num_clients: int, full: int) -> TrafficRow:
    """Return the row of FLoRA or FedEx-LoRA.

    Clients upload both factors. They download the factors of all clients (FLoRA), or the mean factors and the residual
    (FedEx-LoRA).
    """
    upload = download = 0
    for module in paired_modules(initial.state):
        d_in, d_out = initial.state[f"{module}.lora_A"].shape[1], initial.state[f"{module}.lora_B"].shape[0]
        upload += 4 * upload_floats(RULES[name], d_in, d_out, rank)
        download += 4 * download_floats(RULES[name], d_in, d_out, [rank] * num_clients)
    factors = {n: value for n, value in initial.state.items() if n not in initial.model.head_names}
    payload, ratio = len(file_content(factors)), full / upload
    return TrafficRow((f"{name}/{num_clients}",), str(rank), "A, B", "none", upload, payload, download, ratio, ratio)


def _content(algorithm: Algorithm, packed: ClientState) -> str:
    """Name the parts of a model that an upload holds."""
    plain = [name for name in packed if not name.endswith((".lora_A", ".lora_B"))]
    head = [name for name in plain if name in algorithm.head_names]
    parts = [factor for factor in "AB" if any(name.endswith(f".lora_{factor}") for name in packed)]
    parts += ["body"] * (len(plain) > len(head)) + ["head"] * bool(head)
    return "all" if parts == ["body", "head"] else ", ".join(parts) or "nothing"


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))


# -- bytes to target ---------------------------------------------------------------------------------------------------


def bytes_to_target(
    records: Sequence[StageRecord], targets: Mapping[str, float], window: int = 3, clients: Sequence[int] | None = None
) -> int | None:
    """Compute the bytes, up and down and of all clients, until all metrics have reached their targets simultaneously.

    Args:
        records: records of a run, oldest first.
        targets: targets of metrics, e.g. ``{"benign.accuracy": 0.6, "pgd20-eps4.accuracy": 0.3}``. A key consists of a
            condition and a metric of a record's evaluation; its value is the mean over ``clients``.
        window: number of consecutive evaluations that a metric is averaged over before it is compared.
        clients: clients to average over; None for all. Under attack, pass the honest ones.

    Returns:
        The bytes; None if the targets are never reached, or there are fewer than ``window`` evaluations.
    """
    for num_bytes, means in _smoothed(records, list(targets), window, clients):
        if all(means[path] >= target - 1e-12 for path, target in targets.items()):
            return num_bytes
    return None


def reference_targets(
    runs: Sequence[Sequence[StageRecord]],
    paths: Sequence[str],
    fraction: float = 0.9,
    window: int = 3,
    clients: Sequence[int] | None = None,
) -> dict[str, float]:
    """Derive targets from runs of a reference method.

    Args:
        runs: records of each run.
        paths: keys of the targets, as in `bytes_to_target`.
        fraction: a target as a fraction of the best smoothed value of the metric in any of the runs.
        window: as in `bytes_to_target`.
        clients: as in `bytes_to_target`.

    Returns:
        The targets.

    Raises:
        ValueError: no run has ``window`` evaluations with all of these metrics.
    """
    smoothed = [means for records in runs for _, means in _smoothed(records, paths, window, clients)]
    if not smoothed:
        raise ValueError(f"no reference run has {window} evaluations of {', '.join(paths)}; set evaluation.every")
    return {path: fraction * max(means[path] for means in smoothed) for path in paths}


def _smoothed(
    records: Sequence[StageRecord], paths: Sequence[str], window: int, clients: Sequence[int] | None
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the bytes so far and the moving averages of the metrics, at each evaluation from the ``window``-th on.

    Intermediate rounds are evaluated under the first attack only; an evaluation that lacks a metric is skipped.
    """
    num_bytes = 0
    recent: deque[dict[str, float]] = deque(maxlen=window)
    keys = {path: path.rpartition(".")[::2] for path in paths}  # the last dot: pgd20-eps2.55 contains one, too
    for record in records:
        num_bytes += record.upload_bytes + record.download_bytes
        evaluation = record.evaluation or {}
        if any(condition not in evaluation for condition, _ in keys.values()):
            continue
        values = {
            path: np.asarray(getattr(evaluation[condition], metric)) for path, (condition, metric) in keys.items()
        }
        places = None if clients is None else record.places_of(clients)
        recent.append({path: float(np.mean(v if places is None else v[places])) for path, v in values.items()})
        if len(recent) == window:
            yield num_bytes, {path: math.fsum(means[path] for means in recent) / window for path in paths}
