"""Bytes: what a client sends and receives per round under every method, and how many it takes to reach a target.

The table is made from the methods' own declarations: `Algorithm.pack` on a model's initial state says what travels, the codec
says how many bytes that is (arithmetic), and the file that would travel is made and measured (payload). Both differ by the
file's header alone. A quantised adapter against a full model in fp32 flatters: so the full model is quantised, too.
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
from sylva_ray.transport.codecs import array_shapes, create_codec, file_content

REFERENCE = "fedavg_at"
"""Full-model federated adversarial training: what the ratios compare with."""

COMPRESSIONS = ("none", "int8", "int4")

WITH_HEAD = "*"
"""Marks a method in a row for which its personal head is shared (``algorithm.heads=global``)."""

RULES = {"FLoRA": "flora", "FedEx-LoRA": "fedex"}
"""Exact aggregation rules of `sylva_ray.aggregation.exact`, which change the frozen weights; no method of the fleet uses them."""


@dataclass(frozen=True)
class TrafficRow:
    """One way of sharing under one compression; ``methods`` are those that share so.

    Bytes are per client and round (the mean over the ranks, where clients have their own): ``upload`` and ``download`` by
    arithmetic, ``payload`` of the uploaded file. ``ratio`` is full-model training in fp32 over ``upload``, ``ratio_alike`` the
    same with the full model under the same compression; None where nothing travels."""

    methods: tuple[str, ...]
    rank: str
    travels: str
    compression: str
    upload: int
    payload: int
    download: int
    ratio: float | None
    ratio_alike: float | None


def traffic_table(
    backbone: BackboneSection,
    lora: LoraSection,
    ranks: Sequence[int],
    num_classes: int,
    methods: Sequence[str] | None = None,
    num_clients: int = 10,
) -> list[TrafficRow]:
    """Rows for all ``methods`` (None: every registered one, and `RULES`), full models first, then by rank.

    A method whose clients have ranks of their own is shown with a quarter, a half and the whole of each rank. ``num_clients``
    matters to the rules only: their downloads grow with it.

    Raises:
        UserError: unknown backbone or method, targets that match nothing, a rank that does not fit.
    """
    model = create_backbone(backbone.model_copy(update={"pretrained": False}), num_classes)
    full = _Offered.by(FunctionalStack(model), num_classes)
    names = list(ALGORITHMS if methods is None else methods)
    trains_all = {name: create_algorithm(AlgorithmSection(name=name)).parameters.model == "full" for name in names}
    reference = _Traffic.of(REFERENCE, full)
    sizes = {kind: reference.upload(kind) for kind in COMPRESSIONS}
    rows = _rows([_Traffic.of(name, full) for name in names if trains_all[name]], sizes)
    for rank in ranks:
        stack = LoraStack(copy.deepcopy(model), lora.model_copy(update={"rank": rank}))
        offered = _Offered.by(stack, num_classes, rank)
        traffic = [_Traffic.of(name, offered) for name in names if not trains_all[name]]
        shared = {"heads": "global", "robust": {"rule": "mean"}}  # the rule sends nothing
        traffic += [_Traffic.of(own.method, offered, **shared) for own in traffic if own.keeps_head]
        rows += _rows(traffic, sizes)
        if methods is None:
            rows += [_rule_row(rule, offered, rank, num_clients, sizes["none"]) for rule in RULES]
    return list(dict.fromkeys(rows))  # what sends nothing does so at every rank


def terminal_table(rows: Sequence[TrafficRow], title: str) -> Table:
    """The rows of the same sharing as one row of the table, with a line for each compression."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.caption = (
        f"full: {REFERENCE} in fp32; alike: under the same compression; {WITH_HEAD} with algorithm.heads=global; "
        "rule/clients: how many send"
    )
    table.caption_justify = "left"
    table.add_column("method", overflow="fold")
    for heading in ("rank", "travels", "coded"):
        table.add_column(heading, no_wrap=True)
    for heading in ("upload", "payload", "download", "full/up", "alike/up"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[Any, ...], list[TrafficRow]] = {}
    for row in rows:
        groups.setdefault((row.methods, row.rank, row.travels), []).append(row)
    for (methods, rank, travels), group in groups.items():
        cells = [
            [row.compression.replace("none", "fp32"), f"{row.upload:,}", f"{row.payload:,}", f"{row.download:,}"]
            + ["-" if ratio is None else f"{ratio:,.1f}x" for ratio in (row.ratio, row.ratio_alike)]
            for row in group
        ]
        table.add_row(", ".join(methods), rank, travels, *("\n".join(column) for column in zip(*cells, strict=True)))
    return table


