"""Conclusions of a comparison: which rows dominate which, warnings, footnotes and notes.

Row a dominates row b if it is at least as good in class-balanced benign *and* class-balanced robust accuracy under the
strongest attack, and better in one of them. With plain accuracies, a constant prediction could win.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

from sylva_ray.attacks.autoattack import AutoAttack
from sylva_ray.attacks.base import Attack, epsilon_text
from sylva_ray.attacks.registry import attack_title, find_attack
from sylva_ray.core.errors import UserError
from sylva_ray.core.types import ATTACKS_WITHOUT_STEPS, AttackSpec
from sylva_ray.metrics.pareto import dominators
from sylva_ray.metrics.seeds import SeedMean
from sylva_ray.reports.compare.rows import STATISTICS, Row, differing_keys, fleets, same_fleet, short_key
from sylva_ray.reports.compare.runs import BENIGN

STATISTIC_NAMES = {"mean": "mean", "worst_decile": "worst decile"}
"""Names of `STATISTICS` in sentences."""

MARKS = {"S4": "†", "S14": "‡"}
"""Marks of failed checks beside an accuracy."""

OTHER_MARK, WARNING_MARK = "§", "!"
"""Mark of the other failed checks, and of warnings."""

MEANINGS = {
    "S4": "the accuracy under an unbounded attack is above chance, so that the robust accuracies are too high",
    "S14": 'the robust accuracy of collapsed clients (counted under "collapsed") is no evidence of a defence',
}
"""Meanings of failed checks in a comparison; for other checks, the run's own text is shown."""

WEAKEST_NORM_FIRST = ("l0", "l2", "linf")
"""Budgets of different norms cannot be compared; a defence here is trained for the last one."""

MAX_NAME = 26
"""Letters of a row's name in a sentence; a longer one is replaced by the letter of the row."""

MAX_NAMES = 3
"""Number of rows that a sentence names, and of warnings that are shown per row."""


# -- dominance ---------------------------------------------------------------------------------------------------------


def attack_labels(rows: Sequence[Row]) -> list[str]:
    """Return the labels of all attacks, in the order of the rows and of their evaluations."""
    return list(dict.fromkeys(attack for row in rows for attack in row.attacks))


def attack_title_from(rows: Sequence[Row], attack: str) -> str:
    """Return the title of an attack; its label if no row's configuration defines it."""
    spec = _spec_of(rows, attack)
    return attack_title(spec) if spec else attack


def strongest_attack(rows: Sequence[Row]) -> str | None:
    """Return the label of the strongest attack that all rows were measured under; None if there is no such attack.

    Attacks that follow gradients come before those that only see answers, those within an L-infinity ball before
    others, and then epsilon decides, then the number of steps, of which AutoAttack has the most, then the position. An
    attack that no configuration defines is weaker than all others.
    """
    rows = method_rows(rows)
    common = [attack for attack in attack_labels(rows) if all(attack in row.attacks for row in rows)]
    return max(reversed(common), key=lambda attack: _strength(_spec_of(rows, attack)), default=None)


def _spec_of(rows: Sequence[Row], attack: str) -> AttackSpec | None:
    return next((row.attack_specs[attack] for row in rows if attack in row.attack_specs), None)


def _strength(spec: AttackSpec | None) -> tuple[bool, int, float, float]:
    """Return the key of the order of `strongest_attack`; an attack without a budget is as weak as an undefined one."""
    if spec is None or math.isinf(spec.epsilon):
        return False, -1, 0.0, 0.0
    attack: type[Attack] | None = None
    with suppress(UserError):  # of a run whose own code is not imported here
        attack = find_attack(spec.name)
    follows_gradients = attack is None or not attack.black_box
    steps: float = 1 if spec.name in ATTACKS_WITHOUT_STEPS else spec.steps
    if attack is not None and issubclass(attack, AutoAttack):
        steps = math.inf
    return follows_gradients, WEAKEST_NORM_FIRST.index(spec.norm), float(epsilon_text(spec)), steps * spec.restarts


def dominance(rows: Sequence[Row], statistic: str) -> dict[str, list[str]]:
    """Find the rows that dominate each row in benign and robust accuracy under the strongest attack.

    Rows of different fleets are not compared.

    Args:
        rows: all rows of the table.
        statistic: statistic over the clients, ``mean`` or ``worst_decile``.

    Returns:
        Per measured row, the names of the rows that dominate it, those on the Pareto front first; empty for the rows on
        the front.
    """
    attack = strongest_attack(rows)
    if attack is None:
        return {}
    measured = [
        (row, accuracies)
        for row in method_rows(rows)
        if (accuracies := balanced_accuracies(row, attack, statistic)) is not None
    ]
    above = dominators([(benign.mean, robust.mean) for _, (benign, robust) in measured], maximize=(True, True))
    dominating = {
        row.name: [measured[index][0].name for index in indices if same_fleet(measured[index][0], row)]
        for (row, _), indices in zip(measured, above, strict=True)
    }
    front = {name for name, names in dominating.items() if not names}
    return {name: sorted(names, key=lambda other: other not in front) for name, names in dominating.items()}


