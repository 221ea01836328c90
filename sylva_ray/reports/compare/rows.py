"""Summaries of many runs -> one row per method and settings: mean and spread over seeds.

::

    summaries ──► runs ── same method, fleet, settings ──► groups ──► rows: phase 1, final
                   └───── what they all had to deal with ───────────► row(s): majority

Runs of one method whose settings differ become rows of their own, labelled by what differs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import UserError
from sylva_ray.core.summary import StageAccuracies
from sylva_ray.core.types import AttackSpec
from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.compare.runs import BENIGN, Run, stage_spread

KINDS = ("accuracy", "balanced_accuracy")
STATISTICS = ("mean", "worst_decile")
"""Over a run's clients. What a row says of the seeds is a `SeedMean`."""

MAX_DIFFERENCES, MAX_VALUE_LENGTH = 3, 28
"""What a label holds of the differences."""


@dataclass(frozen=True)
class Row:
    """One line of a comparison. Accuracies are fractions in [0, 1].

    ``accuracy[condition, kind, statistic]``: the condition is ``benign`` or an attack's label; see `KINDS`, `STATISTICS`.
    ``failed[check]``: the seeds whose check failed. ``fingerprints[seed]``: a hash of which client got how many images of
    which class. ``majority[seed][statistic]``: the majority shares. ``repeats`` counts copies of its runs; ``conflicts``:
    another row has the same settings and a common seed, but another result. None: not known, or without meaning for this row.
    """

    name: str
    method: str
    stage: Literal["final", "phase1", "majority"]
    seeds: tuple[int, ...]
    attacks: tuple[str, ...]
    accuracy: Mapping[tuple[str, str, str], SeedMean]
    num_clients: int
    num_honest: int
    fleet: Mapping[str, str]
    fingerprints: Mapping[int, str]
    majority: Mapping[int, Mapping[str, float]]
    settings: Mapping[str, str] = field(default_factory=dict)
    attack_specs: Mapping[str, AttackSpec] = field(default_factory=dict)
    collapsed: SeedMean | None = None
    upload_bytes: SeedMean | None = None
    full_model_ratio: SeedMean | None = None
    total_bytes: SeedMean | None = None
    seconds: SeedMean | None = None
    failed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    checked: bool = True
    repeats: int = 0
    conflicts: bool = False

    def value(self, condition: str, kind: str, statistic: str) -> SeedMean | None:
        """An accuracy, or None where it was not measured."""
        return self.accuracy.get((condition, kind, statistic))


# -- rows ---------------------------------------------------------------------------------------------------------------


def compare(summaries: Sequence[Run | Mapping[str, object]]) -> list[Row]:
    """One row per method and settings, after one per fleet for always answering the client's most frequent class.

    Args:
        summaries: loaded ``summary.json`` files. Three keys may be added to each: ``method`` (the row's name, in place of
            ``algorithm``), ``config`` (the run's config.yaml as a mapping) and ``source`` (a path, for messages).

    Raises:
        UserError: none given, or one is no summary.
    """
    runs = [
        summary if isinstance(summary, Run) else Run.from_json(summary, _source(summary, number))
        for number, summary in enumerate(summaries, 1)
    ]
    if not runs:
        raise UserError("summaries", [], "at least one is needed")
    groups, repeats = _groups(runs)
    rows: list[Row] = []
    for group, copies, conflicts in zip(groups, repeats, _conflicts(groups), strict=True):
        rows += _rows(group, copies, conflicts)
    rows = _named(rows, [group[0].source for group in groups for _ in range(_has_phase2(group) + 1)])
    return [*_majority(rows), *rows]


def _source(summary: object, number: int) -> str:
    return str((summary.get("source") if isinstance(summary, Mapping) else None) or f"number {number}")


def _groups(runs: Sequence[Run]) -> tuple[list[list[Run]], list[int]]:
    """Runs that differ by seed only, and how many copies each group was given. The same seed with another result starts
    a new group."""
    groups: dict[str, list[Run]] = {}
    positions: dict[str, list[int]] = {}
    known = sorted(
        enumerate(runs), key=lambda item: item[1].config is None
    )  # of two copies the one with its config stays
    for position, run in known:
        key = json.dumps([run.label, run.fleet(), run.settings()], sort_keys=True)
        duplicate = next((k for k, group in groups.items() if any(_is_same_run(run, other) for other in group)), None)
        while duplicate is None and any(run.seed == other.seed for other in groups.get(key, [])):
            key += "'"
        positions.setdefault(duplicate or key, []).append(position)
        if duplicate is None:
            groups.setdefault(key, []).append(run)
    keys = sorted(groups, key=lambda key: min(positions[key]))
    copies = [len(positions[key]) - len(groups[key]) for key in keys]
    return [sorted(groups[key], key=lambda run: run.seed) for key in keys], copies


