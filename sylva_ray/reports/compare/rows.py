"""Rows of a comparison: runs of one method with the same settings are one row, with statistics over their seeds.

::

    runs ──► groups (same method, fleet and settings) ──► rows after phase 1 and at the end
       └──► fleets ─────────────────────────────────────► one row each for the majority class

Runs of one method with different settings become rows of their own, whose names contain the differences.
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
from sylva_ray.core.text import BUDGETS, of_255
from sylva_ray.core.types import AttackSpec
from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.compare.runs import BENIGN, Run, stage_spread

ACCURACIES = ("accuracy", "balanced_accuracy")
"""Kinds of accuracy."""

STATISTICS = ("mean", "worst_decile")
"""Statistics over the clients of a run. A row holds their means over the seeds."""

MAX_DIFFERENCES, MAX_VALUE_LENGTH = 3, 28
"""Number of differences in a row's name, and number of characters of a value in it."""


@dataclass(frozen=True)
class Row:
    """A row of a comparison. Accuracies are fractions in [0, 1].

    A quantity is None if the summaries do not hold it, or if it has no meaning for the row.

    Attributes:
        name: unique name of the row.
        method: name of the method.
        stage: ``final`` for the end of the runs, ``phase1`` for the end of their phase 1, ``majority`` for a reference.
        seeds: seeds of the runs.
        attacks: labels of the attacks.
        accuracy: by condition (``benign`` or an attack's label), kind (`ACCURACIES`) and statistic (`STATISTICS`).
        num_clients: number of clients.
        num_honest: number of clients that count in the accuracies.
        fleet: settings that must agree with those of another row for the two to be comparable.
        datasets: names of the data sets of its runs, each once; ``fleet`` has their last part of a path only.
        fingerprints: per seed, a hash of the number of images per client and class.
        majority: per seed and statistic, the accuracy of always predicting a client's most frequent class.
        settings: settings that the runs share besides those of the fleet.
        attack_specs: the attacks by label, as far as the configurations define them.
        collapsed: number of collapsed clients.
        upload_bytes: upload per client and round.
        full_model_ratio: size of the full model divided by the upload.
        total_bytes: all bytes of a run.
        seconds: wall time of a run.
        failed: per check, the seeds whose check failed.
        meanings: per failed check, its meaning.
        warnings: warnings of the runs.
        checked: whether all runs have checks.
        repeats: how many of the given runs were copies of others.
        conflicts: whether another row has the same settings and a common seed, but another result.
        letter: by which tables and plots refer to the row; empty for a reference.
        sources: where the runs were read from, one per seed.
        images: test images of every honest client, of all seeds; empty where they are unknown.
        distinct: the same without those that clients of a run share; None where they are unknown.
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
    letter: str = ""
    sources: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    images: tuple[int, ...] = ()
    distinct: int | None = None

    def value(self, condition: str, kind: str, statistic: str) -> SeedMean | None:
        """Return an accuracy; None if it was not measured."""
        return self.accuracy.get((condition, kind, statistic))

    @property
    def has_equal_shares(self) -> bool:
        """Whether every class of a client has as many test images, so that all accuracies are class-balanced."""
        return self.fleet.get("partition.test_shares") == "equal"


# -- rows --------------------------------------------------------------------------------------------------------------


def compare(summaries: Sequence[Run | Mapping[str, object]]) -> list[Row]:
    """Group runs into rows.

    Args:
        summaries: parsed ``summary.json`` files. Each may have three additional keys: ``method`` (the row's name in
            place of ``algorithm``), ``config`` (the run's ``config.yaml`` as a mapping) and ``source`` (a path, for
            messages).

    Returns:
        One row per fleet for always predicting a client's most frequent class; then one row per method and settings, or
        two if the method has a second phase.

    Raises:
        UserError: the sequence is empty, or an item is not a summary.
    """
    runs = [
        summary if isinstance(summary, Run) else Run.from_json(summary, _source(summary, number))
        for number, summary in enumerate(summaries, 1)
    ]
    if not runs:
        raise UserError("summaries", [], "at least one is needed")
    groups, repeats = _groups(runs)
    rows: list[Row] = []
    for group, num_copies, conflicts in zip(groups, repeats, _conflicts(groups), strict=True):
        rows += _rows(group, num_copies, conflicts)
    rows = _named(rows, [group[0].source for group in groups for _ in range(_has_later_phase(group) + 1)])
    rows = [replace(row, letter=_letter(number)) for number, row in enumerate(rows)]
    return [*_majority(rows), *rows]


def _letter(number: int) -> str:
    """Return A to Z for 0 to 25, then AA, AB and so on."""
    first, last = divmod(number, 26)
    return (_letter(first - 1) if first else "") + chr(ord("A") + last)


def _source(summary: object, number: int) -> str:
    return str((summary.get("source") if isinstance(summary, Mapping) else None) or f"number {number}")


def _groups(runs: Sequence[Run]) -> tuple[list[list[Run]], list[int]]:
    """Group runs that differ by their seed only.

    A run whose seed is in a group already, but with another result, starts a new group.

    Returns:
        The groups, and the number of copies that were dropped from each.
    """
    groups: dict[str, list[Run]] = {}
    positions: dict[str, list[int]] = {}
    configured_first = sorted(enumerate(runs), key=lambda item: item[1].config is None)  # to keep copies with a config
    for position, run in configured_first:
        key = json.dumps([run.label, run.fleet(), run.settings()], sort_keys=True)
        duplicate = next((k for k, group in groups.items() if any(_is_same_run(run, other) for other in group)), None)
        while duplicate is None and any(run.seed == other.seed for other in groups.get(key, [])):
            key += "'"
        positions.setdefault(duplicate or key, []).append(position)
        if duplicate is None:
            groups.setdefault(key, []).append(run)
    keys = sorted(groups, key=lambda key: min(positions[key]))
    num_copies = [len(positions[key]) - len(groups[key]) for key in keys]
    return [sorted(groups[key], key=lambda run: run.seed) for key in keys], num_copies


def _is_same_run(a: Run, b: Run) -> bool:
    """Return whether ``a`` and ``b`` are copies of one run, e.g. from its folder and from MLflow."""
    if (a.label, a.name, a.seed, a.dataset) != (b.label, b.name, b.seed, b.dataset) or not a.has_same_result(b):
        return False
    return None in (a.config, b.config) or (a.fleet(), a.settings()) == (b.fleet(), b.settings())


def _conflicts(groups: Sequence[Sequence[Run]]) -> list[bool]:
    """Return per group whether another one has the same settings and a common seed, but another result."""
    keys = [(group[0].label, group[0].fleet(), group[0].settings()) for group in groups]
    return [keys.count(key) > 1 for key in keys]


def _has_later_phase(group: Sequence[Run]) -> bool:
    return all(run.has_later_phase and run.phase1 is not None for run in group)


def _rows(group: Sequence[Run], num_copies: int, conflicts: bool) -> list[Row]:
    """Return the row of a group, after the row of its phase 1 if another phase follows."""
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
        sources=tuple(run.source for run in group),
        datasets=tuple(dict.fromkeys(run.dataset for run in group)),
        images=_test_images(group),
        distinct=_distinct(group),
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
        repeats=num_copies,
        conflicts=conflicts,
    )
    if not _has_later_phase(group):
        return [final]
    ends = [run.phase1 for run in group if run.phase1 is not None]
    return [replace(common, stage="phase1", accuracy=_accuracy(ends, first.attacks)), final]


def _accuracy(ends: Sequence[StageAccuracies], attacks: Sequence[str]) -> dict[tuple[str, str, str], SeedMean]:
    table = {}
    for condition in (BENIGN, *attacks):
        for kind in ACCURACIES:
            spreads = [stage_spread(end, condition, kind) for end in ends]
            for statistic in STATISTICS:
                value = SeedMean.from_values([getattr(s, statistic) if s is not None else None for s in spreads])
                if value is not None:
                    table[condition, kind, statistic] = value
    return table


def _test_images(group: Sequence[Run]) -> tuple[int, ...]:
    images = [client.test for run in group for client in run.clients if not client.byzantine]
    return tuple(images) if all(images) else ()


def _distinct(group: Sequence[Run]) -> int | None:
    """Return the number of distinct test images of the largest run: all seeds draw theirs from one test set."""
    images = [run.test_images for run in group if run.test_images is not None]
    return max(images) if len(images) == len(group) else None


def _num_collapsed(run: Run) -> float | None:
    collapsed = [client.collapsed for client in run.clients]
    return None if not collapsed or None in collapsed else float(sum(map(bool, collapsed)))


def _majority(rows: Sequence[Row]) -> list[Row]:
    """Return a row per fleet for always predicting a client's most frequent class.

    Its accuracy is the same under every attack. Its balanced accuracy is 1 divided by the number of the client's
    classes, which a summary does not hold, but where test images have equal shares.
    """
    references = []
    keys = differing_keys([row.fleet for row in rows])
    for fleet in fleets(rows):
        first = fleet[0]
        by_seed = {seed: shares for row in fleet for seed, shares in row.majority.items()}
        attacks = tuple(dict.fromkeys(attack for row in fleet for attack in row.attacks))
        accuracy: dict[tuple[str, str, str], SeedMean] = {}
        for statistic in STATISTICS:
            value = SeedMean.from_values([shares[statistic] for shares in by_seed.values()])
            if value is not None:
                kinds = ACCURACIES if first.has_equal_shares else ("accuracy",)
                accuracy |= {(c, kind, statistic): value for c in (BENIGN, *attacks) for kind in kinds}
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
    uses = Counter(reference.name for reference in references)
    return _numbered(
        [
            replace(reference, name=f"{reference.name} [as for {fleet[0].name}]")
            if uses[reference.name] > 1
            else reference
            for reference, fleet in zip(references, fleets(rows), strict=True)
        ]
    )


# -- fleets and names --------------------------------------------------------------------------------------------------


def fleets(rows: Sequence[Row]) -> list[list[Row]]:
    """Partition rows into groups of comparable ones, see `same_fleet`."""
    groups: list[list[Row]] = []
    for row in rows:
        group = next((fleet for fleet in groups if all(same_fleet(row, other) for other in fleet)), None)
        if group is None:
            groups.append(group := [])
        group.append(row)
    return groups


def same_fleet(a: Row, b: Row) -> bool:
    """Return whether two rows are comparable.

    Their data set and partition must agree and, for every common seed, the number of images per client and class. What
    is not available for one of the rows is not compared.
    """
    shared = a.fleet.keys() & b.fleet.keys()
    if any(a.fleet[key] != b.fleet[key] for key in shared):
        return False
    return all(a.fingerprints[seed] == b.fingerprints[seed] for seed in a.fingerprints.keys() & b.fingerprints.keys())


def differing_keys(maps: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys with more than one value, in the order of the configuration."""
    keys = dict.fromkeys(key for values in maps for key in values)
    return [key for key in keys if len({values[key] for values in maps if key in values}) > 1]