def method_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without the references."""
    return [row for row in rows if row.stage != "majority"]


def balanced_accuracies(row: Row, attack: str, statistic: str) -> tuple[SeedMean, SeedMean] | None:
    """Return class-balanced benign and robust accuracy; None if one was not measured."""
    benign, robust = (row.value(condition, "balanced_accuracy", statistic) for condition in (BENIGN, attack))
    return (benign, robust) if benign is not None and robust is not None else None


def _within_spread(a: tuple[SeedMean, SeedMean], b: tuple[SeedMean, SeedMean]) -> bool:
    """Return whether ``a`` exceeds ``b`` nowhere by more than their combined standard deviation over the seeds."""
    spreads = [(x.std, y.std) for x, y in zip(a, b, strict=True)]
    return all(
        s is not None and t is not None and x.mean - y.mean <= math.hypot(s, t)
        for (s, t), x, y in zip(spreads, a, b, strict=True)
    )


def sentences(rows: Sequence[Row]) -> list[str]:
    """Return a sentence that names the rows that are not dominated, then one per dominated row."""
    attack = strongest_attack(rows)
    if attack is None:
        return ["No attack is common to all rows, so dominance is not defined."] if method_rows(rows) else []
    dominating = {statistic: dominance(rows, statistic) for statistic in STATISTICS}
    front: list[str] = []
    dominated: list[str] = []
    for row in method_rows(rows):
        undominated = [STATISTIC_NAMES[s] for s in STATISTICS if dominating[s].get(row.name) == []]
        if len(undominated) == len(STATISTICS):
            front.append(_short(row))
        elif undominated:
            front.append(f"{_short(row)} ({undominated[0]} only)")
        parts = [
            (_dominators(rows, row, names, attack, statistic), STATISTIC_NAMES[statistic])
            for statistic in STATISTICS
            if (names := dominating[statistic].get(row.name))
        ]
        if len(parts) == 2 and parts[0][0] == parts[1][0]:
            dominated.append(f"{_short(row)} is dominated by {parts[0][0]} (mean and worst decile).")
        elif parts:
            dominated.append(f"{_short(row)} is dominated by {'; by '.join(f'{by} ({what})' for by, what in parts)}.")
    return [f"Not dominated: {'; '.join(front)}.", *dominated]


def _short(row: Row) -> str:
    """Return the letter of a row whose name would make a sentence long, else its name."""
    return row.letter if row.letter and len(row.name) > MAX_NAME else row.name


def _dominators(rows: Sequence[Row], row: Row, names: Sequence[str], attack: str, statistic: str) -> str:
    """Name the rows that dominate ``row``, and say whether they do so by no more than the spread over seeds."""
    by_name = {other.name: other for other in rows}
    accuracies = balanced_accuracies(row, attack, statistic)
    others = [balanced_accuracies(by_name[name], attack, statistic) for name in names]
    close = accuracies is not None and all(other is not None and _within_spread(other, accuracies) for other in others)
    return _names([_short(by_name[name]) for name in names]) + (
        ", by no more than the spread over seeds" if close else ""
    )


def _names(names: Sequence[str]) -> str:
    """Join names to an enumeration of at most `MAX_NAMES`."""
    if len(names) > MAX_NAMES:
        return f"{'; '.join(names[:MAX_NAMES])} and {len(names) - MAX_NAMES} more"
    return " and ".join(["; ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def front_membership(rows: Sequence[Row]) -> dict[str, str]:
    """Return ``both``, ``mean`` or ``worst`` for each row on a Pareto front: the statistics for which it is on it."""
    mean, worst = (
        {name for name, above in dominance(rows, statistic).items() if not above} for statistic in STATISTICS
    )
    return {name: "both" if name in mean & worst else "mean" if name in mean else "worst" for name in mean | worst}


# -- texts beside the numbers ------------------------------------------------------------------------------------------

AGREEING_SETTINGS = {
    "backbone.name": "backbone",
    "training.rounds": "number of rounds",
    "byzantine": "kind of Byzantine clients",
}
"""Settings whose differences are warned of, and what a warning calls them."""


def warnings(rows: Sequence[Row]) -> list[str]:
    """Return the reasons why numbers of the table may not be comparable, as sentences without a full stop."""
    rows = method_rows(rows)
    texts = _fleet_warnings(rows)
    for attack in attack_labels(rows):
        specs = {row.attack_specs[attack] for row in rows if attack in row.attack_specs}
        if len(specs) > 1:
            texts.append(f"NOT COMPARABLE: {attack} has different parameters in some rows (see evaluation.attacks)")
    for key, name in AGREEING_SETTINGS.items():
        values = [row.settings.get(key) for row in rows]
        if len({value for value in values if value is not None}) > 1:
            texts.append(f"the {name} differs: {_rows_by_value(rows, values)}")
    if len({row.seeds for row in rows}) > 1:
        seeds = _rows_by_value(rows, [", ".join(map(str, row.seeds)) for row in rows])
        texts.append(f"the seeds differ, and with them the images of the clients: {seeds}")
    texts += [
        f"{row.name}: another row has the same settings and seed but another result; they are not averaged"
        for row in rows
        if row.conflicts and row.stage == "final"
    ]
    return texts


def _fleet_warnings(rows: Sequence[Row]) -> list[str]:
    """Return warnings if the rows are of different fleets, or if that is not known of all of them."""
    num_fleets = len(fleets(rows))
    if num_fleets <= 1:
        places = list(dict.fromkeys(name for row in rows for name in row.datasets))
        listed = ", ".join(places[:MAX_NAMES]) + (" ..." if len(places) > MAX_NAMES else "")
        several = f"the images are in {len(places)} folders of one name, which may hold different ones: {listed}"
        unsure = [f"NOT KNOWN to be comparable: {several}"] if len(places) > 1 else []
        unknown = [row.name for row in rows if row.stage == "final" and "partition.kind" not in row.fleet]
        reason = "no config.yaml says how their clients' images were drawn"
        is_mixed = any("partition.kind" in row.fleet for row in rows)
        unsure += [f"NOT KNOWN to be comparable: {_names(unknown)}: {reason}"] if unknown and is_mixed else []
        return unsure
    keys = differing_keys([row.fleet for row in rows])
    reasons = [f"{short_key(key)} is {_rows_by_value(rows, [row.fleet.get(key) for row in rows])}" for key in keys]
    reason = "; ".join(reasons) or "the same seed gave the clients other images"
    return [f"NOT COMPARABLE: the rows are of {num_fleets} different fleets of clients: {reason}"]


def _rows_by_value(rows: Sequence[Row], values: Sequence[str | None]) -> str:
    """Enumerate the values, each with the names of its rows; a row of which the value is None is left out."""
    names: dict[str, list[str]] = {}
    for row, value in zip(rows, values, strict=True):
        if value is not None and row.stage == "final":
            names.setdefault(value, []).append(row.name)
    return "; ".join(f"{value} ({_names(of_value)})" for value, of_value in names.items())


def footnotes(rows: Sequence[Row]) -> list[str]:
    """Return the explanations of the marks beside names and numbers: failed checks, and warnings of the runs."""
    texts = []
    for check in dict.fromkeys(name for row in rows for name in row.failed):
        failing = [row for row in rows if check in row.failed]
        meaning = MEANINGS.get(check) or next(row.meanings[check] for row in failing)
        where = "; ".join(f"{row.name} (seed {', '.join(map(str, row.failed[check]))})" for row in failing)
        texts.append(f"{_mark(check)} check {check} FAILED: {meaning}: {where}")
    for row in rows:
        texts += [f"{WARNING_MARK} {row.name}, {text}" for text in row.warnings[:MAX_NAMES]]
        if len(row.warnings) > MAX_NAMES:
            num_more = len(row.warnings) - MAX_NAMES
            texts.append(f"{WARNING_MARK} {row.name}: {num_more} more warnings (see the runs' summaries)")
    return texts


def notes(rows: Sequence[Row], titled: bool = False) -> list[str]:
    """Return explanations of the table.

    Args:
        rows: of a comparison.
        titled: whether the table calls attacks by their titles, not by their labels.
    """
    methods = method_rows(rows)
    texts = ["± is the sample standard deviation over seeds"] if any(len(row.seeds) > 1 for row in methods) else []
    if methods and all(row.has_equal_shares for row in methods):
        texts.append("test images have equal class shares (partition.test_shares): all accuracies are class-balanced")
    attack = strongest_attack(rows)
    if attack is not None:
        name = attack_title_from(rows, attack) if titled else attack
        texts.append(
            f"front: not dominated in balanced benign and balanced {name} accuracy, by mean, worst decile or both"
        )
    if any(len(row.seeds) == 1 for row in methods):
        texts.append("rows of one seed have no spread: small differences may be due to chance")
    if any(row.stage == "phase1" for row in methods):
        texts.append("checks, collapsed clients, total bytes and seconds are those of whole runs, not of phase 1")
    unchecked = [row.name for row in methods if not row.checked]
    if unchecked:
        texts.append(f"no checks were computed for the robust accuracies of {_names(unchecked)}")
    repeated = [row.name for row in methods if row.repeats and row.stage == "final"]
    if repeated:
        texts.append(f"runs given more than once are counted once: {_names(repeated)}")
    return texts


def _mark(check: str) -> str:
    return MARKS.get(check, OTHER_MARK)


def check_marks(row: Row) -> str:
    """Return the marks of a row's failed checks."""
    return "".join(dict.fromkeys(_mark(check) for check in row.failed))
