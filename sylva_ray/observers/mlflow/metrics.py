"""Records and summaries as flat ``{metric key: number}``: the names under which a tracker shows them.

Per fleet ``benign_accuracy.mean``, ``robust_accuracy.pgd20-eps4.p10``, ``loss.mean``; per client
``client_003.benign_accuracy``; per step ``upload_bytes``, ``seconds.train``. Accuracies are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from sylva_ray.core.evaluation import Evaluation
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Spread, StageAccuracies, Summary

STATISTICS = ("mean", "std", "min", "p10", "median", "max")


def record_metrics(record: StageRecord, attacks: Collection[str]) -> dict[str, float]:
    """Flatten a line of ``rounds.jsonl``.

    Robust accuracy comes first: MLflow's comparison page opens with the first metric that it was told.

    Args:
        record: of one stage.
        attacks: labels of the evaluation's attacks. Other attacks in the record were made for a check (an unbounded one
            must break every defence), so they are called ``check_accuracy``, not ``robust_accuracy``.
    """
    values: dict[str, float | None] = {}
    conditions = record.evaluation or {}
    for condition in sorted(conditions, key=lambda name: (name not in attacks, name != "benign")):
        kind = "benign" if condition == "benign" else "robust" if condition in attacks else "check"
        suffix = "" if condition == "benign" else f".{condition}"
        found = conditions[condition]
        values |= _fleet(f"{kind}_accuracy{suffix}", dict(enumerate(found.accuracy)))
        values |= _fleet(f"{kind}_balanced_accuracy{suffix}", dict(enumerate(found.balanced_accuracy)))
    values |= {"epsilon": record.epsilon, "lr": record.lr}
    values |= {"upload_bytes": record.upload_bytes, "download_bytes": record.download_bytes}
    values |= {"num_participants": len(record.participants), "num_missing": len(record.missing)}
    values |= {f"seconds.{stage}": seconds for stage, seconds in record.seconds.items()}
    for name, per_client in record.metrics.items():
        values |= _fleet(name, {int(client): value for client, value in per_client.items()})
    return _numbers(values)


def summary_metrics(summary: Summary) -> dict[str, float]:
    """Flatten what ``summary.json`` adds to the records: stages of the defence, totals, checks, the layer game."""
    values: dict[str, float | None] = {}
    for stage in ("initial", "phase1", "final"):
        values |= {f"{stage}.{name}": value for name, value in _stage(getattr(summary, stage))}
    values |= {f"majority.{name}": value for name, value in _statistics(summary.majority)}
    sizes = summary.communication.to_json()
    values |= {f"communication.{name}": value for name, value in sizes.items() if name != "compression"}
    values |= {f"total_seconds.{stage}": value for stage, value in summary.seconds.to_json().items()}
    for check in summary.checks:
        values |= {f"check.{check.name}": check.value, f"check.{check.name}.passed": check.passed}
    values["num_collapsed"] = sum(bool(client.collapsed) for client in summary.clients)
    if summary.layer_game is not None:
        values["layer_game.coalitions_evaluated"] = summary.layer_game.coalitions_evaluated
        values |= _fleet("selected_layers", {c: sum(chosen) for c, chosen in enumerate(summary.layer_game.selected)})
    return _numbers(values)


def without_clients(values: Mapping[str, float]) -> dict[str, float]:
    """Drop the metrics of single clients, which nobody reads of a sweep's hundreds of trials."""
    return {name: value for name, value in values.items() if not name.startswith("client_")}


def evaluation_metrics(found: Evaluation) -> dict[str, float]:
    """Flatten ``evaluation.json``: ``evaluation.benign``, ``.attacks.LABEL``, ``.worst_case.BUDGET``, checks, certificates."""
    rows = {
        "benign": found.benign,
        **{f"attacks.{label}": row for label, row in found.attacks.items()},
        **{f"worst_case.{name}": row for name, row in found.worst_case.items()},
    }
    values: dict[str, float | None] = {"evaluation.images": found.images}
    for name, row in rows.items():
        values[f"evaluation.{name}.accuracy.mean"] = row.accuracy.mean
        values[f"evaluation.{name}.accuracy.worst_decile"] = row.accuracy.worst_decile
        values[f"evaluation.{name}.balanced_accuracy.mean"] = row.balanced_accuracy.mean
    for check in found.checks or ():
        values[f"evaluation.check.{check.name}"] = check.value
        values[f"evaluation.check.{check.name}.passed"] = check.passed
    for level in found.certified or ():
        for radius, mean in zip(level.radii, level.mean, strict=True):
            values[f"evaluation.certified.sigma{level.sigma:g}.radius{radius:g}"] = mean
    return _numbers(values)


def _fleet(name: str, by_client: Mapping[int, float]) -> dict[str, float]:
    """Flatten a quantity of every client, and how it spreads."""
    if not by_client:
        return {}
    spread = Spread.from_values(list(by_client.values()))
    values = {f"{name}.{statistic}": float(getattr(spread, statistic)) for statistic in STATISTICS}
    return values | {f"client_{client:03d}.{name}": value for client, value in by_client.items()}


def _stage(stage: StageAccuracies | None) -> Iterator[tuple[str, float]]:
    """Name the statistics of a stage's spreads; the values of single clients are in the records already."""
    if stage is None:
        return
    for kind in ("benign_accuracy", "benign_balanced_accuracy"):
        yield from ((f"{kind}.{name}", value) for name, value in _statistics(getattr(stage, kind)))
    for kind in ("robust_accuracy", "robust_balanced_accuracy"):
        for attack, spread in getattr(stage, kind).items():
            yield from ((f"{kind}.{attack}.{name}", value) for name, value in _statistics(spread))


def _statistics(spread: Spread) -> Iterator[tuple[str, float]]:
    yield from ((name, value) for name, value in spread.to_json().items() if name != "per_client")


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}