def write_csv(rows: Sequence[TrafficRow], path: Path) -> None:
    """One line per row; the methods of a row are separated by spaces."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(TrafficRow)])
        writer.writerows((" ".join(row.methods), *astuple(row)[1:]) for row in rows)


@dataclass(frozen=True)
class _Offered:
    """A model and the state that every client starts from, made once for all methods."""

    model: CohortModel
    state: ClientState
    num_classes: int
    rank: int | None

    @staticmethod
    def by(model: CohortModel, num_classes: int, rank: int | None = None) -> _Offered:
        """``rank`` None: full models."""
        return _Offered(model, model.initial_state(torch.Generator()), num_classes, rank)


@dataclass(frozen=True)
class _Traffic:
    """What a method sends: the uploads of its clients, one of each rank; ``keeps_head``: the head alone stays at home."""

    method: str
    label: str
    rank: str
    travels: str
    packed: tuple[ClientState, ...]
    keeps_head: bool

    @staticmethod
    def of(name: str, offered: _Offered, **changes: Any) -> _Traffic:
        """By the method's own declaration."""
        algorithm = create_algorithm(AlgorithmSection(name=name, **changes))
        rank, ranks = offered.rank, [] if offered.rank is None else [offered.rank]
        if rank is not None and hasattr(algorithm.parameters, "ranks"):
            ranks = sorted({max(1, rank // 4), max(1, rank // 2), rank})
            algorithm = create_algorithm(AlgorithmSection(name=name, ranks=ranks, **changes))
        auxiliary = algorithm.auxiliary_weights(offered.num_classes)
        algorithm.bind_model(offered.model, offered.num_classes, auxiliary, torch.device("cpu"))
        packed = tuple(
            algorithm.pack(client, algorithm.initial_state(client, offered.state)) for client in range(len(ranks) or 1)
        )
        label = name + (WITH_HEAD if changes.get("heads") == "global" else "")
        keeps_head = bool(packed[0]) and not any(name in packed[0] for name in algorithm.head_names)
        travels = _what_travels(algorithm, packed[0])
        shown = ",".join(map(str, ranks)) if packed[0] else ""
        return _Traffic(name, label, shown, travels, packed, keeps_head)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for methods whose traffic is the same."""
        return self.rank, tuple(tuple(sorted(array_shapes(p).items())) for p in self.packed)

    def upload(self, compression: str) -> int:
        """Bytes by arithmetic."""
        return _mean([create_codec(compression).num_bytes(array_shapes(p)) for p in self.packed])

    def payload(self, compression: str) -> int:
        """Bytes of the file that travels."""
        codec = create_codec(compression)
        return _mean([len(file_content(codec.encode(packed))) if packed else 0 for packed in self.packed])


def _rows(traffic: Sequence[_Traffic], full: Mapping[str, int]) -> list[TrafficRow]:
    """One row per sharing and compression. The wire codes the server's answer like the upload, so it is as large."""
    groups: dict[tuple[Any, ...], list[_Traffic]] = {}
    for own in traffic:
        groups.setdefault(own.key, []).append(own)
    rows = []
    for group in groups.values():
        labels, first = tuple(own.label for own in group), group[0]
        for kind in COMPRESSIONS if first.packed[0] else COMPRESSIONS[:1]:
            upload = first.upload(kind)
            ratios = (full["none"] / upload, full[kind] / upload) if upload else (None, None)
            rows.append(
                TrafficRow(labels, first.rank, first.travels, kind, upload, first.payload(kind), upload, *ratios)
            )
    return rows


def _rule_row(name: str, offered: _Offered, rank: int, num_clients: int, full: int) -> TrafficRow:
    """FLoRA or FedEx-LoRA: both factors go up; down come everybody's, or the mean's and the residual."""
    upload = download = 0
    for module in paired_modules(offered.state):
        d_in, d_out = offered.state[f"{module}.lora_A"].shape[1], offered.state[f"{module}.lora_B"].shape[0]
        upload += 4 * upload_floats(RULES[name], d_in, d_out, rank)
        download += 4 * download_floats(RULES[name], d_in, d_out, [rank] * num_clients)
    factors = {n: value for n, value in offered.state.items() if n not in offered.model.head_names}
    size, ratio = len(file_content(factors)), full / upload
    return TrafficRow((f"{name}/{num_clients}",), str(rank), "A, B", "none", upload, size, download, ratio, ratio)


def _what_travels(algorithm: Algorithm, packed: ClientState) -> str:
    plain = [name for name in packed if not name.endswith((".lora_A", ".lora_B"))]
    head = [name for name in plain if name in algorithm.head_names]
    parts = [factor for factor in "AB" if any(name.endswith(f".lora_{factor}") for name in packed)]
    parts += ["body"] * (len(plain) > len(head)) + ["head"] * bool(head)
    return "all" if parts == ["body", "head"] else ", ".join(parts) or "nothing"


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))


# -- bytes to target ------------------------------------------------------------------------------------------------------


def bytes_to_target(
    records: Sequence[StageRecord], targets: Mapping[str, float], window: int = 3, clients: Sequence[int] | None = None
) -> int | None:
    """Bytes up and down, of the whole fleet, until all metrics have reached their targets at once; None: never.

    Args:
        records: of one run, in order.
        targets: ``{"benign.accuracy": 0.6, "pgd20-eps4.accuracy": 0.3}``: condition and metric of a record's evaluation; the
            fleet's mean counts.
        window: a metric has reached its target when its mean over the last so many evaluations has (fewer do not count).
        clients: whose mean (None: everybody's; under attack, name the honest ones).
    """
    for total, means in _smoothed(records, list(targets), window, clients):
        if all(means[path] >= target - 1e-12 for path, target in targets.items()):
            return total
    return None


def reference_targets(
    runs: Sequence[Sequence[StageRecord]],
    paths: Sequence[str],
    share: float = 0.9,
    window: int = 3,
    clients: Sequence[int] | None = None,
) -> dict[str, float]:
    """``share`` of the best value that each metric reaches in ``runs`` of the reference, smoothed as in `bytes_to_target`.

    Raises:
        ValueError: no run has ``window`` evaluations with all of these metrics.
    """
    reached = [means for records in runs for _, means in _smoothed(records, paths, window, clients)]
    if not reached:
        raise ValueError(f"no reference run has {window} evaluations of {', '.join(paths)}; set evaluation.every")
    return {path: share * max(means[path] for means in reached) for path in paths}


def bytes_to_reference_targets(
    runs: Mapping[str, Sequence[StageRecord]],
    reference: Sequence[str],
    paths: Sequence[str],
    share: float = 0.9,
    window: int = 3,
    clients: Sequence[int] | None = None,
) -> dict[str, int | None]:
    """`bytes_to_target` of every run, for targets that the runs in ``reference`` (FedAvg-AT's) alone have set."""
    targets = reference_targets([runs[name] for name in reference], paths, share, window, clients)
    return {name: bytes_to_target(records, targets, window, clients) for name, records in runs.items()}


def _smoothed(
    records: Sequence[StageRecord], paths: Sequence[str], window: int, clients: Sequence[int] | None
) -> Iterator[tuple[int, dict[str, float]]]:
    """At every evaluation with all metrics in ``paths``, from the ``window``-th on: bytes so far, moving means.

    A round in between is evaluated under the first attack only, so it may lack a metric; it is passed over."""
    total = 0
    recent: deque[dict[str, float]] = deque(maxlen=window)
    for record in records:
        total += record.upload_bytes + record.download_bytes
        places = {path: path.rpartition(".")[::2] for path in paths}  # a label such as pgd20-eps2.55 has a dot itself
        measured = record.evaluation or {}
        if any(condition not in measured for condition, _ in places.values()):
            continue
        values = {
            path: np.asarray(getattr(measured[condition], metric)) for path, (condition, metric) in places.items()
        }
        recent.append({path: float(np.mean(v if clients is None else v[list(clients)])) for path, v in values.items()})
        if len(recent) == window:
            yield total, {path: math.fsum(means[path] for means in recent) / window for path in paths}