def _named(rows: Sequence[Row], sources: Sequence[str]) -> list[Row]:
    """Give the rows unique names: the method, the settings that differ and, if necessary, the source."""
    fleet_keys = differing_keys([row.fleet for row in rows])
    labels = []
    for row in rows:
        settings = [other.settings for other in rows if other.method == row.method]
        keys = [*fleet_keys, *(key for key in differing_keys(settings) if key not in fleet_keys)]
        labels.append(_label(row.method, {**row.settings, **row.fleet}, keys))
    uses = Counter((label, row.stage) for label, row in zip(labels, rows, strict=True))
    named = []
    for row, label, source in zip(rows, labels, sources, strict=True):
        name = f"{label} [{source}]" if uses[label, row.stage] > 1 and source else label
        named.append(replace(row, name=f"{name}, phase 1" if row.stage == "phase1" else name))
    return _numbered(named)


def _numbered(rows: Sequence[Row]) -> list[Row]:
    """Append a number to each name that an earlier row has."""
    uses: Counter[str] = Counter()
    unique = []
    for row in rows:
        uses[row.name] += 1
        unique.append(replace(row, name=f"{row.name} #{uses[row.name]}") if uses[row.name] > 1 else row)
    return unique


def _label(method: str, values: Mapping[str, str], keys: Sequence[str]) -> str:
    """Return the method's name and the values of ``keys`` in brackets, at most `MAX_DIFFERENCES` of them."""
    differences = [f"{short_key(key)}={short_value(key, values[key])}" for key in keys if key in values]
    if len(differences) > MAX_DIFFERENCES:
        differences = [*differences[:MAX_DIFFERENCES], f"{len(differences) - MAX_DIFFERENCES} more"]
    return f"{method} ({', '.join(differences)})" if differences else method


