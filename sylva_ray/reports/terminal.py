"""Terminal output: tables that fit the width of the console, and the lines at the end of runs and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from sylva_ray.core.credentials import mask_value
from sylva_ray.core.evaluation import AttackRow, ConditionRow, Evaluation
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Spread, StageAccuracies, Summary
from sylva_ray.reports.headlines import accuracy_text
from sylva_ray.reports.pages.wording import bytes_text, significant
from sylva_ray.reports.phases import PhaseEnd, phase_ends


def first_that_fits(console: Console, tables: Iterable[Table]) -> Table:
    """Return the first of several tables that is no wider than the console, or the last one.

    Args:
        console: where it will be printed.
        tables: of the same results, each narrower than the one before.
    """
    for table in tables:
        if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
            break
    return table


def closing_table(console: Console, summary: Summary, records: Sequence[StageRecord]) -> Table:
    """Tabulate each client's training images, and its benign and robust accuracy before the run and after each phase.

    The last rows hold the mean and the worst decile of the clients. Robust accuracy is that under the first attack. A
    narrow console gets fewer columns: no lines between them, then only the first and the last accuracy, then neither
    images nor majority.

    Args:
        console: where it will be printed.
        summary: of the run.
        records: of its stages.
    """
    ends = phase_ends(summary, records)
    first_and_last = [ends[0], *ends[1:][-1:]]
    return first_that_fits(
        console,
        (
            _closing_table(summary, shown, outline, counts)
            for shown, outline, counts in [
                (ends, box.HEAVY_HEAD, True),
                (ends, box.SIMPLE, True),
                (ends, box.SIMPLE, False),
                (first_and_last, box.SIMPLE, True),
                (first_and_last, box.SIMPLE, False),
            ]
        ),
    )


def _closing_table(summary: Summary, ends: Sequence[PhaseEnd], outline: box.Box, counts: bool) -> Table:
    """Return `closing_table` with these ends of phases, and with or without images and majority."""
    attack, game = next(iter(summary.final.robust_accuracy), None), summary.layer_game
    stages = [end.accuracies for end in ends]
    headings = " > ".join(end.heading for end in ends)
    table = Table(title=f"{summary.algorithm} on {summary.dataset}: accuracy in %, {headings}", box=outline)
    for name in ("client", *(("images", "majority") if counts else ()), "benign"):
        table.add_column(name, justify="right", no_wrap=True)
    width = len(_accuracy_text([0.0] * len(stages)))
    if attack is not None:
        table.add_column(f"robust ({attack})", justify="right", overflow="fold", min_width=width)
    if game:
        table.add_column("refined", no_wrap=True, overflow="ellipsis")
    for client in summary.clients:
        mark = " collapsed" if client.collapsed else " Byzantine" if client.byzantine else ""
        cells = [f"{client.client}{mark}"]
        cells += [str(client.train), f"{100 * client.majority_share:.1f}"] if counts else []
        cells += _accuracy_cells(stages, attack, partial(_value_of_client, client=client.client))
        table.add_row(*cells, *([game.refined(client.client)] if game else []))
    table.add_section()
    for name, statistic in (("mean", "mean"), ("worst decile", "worst_decile")):
        read: Callable[[Spread], float] = attrgetter(statistic)
        cells = [name, *(("", f"{100 * read(summary.majority):.1f}") if counts else ())]
        table.add_row(*cells, *_accuracy_cells(stages, attack, read), *([""] if game else []))
    return table


def _value_of_client(spread: Spread, client: int) -> float:
    return spread.per_client[client]


def _accuracy_cells(
    stages: Sequence[StageAccuracies], attack: str | None, read: Callable[[Spread], float]
) -> list[str]:
    """Return cells of benign and robust accuracies (the latter under an attack), which ``read`` takes of spreads."""
    columns = [[read(stage.benign_accuracy) for stage in stages]]
    if attack is not None:
        columns.append([read(stage.robust_accuracy[attack]) for stage in stages])
    return [_accuracy_text(column) for column in columns]


def _accuracy_text(values: Sequence[float]) -> str:
    """Return accuracies in per cent, one after the other."""
    return " > ".join(f"{100 * value:5.1f}" for value in values)


LINE_INDENT = 9
"""Characters before the second column of `closing_lines`."""


def closing_lines(summary: Summary, run_dir: Path | str, tracking_uri: str | None) -> list[str]:
    """Return the lines that follow the closing table: result, upload, seconds, checks, warnings, places of files.

    Args:
        summary: summary of the run.
        run_dir: path or URL of the run folder.
        tracking_uri: address of the MLflow store; None if the run is not tracked.
    """
    communication = summary.communication
    ratio = communication.full_model_ratio
    upload = f"{bytes_text(communication.upload_bytes_per_client_round)} per client and round"
    share = f", {significant(100 / ratio, 2)} % of the full model" if ratio else " (nothing is shared)"
    final = summary.final
    lines = [
        f"result   {accuracy_text(summary, spread)} under {attack}, mean client and 95 % interval"
        for attack, spread in final.robust_accuracy.items()
    ]
    lines += [
        f"result   {accuracy_text(summary, final.benign_accuracy)} benign",
        f"upload   {upload}{share}",
        f"seconds  {summary.seconds.total:.0f} in total",
    ]
    lines += [
        f"check    {check.name} {'pass' if check.passed else 'FAIL'}: {check.meaning}" for check in summary.checks
    ]
    lines += [f"warning  {text}" for text in summary.other_warnings()]
    lines += [f"report   {run_dir}/report.html", f"run      {run_dir}"]
    if tracking_uri is not None:
        lines.append(f"mlflow   mlflow ui --backend-store-uri {mask_value(tracking_uri)}")
    return lines


def evaluation_tables(console: Console, evaluation: Evaluation) -> list[Table]:
    """Tabulate the accuracies of an evaluation and, if they were computed, its checks.

    Args:
        console: where they will be printed.
        evaluation: of a run.
    """
    choices = [(box.HEAVY_HEAD, 6), (box.SIMPLE, 6), (box.SIMPLE, 5), (box.SIMPLE, 4), (box.SIMPLE, 3)]
    tables = [first_that_fits(console, (_attacks_table(evaluation, *choice) for choice in choices))]
    if evaluation.checks is not None:
        checks = Table(title="checks (explained by: sylva-ray show S4)")
        for heading in ("check", "", "meaning"):
            checks.add_column(heading)
        for check in evaluation.checks:
            verdict = "pass" if check.passed else "[bold red]FAIL[/]"
            checks.add_row(check.name, verdict, escape(check.meaning))
        tables.append(checks)
    return tables


def _attacks_table(evaluation: Evaluation, outline: box.Box, num_columns: int) -> Table:
    """Return the table of accuracies with its first columns."""
    table = Table(title=f"{evaluation.run}: {evaluation.images:,} images; accuracy in %", box=outline)
    for name in ("attack", "mean", "95 % interval", "worst decile", "balanced", "images/s")[:num_columns]:
        is_name = name == "attack"
        table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    rows: dict[str, ConditionRow] = {"benign": evaluation.benign, **evaluation.attacks}
    rows |= {f"worst case, {name}": row for name, row in evaluation.worst_case.items()}
    for name, row in rows.items():
        low, high = row.interval
        speed = row.images_per_second if isinstance(row, AttackRow) else None
        cells = [
            name,
            f"{100 * row.accuracy.mean:.1f}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{100 * row.accuracy.worst_decile:.1f}",
            f"{100 * row.balanced_accuracy.mean:.1f}",
            f"{speed:.0f}" if speed else "",
        ]
        table.add_row(*cells[:num_columns])
    majority = evaluation.majority
    name = "always the majority class"
    cells = [name, f"{100 * majority.mean:.1f}", "", f"{100 * majority.worst_decile:.1f}", "", ""]
    table.add_row(*cells[:num_columns])
    return table


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Return one line for each of curves, transfer and certificates, as far as they were measured."""
    lines = []
    if evaluation.curves is not None:
        epsilon, steps = evaluation.curves.epsilon, evaluation.curves.steps
        budgets = ", ".join(
            f"{100 * mean:.1f} at {255 * x:.3g}" for x, mean in zip(epsilon.x, epsilon.mean, strict=True)
        )
        lengths = ", ".join(f"{100 * mean:.1f} at {x:.0f}" for x, mean in zip(steps.x, steps.mean, strict=True))
        lines.append(f"curves   % by epsilon (of 255): {budgets}; by steps: {lengths}")
    if evaluation.transfer is not None:
        transfer = evaluation.transfer
        others = (
            "" if transfer.others_mean is None else f"{100 * transfer.others_mean:.1f} % on images for other clients, "
        )
        runs = "".join(f"; {100 * mean:.1f} % on those for {run}" for run, mean in transfer.surrogates.items())
        lines.append(
            f"transfer {others}{100 * transfer.own:.1f} % on those for the client itself ({transfer.attack}){runs}"
        )
    for level in evaluation.certified or ():
        radii = ", ".join(f"{100 * mean:.1f} at {x:.3g}" for x, mean in zip(level.radii, level.mean, strict=True))
        abstained = f"{100 * level.abstained:.1f} % of {level.images:,} images without certificate"
        lines.append(f"certify  sigma {level.sigma:g}: % by L2 radius: {radii}; {abstained}")
    return lines