def _is_same_run(a: Run, b: Run) -> bool:
    """One run that was given twice, say by its folder and by its MLflow experiment."""
    if (a.label, a.name, a.seed, a.dataset) != (b.label, b.name, b.seed, b.dataset) or not a.has_same_result(b):
        return False
    return None in (a.config, b.config) or (a.fleet(), a.settings()) == (b.fleet(), b.settings())


def _conflicts(groups: Sequence[Sequence[Run]]) -> list[bool]:
    """Whether another group has the same settings and one of the seeds, but not its result."""
    keys = [(group[0].label, group[0].fleet(), group[0].settings()) for group in groups]
    return [keys.count(key) > 1 for key in keys]


def _has_phase2(group: Sequence[Run]) -> bool:
    return all(run.layer_game is not None and run.phase1 is not None for run in group)


def _rows(group: Sequence[Run], copies: int, conflicts: bool) -> list[Row]:
    first = group[0]
    fingerprints = {run.seed: fingerprint for run in group if (fingerprint := run.partition_fingerprint())}
    common = Row(
        name=first.label,
        method=first.label,
        stage="final",
        seeds=tuple(run.seed for run in group),
        attacks=first.attacks,
        accuracy=_accuracy([run.final for run in group], first.attacks),
        num_clients=first.num_clients,
        num_honest=first.num_honest,
        fleet=first.fleet(),
        fingerprints=fingerprints,
        majority={run.seed: {s: getattr(run.majority, s) for s in STATISTICS} for run in group},
        settings=first.settings(),
        attack_specs=first.attack_specs(),
        upload_bytes=SeedMean.from_values([run.communication.upload_bytes_per_client_round for run in group]),
        full_model_ratio=SeedMean.from_values([run.communication.full_model_ratio for run in group]),
    )
    failed: dict[str, list[int]] = {}
    for run in group:
        for check in run.checks:
            if not check.passed:
                failed.setdefault(check.name, []).append(run.seed)
    final = replace(
        common,
        collapsed=SeedMean.from_values([_num_collapsed(run) for run in group]),
        total_bytes=SeedMean.from_values([run.communication.total_bytes for run in group]),
        seconds=SeedMean.from_values([run.seconds.total for run in group]),
        failed={name: tuple(seeds) for name, seeds in failed.items()},
        meanings={check.name: check.meaning for run in group for check in run.checks if not check.passed},
        warnings=tuple(f"seed {run.seed}: {text}" for run in group for text in run.other_warnings()),
        checked=all(run.checks for run in group),
        repeats=copies,
        conflicts=conflicts,
    )
    if not _has_phase2(group):
        return [final]
    ends = [run.phase1 for run in group if run.phase1 is not None]
    return [replace(common, stage="phase1", accuracy=_accuracy(ends, first.attacks)), final]


def _accuracy(ends: Sequence[StageAccuracies], attacks: Sequence[str]) -> dict[tuple[str, str, str], SeedMean]:
    table = {}
    for condition in (BENIGN, *attacks):
        for kind in KINDS:
            spreads = [stage_spread(end, condition, kind) for end in ends]
            for statistic in STATISTICS:
                value = SeedMean.from_values([getattr(s, statistic) if s is not None else None for s in spreads])
                if value is not None:
                    table[condition, kind, statistic] = value
    return table


def _num_collapsed(run: Run) -> float | None:
    marks = [client.collapsed for client in run.clients]
    return None if not marks or None in marks else float(sum(map(bool, marks)))


