"""What a comparison concludes: who dominates whom, and what must be said beside the numbers.

Row a dominates row b if it is at least as good in class-balanced benign *and* class-balanced robust accuracy under the
strongest attack, and better in one of them. Plain accuracy would let a constant answer win.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sylva_ray.attacks.base import ATTACKS, epsilon_text
from sylva_ray.attacks.registry import attack_title
from sylva_ray.core.types import AttackSpec
from sylva_ray.metrics.pareto import dominators
from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.compare.rows import STATISTICS, Row, differing_keys, fleets, same_fleet, short_key
from sylva_ray.reports.compare.runs import BENIGN

STATISTIC_NAMES = {"mean": "mean", "worst_decile": "worst decile"}
MARKS = {"S4": "†", "S14": "‡"}
OTHER_MARK, WARNING_MARK = "§", "!"
MEANINGS = {
    "S4": "an attack without bound leaves more than chance standing, so the robust accuracies are too high",
    "S14": 'the robust accuracy of collapsed clients (counted under "collapsed") shows no defence',
}
MAX_NAMES = 3
"""Dominators that a sentence names, and warnings that a row shows."""


# -- dominance ----------------------------------------------------------------------------------------------------------


def attack_labels(rows: Sequence[Row]) -> list[str]:
    """Labels of all attacks, in the order in which they were listed."""
    return list(dict.fromkeys(attack for row in rows for attack in row.attacks))


def attack_title_from(rows: Sequence[Row], attack: str) -> str:
    """Return an attack's title; its label where no row's config says what it is."""
    spec = _spec_of(rows, attack)
    return attack_title(spec) if spec else attack


def strongest_attack(rows: Sequence[Row]) -> str | None:
    """Find the strongest of the attacks that every row was measured under; None where there is none.

    It has the largest epsilon, then the most steps, then it is listed last. An attack that no config describes is
    weaker than all others.
    """
    rows = method_rows(rows)
    shared = [attack for attack in attack_labels(rows) if all(attack in row.attacks for row in rows)]
    return max(reversed(shared), key=lambda attack: _strength(_spec_of(rows, attack)), default=None)


def _spec_of(rows: Sequence[Row], attack: str) -> AttackSpec | None:
    return next((row.attack_specs[attack] for row in rows if attack in row.attack_specs), None)


def _strength(spec: AttackSpec | None) -> tuple[float, int]:
    if spec is None or math.isinf(spec.epsilon):
        return -1.0, 0
    steps = spec.steps if ATTACKS[spec.name].counts_steps else 1
    return float(epsilon_text(spec)), steps * spec.restarts


def dominance(rows: Sequence[Row], statistic: str) -> dict[str, list[str]]:
    """Find the rows that dominate each row in benign and robust accuracy under the strongest attack.

    Rows on different fleets are not compared.

    Args:
        rows: All rows of the table.
        statistic: Of the clients, ``mean`` or ``worst_decile``.

    Returns:
        Per row that was measured, the names of its dominators, those on the Pareto front first. The rows on the front
        have none.
    """
    attack = strongest_attack(rows)
    measured = [
        (row, place) for row in method_rows(rows) if attack and (place := balanced_accuracies(row, attack, statistic))
    ]
    above = dominators([(benign.mean, robust.mean) for _, (benign, robust) in measured], maximize=(True, True))
    found = {
        row.name: [measured[index][0].name for index in indices if same_fleet(measured[index][0], row)]
        for (row, _), indices in zip(measured, above, strict=True)
    }
    front = {name for name, names in found.items() if not names}
    return {name: sorted(names, key=lambda other: other not in front) for name, names in found.items()}


def method_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.stage != "majority"]


def balanced_accuracies(row: Row, attack: str, statistic: str) -> tuple[SeedMean, SeedMean] | None:
    """Class-balanced benign and robust accuracy."""
    benign, robust = (row.value(condition, "balanced_accuracy", statistic) for condition in (BENIGN, attack))
    return (benign, robust) if benign is not None and robust is not None else None


def _within_spread(a: tuple[SeedMean, SeedMean], b: tuple[SeedMean, SeedMean]) -> bool:
    """Whether no lead of ``a`` over ``b`` exceeds the two standard deviations over seeds, combined."""
    spreads = [(x.std, y.std) for x, y in zip(a, b, strict=True)]
    return all(
        s is not None and t is not None and x.mean - y.mean <= math.hypot(s, t)
        for (s, t), x, y in zip(spreads, a, b, strict=True)
    )


def sentences(rows: Sequence[Row]) -> list[str]:
    """One for all that nobody dominates, then one per row that is dominated."""
    attack = strongest_attack(rows)
    if attack is None:
        return (
            ["No attack is common to all rows, so none can be said to dominate another."] if method_rows(rows) else []
        )
    found = {statistic: dominance(rows, statistic) for statistic in STATISTICS}
    by_name = {row.name: row for row in rows}
    front: list[str] = []
    dominated: list[str] = []
    for row in method_rows(rows):
        free = [STATISTIC_NAMES[s] for s in STATISTICS if found[s].get(row.name) == []]
        if len(free) == len(STATISTICS):
            front.append(row.name)
        elif free:
            front.append(f"{row.name} ({free[0]} only)")
        parts = []
        for statistic in STATISTICS:
            above = found[statistic].get(row.name)
            if above:
                own = balanced_accuracies(row, attack, statistic)
                theirs = [balanced_accuracies(by_name[name], attack, statistic) for name in above]
                close = own is not None and all(place is not None and _within_spread(place, own) for place in theirs)
                hint = ", by no more than the seeds' spread" if close else ""
                parts.append((f"{_names(above)}{hint}", STATISTIC_NAMES[statistic]))
        if len(parts) == 2 and parts[0][0] == parts[1][0]:
            dominated.append(f"{row.name} is dominated by {parts[0][0]} (mean and worst decile).")
        elif parts:
            dominated.append(f"{row.name} is dominated by {'; by '.join(f'{who} ({what})' for who, what in parts)}.")
    return [f"Not dominated: {'; '.join(front)}.", *dominated]


def _names(names: Sequence[str]) -> str:
    if len(names) > MAX_NAMES:
        return f"{'; '.join(names[:MAX_NAMES])} and {len(names) - MAX_NAMES} more"
    return " and ".join(["; ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def front_membership(rows: Sequence[Row]) -> dict[str, str]:
    """``{row: both, mean or worst}`` for the rows on a Pareto front."""
    on = {
        statistic: {name for name, above in dominance(rows, statistic).items() if not above} for statistic in STATISTICS
    }
    mean, worst = (on[statistic] for statistic in STATISTICS)
    return {name: "both" if name in mean & worst else "mean" if name in mean else "worst" for name in mean | worst}


# -- what must be said beside the numbers -------------------------------------------------------------------------------


def warnings(rows: Sequence[Row]) -> list[str]:
    """Why numbers of this table may not be comparable."""
    rows = method_rows(rows)
    said = []
    groups = fleets(rows)
    if len(groups) > 1:
        keys = differing_keys([row.fleet for row in rows])
        why = [f"{short_key(key)} is {_values(rows, lambda r, key=key: r.fleet.get(key))}" for key in keys]  # type: ignore[misc]
        others = ["the same seed dealt other images to the clients"] if not keys else []
        said.append(
            f"NOT COMPARABLE: the rows rest on {len(groups)} different fleets of clients: {'; '.join(why or others)}"
        )
    for attack in attack_labels(rows):
        details = {row.attack_specs[attack] for row in rows if attack in row.attack_specs}
        if len(details) > 1:
            said.append(f"NOT COMPARABLE: {attack} has not the same parameters in all rows (see evaluation.attacks)")
    agreed = {
        "backbone.name": "backbone",
        "training.rounds": "number of rounds",
        "byzantine": "kind of Byzantine clients",
    }
    for key, what in agreed.items():
        if len({row.settings[key] for row in rows if key in row.settings}) > 1:
            said.append(f"the {what} differs: {_values(rows, lambda r, key=key: r.settings.get(key))}")  # type: ignore[misc]
    if len({row.seeds for row in rows}) > 1:
        seeds = _values(rows, lambda row: ", ".join(map(str, row.seeds)))
        said.append(f"the seeds differ, and with them the images that clients were dealt: {seeds}")
    for row in rows:
        if row.conflicts and row.stage == "final":
            said.append(
                f"{row.name}: another row has the same settings and seed but another result; they are not averaged"
            )
    return said


def _values(rows: Sequence[Row], read: Callable[[Row], str | None]) -> str:
    """Every value and whose it is."""
    owners: dict[str, list[str]] = {}
    for row in rows:
        value = read(row)
        if value is not None and row.stage == "final":
            owners.setdefault(value, []).append(row.name)
    return "; ".join(f"{value} ({_names(names)})" for value, names in owners.items())


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the marks beside names and numbers mean: failed checks and the runs' own warnings."""
    said = []
    for check in dict.fromkeys(name for row in rows for name in row.failed):
        bad = [row for row in rows if check in row.failed]
        meaning = MEANINGS.get(check) or next(row.meanings[check] for row in bad)
        where = "; ".join(f"{row.name} (seed {', '.join(map(str, row.failed[check]))})" for row in bad)
        said.append(f"{_mark(check)} check {check} FAILED: {meaning}: {where}")
    for row in rows:
        said += [f"{WARNING_MARK} {row.name}, {text}" for text in row.warnings[:MAX_NAMES]]
        if len(row.warnings) > MAX_NAMES:
            said.append(
                f"{WARNING_MARK} {row.name}: {len(row.warnings) - MAX_NAMES} more warnings (see the runs' summaries)"
            )
    return said


def notes(rows: Sequence[Row]) -> list[str]:
    """How to read the table."""
    methods = method_rows(rows)
    said = ["± is the sample standard deviation over seeds"] if any(len(row.seeds) > 1 for row in methods) else []
    attack = strongest_attack(rows)
    if attack is not None:
        said.append(
            f"front: not dominated in balanced benign and balanced {attack}, on the mean, the worst decile or both"
        )
    if any(len(row.seeds) == 1 for row in methods):
        said.append("rows of one seed have no spread: small differences may be chance")
    if any(row.stage == "phase1" for row in methods):
        said.append("checks, collapsed clients, total bytes and seconds are known of the end of a run, not of phase 1")
    unchecked = [row.name for row in methods if not row.checked]
    if unchecked:
        said.append(f"no check vouches for the robust accuracies of {_names(unchecked)}")
    copies = [row.name for row in methods if row.repeats and row.stage == "final"]
    if copies:
        said.append(f"runs given more than once are counted once: {_names(copies)}")
    return said


def _mark(check: str) -> str:
    return MARKS.get(check, OTHER_MARK)


def check_marks(row: Row) -> str:
    return "".join(dict.fromkeys(_mark(check) for check in row.failed))
