"""Functions for finished runs: evaluate, compare, report, track."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from sylva_ray.api.arguments import check_list, check_show, check_texts
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.credentials import mask_value
from sylva_ray.core.errors import RunError, UserError, asked_as
from sylva_ray.core.locations import output_path
from sylva_ray.core.own_code import importing_from
from sylva_ray.core.resumable import resumable
from sylva_ray.core.text import LogFormat, Show
from sylva_ray.reports.output import Output

if TYPE_CHECKING:
    from sylva_ray.core.evaluation import Evaluation
    from sylva_ray.reports.compare.rows import Row
    from sylva_ray.storage.run_folder import RunFolder


def evaluate(  # noqa: PLR0913  # a keyword for each option of the command
    run: str | Path,
    attacks: Sequence[str] = (),
    *,
    suite: str | None = None,
    images: int | None = None,
    epsilon: str | float | None = None,
    checks: bool = False,
    curves: bool = False,
    transfer: bool = False,
    surrogates: Sequence[str | Path] = (),
    certify: Sequence[float] = (),
    overrides: Sequence[str] = (),
    allow_changed: bool = False,
    imports: Sequence[str | Path] = (),
    out: str | Path | None = None,
    show: Show = "progress",
    log_format: LogFormat | None = None,
) -> Evaluation:
    """Attack the trained, personal models of a run. Finished measurements are not repeated.

    Args:
        run: the folder of a finished run, a path or a URL.
        attacks: each ``NAME`` or ``NAME:key=value,...``, e.g. ``pgd:steps=100,restarts=5``.
        suite: ``quick``, ``standard`` (AutoAttack) or ``full``; None: ``quick`` if there are no ``attacks``.
        images: test images per client; None: as many as the run had.
        epsilon: of suites, curves, checks, and L-infinity attacks that name none, in pixel units (``"8/255"``); None:
            that of the first L-infinity attack in ``attacks`` that names one, or else of the run's first.
        checks: whether to run checks S1 to S14 (docs/checks.md).
        curves: whether to measure accuracy against epsilon and against steps.
        transfer: whether to attack every client's model through the others.
        surrogates: other runs, through whose models to attack as well.
        certify: standard deviations of the noise for randomised smoothing, pixel units, above 0.
        overrides: ``KEY=VALUE`` of ``cluster.*``, ``training.device``, ``training.attention``, ``training.windows`` and
            ``evaluation.precision`` only.
        allow_changed: whether data and weights may differ from those of the run; ``evaluation.json`` then says so.
        imports: directories of your own methods' code; what a configuration names is imported from no other.
        out: the JSON file; None: ``evaluation.json`` in the run folder, whose report is written again.
        show: what is printed: ``tasks``, ``progress``, ``result`` or ``nothing`` (`sylva_ray.core.text.Show`).
        log_format: None: bars and tables; ``plain``: lines with time stamps in place of the bars; ``json``: one JSON
            object per event and nothing else (`sylva_ray.reports.evaluation_log.EvaluationLog`).

    Returns:
        The evaluation, as in ``evaluation.json``.

    Raises:
        UserError: no finished run, an unknown attack, a value out of range.
        RunError: it failed while running; the same call continues it.
    """
    check_show(show, log_format)
    for name, values in (("attacks", attacks), ("surrogates", surrogates), ("overrides", overrides)):
        check_texts(name, values)
    check_list("certify", certify)
    if images is not None and (type(images) is not int or images < 1):
        raise UserError("images", images, "must be an integer of at least 1; leave it out for as many as the run had")

    from sylva_ray.evaluation.request import Extras, build_request, check_options

    out = None if out is None else output_path("--out", out, "file")
    budget = None if epsilon is None else str(epsilon)
    with importing_from(imports):
        check_options(attacks, suite, budget, certify)

    from sylva_ray.evaluation.run import prepare_evaluation, run_evaluation
    from sylva_ray.reports.console import print_lines, working_on
    from sylva_ray.storage.remote_copy import run_folder_at

    output = Output(show, log_format)
    console = output.console()
    with ExitStack() as stack:
        stack.enter_context(importing_from(imports))
        folder, _ = stack.enter_context(run_folder_at(str(run), "change"))
        with asked_as("--surrogate", "RUN", "run folder"):
            surrogate_folders = [stack.enter_context(run_folder_at(str(other), "read"))[0] for other in surrogates]
        preparing = working_on(console, f"preparing {mask_value(str(run))}", quiet=not output.has_bars)
        with preparing, asked_as("--images", *(() if images is None else ("partition.test_samples",))):
            prepared_run = prepare_evaluation(folder, images, surrogate_folders, overrides, allow_changed)
        for text in prepared_run.notices:
            print(f"warning: {text}", file=sys.stderr)
        config, fleet = prepared_run.prepared.config, prepared_run.prepared.fleet
        extras = Extras(checks, curves, transfer, tuple(certify), bool(surrogates))
        request = build_request(config, attacks, suite, budget, extras, fleet.num_clients, fleet.num_classes)

        from sylva_ray.execution.run import pool_for

        with (
            output.observing_evaluation(console) as display,
            resumable(folder.measurements, "What was measured is kept; run the same command again to continue"),
            pool_for(prepared_run.prepared, display) as pool,
        ):
            evaluation = run_evaluation(prepared_run, request, pool, display)
        path = folder.write_evaluation(evaluation, out)
        output.print_evaluation(console, evaluation, path)
        if out is None:
            print_lines(console, [_send_report(folder, config)])
    return evaluation


def compare(
    sources: Sequence[str | Path],
    *,
    out: Sequence[str | Path] = (),
    uri: str | None = None,
    show: Show = "progress",
) -> list[Row]:
    """Compare runs: means and spreads over seeds, which rows dominate others, and failed checks.

    Args:
        sources: run folders, folders of runs, summaries (``FILE.json``), MLflow experiments.
        out: files to write, ``.html``, ``.csv`` or ``.md``.
        uri: the MLflow store; None: ``MLFLOW_TRACKING_URI``, else ``runs/mlflow.db``.
        show: what is printed: ``tasks``, ``progress``, ``result`` or ``nothing`` (`sylva_ray.core.text.Show`).

    Returns:
        One row per stage of every experiment, over its seeds.

    Raises:
        UserError: a source that is not a finished run, a file that cannot be written.
    """
    check_show(show)
    check_texts("sources", sources)
    check_texts("out", out)
    from sylva_ray.observers.sources import load_runs
    from sylva_ray.reports import compare as comparison
    from sylva_ray.reports.compare.files import check_targets, write
    from sylva_ray.reports.console import create_console, print_lines, wrapped
    from sylva_ray.storage.remote_copy import run_folder_at

    targets = check_targets(out)
    with ExitStack() as stack, asked_as("SOURCE", "RUN", "run folder"):
        local = [str(stack.enter_context(run_folder_at(str(source), "read"))[0]) for source in sources]
        summaries, left_out = load_runs(local, uri)
    rows = comparison.compare(summaries)
    console = create_console(show)
    for table in comparison.terminal_tables(rows, console.width):
        console.print(table)
        console.print()
    for style, lines in comparison.remarks(rows, left_out):
        print_lines(console, wrapped(console, lines, 2), style)
    for target in targets:
        write(rows, target, left_out)
    print_lines(console, targets)
    return rows


def report(run: str | Path) -> Path:
    """Write ``report.html`` again from the run folder's files.

    Args:
        run: the run folder, a path or a URL.

    Returns:
        The report; of a run at a URL the local copy of what was sent there.

    Raises:
        UserError: no such run, or nothing in it yet.
    """
    from sylva_ray.reports.pages.run import write_report
    from sylva_ray.storage.remote_copy import run_folder_at

    with run_folder_at(str(run), "change") as (folder, _):
        folder.load_states()
        return write_report(folder)


def track(run: str | Path, overrides: Sequence[str] = ()) -> None:
    """Send to MLflow what it has not received of a run.

    Args:
        run: the run folder, a path or a URL.
        overrides: ``tracking.*`` as ``KEY=VALUE``, e.g. ``tracking.uri=...`` for another server.

    Raises:
        UserError: no such run, nothing in it yet, or a setting of another section.
        RunError: MLflow did not receive everything.
    """
    check_texts("overrides", overrides)
    for override in overrides:
        if not override.strip().startswith("tracking."):
            raise UserError("override", override, "would change the run; only tracking.* can be changed here")
    from sylva_ray.observers.mlflow.tracker import send_run
    from sylva_ray.storage.remote_copy import run_folder_at

    with run_folder_at(str(run), "change") as (folder, _):
        folder.load_states()
        problems = send_run(folder, folder.load_config(overrides))
    if problems:
        raise RunError("; ".join(problems))


def _send_report(folder: RunFolder, config: ExperimentConfig) -> Path:
    """Write the report again and send it to MLflow; a server that does not answer is a warning."""
    from sylva_ray.observers.mlflow.tracker import send_run
    from sylva_ray.reports.pages.run import write_report

    path = write_report(folder)
    for problem in send_run(folder, config) if config.tracking.enabled else ():
        print(f"warning: {problem}", file=sys.stderr)
    return path
