"""Records and summaries as flat ``{metric key: number}``: the names under which a tracker shows them.

Per fleet ``benign_accuracy.mean``, ``robust_accuracy.pgd20-eps4.p10``, ``loss.mean``; per client
``client_003.benign_accuracy``; per step ``upload_bytes``, ``seconds.train``. Accuracies are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

STATISTICS = ("mean", "std", "min", "p10", "median", "max")


def record_metrics(record: Mapping[str, Any], attacks: Collection[str]) -> dict[str, float]:
    """One line of ``rounds.jsonl``, robust accuracy first: MLflow's comparison page opens with the first metric it was told.

    Args:
        attacks: labels of the evaluation's attacks. Other attacks in the record were made for a check (an unbounded one
            must break every defence), so they are called ``check_accuracy``, not ``robust_accuracy``.
    """
    values: dict[str, Any] = {}
    conditions = dict(record["evaluation"] or {})
    for condition in sorted(conditions, key=lambda name: (name not in attacks, name != "benign")):
        kind = "benign" if condition == "benign" else "robust" if condition in attacks else "check"
        suffix = "" if condition == "benign" else f".{condition}"
        for metric in ("accuracy", "balanced_accuracy"):
            values |= _fleet(f"{kind}_{metric}{suffix}", dict(enumerate(conditions[condition][metric])))
    values |= {name: record[name] for name in ("epsilon", "lr", "upload_bytes", "download_bytes")}
    values |= {"num_participants": len(record["participants"]), "num_missing": len(record["missing"])}
    values |= {f"seconds.{stage}": seconds for stage, seconds in record["seconds"].items()}
    for name, per_client in record["metrics"].items():
        values |= _fleet(name, {int(client): value for client, value in per_client.items()})
    return _numbers(values)


def summary_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """What ``summary.json`` adds to the records: stages of the defence, totals, checks, the layer game."""
    values: dict[str, Any] = {}
    for stage in ("initial", "phase1", "final", "majority"):
        values |= {f"{stage}.{name}": value for name, value in _spreads(summary.get(stage))}
    bytes_and_rounds = {name: value for name, value in summary["communication"].items() if name != "compression"}
    values |= {f"communication.{name}": value for name, value in bytes_and_rounds.items()}
    values |= {f"total_seconds.{stage}": value for stage, value in summary["seconds"].items()}
    for check in summary["checks"]:
        values |= {f"check.{check['name']}": check["value"], f"check.{check['name']}.passed": check["passed"]}
    values["num_collapsed"] = sum(client["collapsed"] for client in summary["clients"])
    if summary.get("layer_game"):
        game = summary["layer_game"]
        values["layer_game.coalitions_evaluated"] = game["coalitions_evaluated"]
        values |= _fleet("selected_layers", {c: sum(chosen) for c, chosen in enumerate(game["selected"])})
    return _numbers(values)


def without_clients(values: Mapping[str, float]) -> dict[str, float]:
    """The fleet's numbers alone: of a sweep's hundreds of trials nobody reads those of single clients."""
    return {name: value for name, value in values.items() if not name.startswith("client_")}


def evaluation_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """What ``evaluation.json`` adds: ``evaluation.benign``, ``.attacks.LABEL``, ``.worst_case.BUDGET``, checks, certificates."""
    rows = {"benign": found["benign"]}
    rows |= {f"attacks.{label}": row for label, row in found["attacks"].items()}
    rows |= {f"worst_case.{name}": row for name, row in found["worst_case"].items()}
    values: dict[str, Any] = {"evaluation.images": found["images"]}
    for name, row in rows.items():
        values |= {f"evaluation.{name}.accuracy.{key}": row["accuracy"][key] for key in ("mean", "worst_decile")}
        values[f"evaluation.{name}.balanced_accuracy.mean"] = row["balanced_accuracy"]["mean"]
    for check in found.get("checks", []):
        values[f"evaluation.check.{check['name']}"] = check["value"]
        values[f"evaluation.check.{check['name']}.passed"] = check["passed"]
    for level in found.get("certified", []):
        for radius, mean in zip(level["radii"], level["mean"], strict=True):
            values[f"evaluation.certified.sigma{level['sigma']:g}.radius{radius:g}"] = mean
    return _numbers(values)


def _fleet(name: str, per_client: Mapping[int, float]) -> dict[str, float]:
    """A quantity of every client, and how it spreads."""
    if not per_client:
        return {}
    v = np.array(list(per_client.values()), float)
    spread = (v.mean(), v.std(), v.min(), np.percentile(v, 10), np.median(v), v.max())
    values = {f"{name}.{statistic}": float(value) for statistic, value in zip(STATISTICS, spread, strict=True)}
    return values | {f"client_{client:03d}.{name}": value for client, value in per_client.items()}


def _spreads(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``a.b.mean`` and so on from nested mappings; the per-client lists are in the records already."""
    for name, value in (node or {}).items():
        if isinstance(value, Mapping):
            yield from _spreads(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield f"{prefix}{name}", value


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}