def short_key(key: str) -> str:
    """Return the shortest end of a dotted key that no other key has; for a section's ``name``, the section.

    >>> short_key("lora.rank"), short_key("lora.alpha"), short_key("dataset.name")
    ('rank', 'lora.alpha', 'dataset')
    """
    if key.endswith(".name"):
        return key.removesuffix(".name")
    parts = key.split(".")
    others = _CONFIG_KEYS - {key}
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not any(other.endswith(f".{end}") or other == end for other in others):
            return end
    return key


_CONFIG_KEYS = frozenset(ExperimentConfig().flat()) | {"algorithm.phase2.enabled"}


def short_value(key: str, text: str) -> str:
    """Return a value as a name shows it: epsilons of 255, lists joined, paths by their last part, and cut if long."""
    if key.endswith(BUDGETS):
        try:
            return of_255(float(text))
        except ValueError:
            return text
    if (values := _listed(text)) is not None:
        text = "+".join(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)
    elif "/" in text:
        text = text.rstrip("/").rpartition("/")[2]
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 1]}…"


def _listed(text: str) -> list[object] | None:
    """Return the values of a list in JSON; None of any other text, such as a name with a bracket."""
    if not text.startswith("["):
        return None
    try:
        return list(json.loads(text))
    except ValueError:
        return None