def _majority(rows: Sequence[Row]) -> list[Row]:
    """Always answering the client's most frequent class, per fleet: the same under every attack. What it earns balanced is
    1 / classes of a client, which a summary does not hold."""
    references = []
    keys = differing_keys([row.fleet for row in rows])
    for fleet in fleets(rows):
        by_seed = {seed: shares for row in fleet for seed, shares in row.majority.items()}
        attacks = tuple(dict.fromkeys(attack for row in fleet for attack in row.attacks))
        accuracy: dict[tuple[str, str, str], SeedMean] = {}
        for statistic in STATISTICS:
            value = SeedMean.from_values([shares[statistic] for shares in by_seed.values()])
            if value is not None:
                accuracy |= {(condition, "accuracy", statistic): value for condition in (BENIGN, *attacks)}
        first = fleet[0]
        references.append(
            Row(
                name=_label("majority", first.fleet, keys),
                method="majority",
                stage="majority",
                seeds=tuple(sorted(by_seed)),
                attacks=attacks,
                accuracy=accuracy,
                num_clients=first.num_clients,
                num_honest=first.num_honest,
                fleet=first.fleet,
                fingerprints={seed: fingerprint for row in fleet for seed, fingerprint in row.fingerprints.items()},
                majority=by_seed,
                upload_bytes=SeedMean(0.0, None, 1),
                total_bytes=SeedMean(0.0, None, 1),
            )
        )
    taken = Counter(reference.name for reference in references)
    return _numbered(
        [
            replace(reference, name=f"{reference.name} [as for {fleet[0].name}]")
            if taken[reference.name] > 1
            else reference
            for reference, fleet in zip(references, fleets(rows), strict=True)
        ]
    )


# -- fleets and names ---------------------------------------------------------------------------------------------------


def fleets(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows whose numbers may stand beside each other, as far as their summaries and configs tell."""
    found: list[list[Row]] = []
    for row in rows:
        group = next((fleet for fleet in found if all(same_fleet(row, other) for other in fleet)), None)
        if group is None:
            found.append(group := [])
        group.append(row)
    return found


def same_fleet(a: Row, b: Row) -> bool:
    """Same data, same kind of partition, and for every common seed the same images per client and class."""
    shared = a.fleet.keys() & b.fleet.keys()
    if any(a.fleet[key] != b.fleet[key] for key in shared):
        return False
    return all(a.fingerprints[seed] == b.fingerprints[seed] for seed in a.fingerprints.keys() & b.fingerprints.keys())


def differing_keys(maps: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys with more than one value, in the config's order."""
    keys = dict.fromkeys(key for known in maps for key in known)
    return [key for key in keys if len({known[key] for known in maps if key in known}) > 1]


def _named(rows: Sequence[Row], sources: Sequence[str]) -> list[Row]:
    """Names that tell the rows apart: the method, what differs, at need the source."""
    of_fleet = differing_keys([row.fleet for row in rows])
    named = []
    for row in rows:
        others = [other.settings for other in rows if other.method == row.method]
        keys = [*of_fleet, *(key for key in differing_keys(others) if key not in of_fleet)]
        named.append(_label(row.method, {**row.settings, **row.fleet}, keys))
    taken = Counter((name, row.stage) for name, row in zip(named, rows, strict=True))
    full = []
    for row, name, source in zip(rows, named, sources, strict=True):
        name = f"{name} [{source}]" if taken[name, row.stage] > 1 and source else name
        full.append(replace(row, name=f"{name}, phase 1" if row.stage == "phase1" else name))
    return _numbered(full)


def _numbered(rows: Sequence[Row]) -> list[Row]:
    """A number after a name that has been used."""
    seen: Counter[str] = Counter()
    unique = []
    for row in rows:
        seen[row.name] += 1
        unique.append(replace(row, name=f"{row.name} #{seen[row.name]}") if seen[row.name] > 1 else row)
    return unique


def _label(method: str, known: Mapping[str, str], keys: Sequence[str]) -> str:
    told = [f"{short_key(key)}={_short_value(key, known[key])}" for key in keys if key in known]
    if len(told) > MAX_DIFFERENCES:
        told = [*told[:MAX_DIFFERENCES], f"{len(told) - MAX_DIFFERENCES} more"]
    return f"{method} ({', '.join(told)})" if told else method


def short_key(key: str) -> str:
    """The shortest end of a dotted key that no other has; a section's ``name`` is the section.

    >>> short_key("lora.rank"), short_key("lora.alpha"), short_key("dataset.name")
    ('rank', 'lora.alpha', 'dataset')
    """
    if key.endswith(".name"):
        return key.removesuffix(".name")
    parts = key.split(".")
    known = _CONFIG_KEYS - {key}
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not any(other.endswith(f".{end}") or other == end for other in known):
            return end
    return key


_CONFIG_KEYS = frozenset(ExperimentConfig().flat()) | {"algorithm.phase2.enabled"}


def _short_value(key: str, text: str) -> str:
    if key.rpartition(".")[2] in ("epsilon", "step_size"):
        try:
            return f"{float(text) * 255:.4g}/255"
        except ValueError:
            return text
    if text.startswith("["):
        text = "+".join(json.dumps(v) if isinstance(v, dict) else str(v) for v in json.loads(text))
    elif "/" in text:
        text = text.rstrip("/").rpartition("/")[2]
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"
