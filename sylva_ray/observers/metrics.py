"""Records, summaries and evaluations flattened to ``{metric: number}``, as trackers show them.

Examples of metrics: ``benign_accuracy/mean``, ``robust_accuracy/pgd20-eps4/p10`` and ``loss/mean`` of the fleet,
``client_003/benign_accuracy`` of a client, ``upload_bytes`` and ``seconds/train`` of a step. MLflow, TensorBoard and
Weights & Biases group metrics by what stands before a slash. Accuracies are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from sylva_ray.core.evaluation import Evaluation
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import ClientSummary, Spread, StageAccuracies, Summary

SENT_STATISTICS = ("mean", "std", "min", "p10")
"""Statistics over the clients, as `Spread` names them."""


def record_metrics(record: StageRecord, attacks: Collection[str]) -> dict[str, float]:
    """Flatten a line of ``rounds.jsonl``.

    Robust accuracy comes first, because MLflow's comparison page opens with the first metric that was logged.

    Args:
        record: record of a stage.
        attacks: labels of the evaluation's attacks. Any other attack in the record was made for a check (an unbounded
            attack must break every defence), so its metric is ``check_accuracy`` instead of ``robust_accuracy``.

    Returns:
        The metrics that have a value.
    """
    values: dict[str, float | None] = {}
    left_out = record.byzantine or ()
    conditions = record.evaluation or {}
    for condition in sorted(conditions, key=lambda name: (name not in attacks, name != "benign")):
        kind = "benign" if condition == "benign" else "robust" if condition in attacks else "check"
        suffix = "" if condition == "benign" else f"/{condition}"
        accuracies = conditions[condition]
        clients = range(len(accuracies.accuracy)) if record.panel is None else record.panel
        for name, measured in (("accuracy", accuracies.accuracy), ("balanced_accuracy", accuracies.balanced_accuracy)):
            values |= _fleet(f"{kind}_{name}{suffix}", dict(zip(clients, measured, strict=True)), left_out)
    values |= {"epsilon": record.epsilon, "lr": record.lr}
    values |= {"upload_bytes": record.upload_bytes, "download_bytes": record.download_bytes}
    values |= {"num_participants": len(record.participants), "num_missing": len(record.missing)}
    values |= {f"seconds/{stage}": seconds for stage, seconds in record.seconds.items()}
    for name, per_client in record.metrics.items():
        values |= _fleet(name, {int(client): value for client, value in per_client.items()}, left_out)
    return _numbers(values)


def summary_metrics(summary: Summary) -> dict[str, float]:
    """Flatten what ``summary.json`` adds to the records: accuracies after each phase, totals, checks, layer game."""
    values: dict[str, float | None] = {}
    for stage in ("initial", "phase1", "final"):
        values |= {f"{stage}/{name}": value for name, value in _stage(getattr(summary, stage))}
    values |= {f"majority/{name}": value for name, value in _statistics(summary.majority)}
    sizes = summary.communication.to_json()
    values |= {f"communication/{name}": value for name, value in sizes.items() if name != "compression"}
    values |= {f"total_seconds/{stage}": value for stage, value in summary.seconds.to_json().items()}
    for check in summary.checks:
        values |= {f"check/{check.name}/value": check.value, f"check/{check.name}/passed": check.passed}
    values["num_collapsed"] = sum(bool(client.collapsed) for client in summary.clients)
    if summary.layer_game is not None:
        values["layer_game/coalitions_evaluated"] = summary.layer_game.coalitions_evaluated
        selected = {client: sum(chosen) for client, chosen in enumerate(summary.layer_game.selected)}
        attackers = summary.byzantine.attackers if summary.byzantine else ()
        values |= _fleet("layer_game/selected_layers", selected, attackers)
    return _numbers(values)


def without_clients(values: Mapping[str, float]) -> dict[str, float]:
    """Return ``values`` without the metrics of single clients."""
    return {name: value for name, value in values.items() if not name.startswith("client_")}


def client_table(summary: Summary) -> dict[str, list[float | int | bool | None]]:
    """Return what is known of every client at the end of a run: ``{column: one value per client}``.

    Columns are those of `sylva_ray.core.summary.ClientSummary`, then ``STAGE/benign_accuracy`` and
    ``STAGE/robust_accuracy/ATTACK``; None: not measured.
    """
    names = list(ClientSummary.model_fields)
    table = {name: [getattr(client, name) for client in summary.clients] for name in names}
    for stage in ("initial", "phase1", "final"):
        accuracies: StageAccuracies | None = getattr(summary, stage)
        if accuracies is not None:
            columns = {"benign_accuracy": accuracies.benign_accuracy}
            columns |= {f"robust_accuracy/{attack}": spread for attack, spread in accuracies.robust_accuracy.items()}
            table |= {f"{stage}/{name}": list(spread.per_client) for name, spread in columns.items()}
    return table


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Flatten ``evaluation.json``.

    The metrics are those of ``evaluation/benign``, ``evaluation/attacks/LABEL``, ``evaluation/worst_case/BUDGET``,
    ``evaluation/check/NAME`` and ``evaluation/certified/sigmaSIGMA/radiusRADIUS``.
    """
    rows = {
        "benign": evaluation.benign,
        **{f"attacks/{label}": row for label, row in evaluation.attacks.items()},
        **{f"worst_case/{name}": row for name, row in evaluation.worst_case.items()},
    }
    values: dict[str, float | None] = {"evaluation/images": evaluation.images}
    for name, row in rows.items():
        values[f"evaluation/{name}/accuracy/mean"] = row.accuracy.mean
        values[f"evaluation/{name}/accuracy/worst_decile"] = row.accuracy.worst_decile
        values[f"evaluation/{name}/balanced_accuracy/mean"] = row.balanced_accuracy.mean
    for check in evaluation.checks or ():
        values[f"evaluation/check/{check.name}/value"] = check.value
        values[f"evaluation/check/{check.name}/passed"] = check.passed
    for level in evaluation.certified or ():
        for radius, mean in zip(level.radii, level.mean, strict=True):
            values[f"evaluation/certified/sigma{level.sigma:g}/radius{radius:g}"] = mean
    return _numbers(values)


def _fleet(name: str, by_client: Mapping[int, float], left_out: Collection[int] = ()) -> dict[str, float]:
    """Flatten a value per client: `SENT_STATISTICS` over the clients that count, and each client's value."""
    counted = [value for client, value in by_client.items() if client not in left_out]
    spread = Spread.from_values(counted) if counted else None
    values = {f"{name}/{statistic}": float(getattr(spread, statistic)) for statistic in SENT_STATISTICS if spread}
    return values | {f"client_{client:03d}/{name}": value for client, value in by_client.items()}


def _stage(stage: StageAccuracies | None) -> Iterator[tuple[str, float]]:
    """Yield name and value of each statistic after a stage, without single clients, whose values are in the records."""
    if stage is None:
        return
    for kind in ("benign_accuracy", "benign_balanced_accuracy"):
        yield from ((f"{kind}/{name}", value) for name, value in _statistics(getattr(stage, kind)))
    for kind in ("robust_accuracy", "robust_balanced_accuracy"):
        for attack, spread in getattr(stage, kind).items():
            yield from ((f"{kind}/{attack}/{name}", value) for name, value in _statistics(spread))


def _statistics(spread: Spread) -> Iterator[tuple[str, float]]:
    yield from ((name, value) for name, value in spread.to_json().items() if name != "per_client")


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}
