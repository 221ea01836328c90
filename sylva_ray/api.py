"""The Python interface: everything that the command line can do, as functions.

::

    import sylva_ray

    summary = sylva_ray.run("configs/digits.yaml", ["training.rounds=5"], out="runs/five")
    sylva_ray.evaluate("runs/five", attacks=["pgd:steps=100"], checks=True)
    sylva_ray.export("runs/five", to="adapters")

A run is named by its folder: a path, or a URL such as ``s3://bucket/runs/a``. Wrong input raises `UserError` before anything is
written; a failure while running raises `RunError` and can be resumed, also after Ctrl-C (`Interrupted`) and SIGTERM (`Stopped`).
Importing this module is quick: torch, Ray and the rest are imported by the function that needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sylva_ray.config.experiment import (
    CONFIG,
    BackboneSection,
    ExperimentConfig,
    LoraSection,
    load_run_config,
)
from sylva_ray.config.experiment import load_config as load_config_file
from sylva_ray.config.schema import build, overridden
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.resumable import resumable

if TYPE_CHECKING:
    from sylva_ray.core.types import ClientState
    from sylva_ray.reports.compare.rows import Row
    from sylva_ray.reports.terminal import Show
    from sylva_ray.reports.traffic import TrafficRow
    from sylva_ray.sweeps.results import Sweep

Config = str | Path | Mapping[str, Any] | ExperimentConfig
"""An experiment: a YAML file, a run folder (its ``config.yaml``), a mapping of sections, or a checked configuration."""


@dataclass(frozen=True)
class LoadedRun:
    """What a run folder holds.

    Attributes:
        config: the configuration, resolved.
        states: the newest state of every client, ``{parameter name: array}``.
        records: one record per step, as in ``rounds.jsonl``.
        summary: ``summary.json``; None while the run has not finished.
        evaluation: ``evaluation.json``; None where `evaluate` has not run.
    """

    config: ExperimentConfig
    states: Sequence[ClientState]
    records: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None


def load_config(config: Config, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read and check an experiment.

    Args:
        config: see `Config`.
        overrides: ``KEY=VALUE`` with dotted keys, e.g. ``training.rounds=5``.

    Returns:
        The checked configuration.

    Raises:
        UserError: a missing file, an unknown key, a value out of range.
    """
    if isinstance(config, ExperimentConfig):
        return build(ExperimentConfig, overridden(config.model_dump(mode="json"), overrides)) if overrides else config
    if isinstance(config, Mapping):
        return build(ExperimentConfig, overridden(_copied(config), overrides))
    if Path(config).is_dir():
        return load_run_config(Path(config), overrides)
    return load_config_file(config, overrides)


def run(
    config: Config, overrides: Sequence[str] = (), *, out: str | Path | None = None, show: Show = "progress"
) -> dict[str, Any]:
    """Run one experiment: both phases, evaluation, report.

    Args:
        config: see `Config`.
        overrides: ``KEY=VALUE`` with dotted keys.
        out: the run folder, a path or a URL; None: ``runs/NAME-TIME``.
        show: what is printed.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: the experiment cannot run, or the run folder is not free; nothing was written.
        RunError: it failed while running; `resume` continues it.
    """
    experiment = load_config(config, overrides)
    return _carry_out(str(out or _new_folder(experiment.name)), experiment, (), "start", show)


def resume(
    run: str | Path, overrides: Sequence[str] = (), *, config: Config | None = None, show: Show = "progress"
) -> dict[str, Any]:
    """Continue a run from its newest checkpoint, to the same result as if it had never stopped.

    Args:
        run: the run folder, a path or a URL.
        overrides: ``KEY=VALUE`` with dotted keys; only ``cluster`` and ``tracking`` may change.
        config: the experiment that the folder must hold; None: whatever it holds.
        show: what is printed.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: the folder holds no run, or another one.
        RunError: it failed while running.
    """
    experiment = None if config is None else load_config(config, overrides)
    return _carry_out(str(run), experiment, overrides, "resume", show)


def _carry_out(
    where: str,
    experiment: ExperimentConfig | None,
    overrides: Sequence[str],
    purpose: Literal["start", "resume"],
    show: Show,
) -> dict[str, Any]:
    from sylva_ray.execution.ray import driver
    from sylva_ray.observers.mlflow.tracker import tracking_uri
    from sylva_ray.preparation.experiment import prepare
    from sylva_ray.reports.terminal import RunDisplay, closing_lines, closing_table, print_lines, wide_console
    from sylva_ray.storage.remote_copy import run_folder_at

    console = wide_console(show)
    with run_folder_at(where, purpose) as (run_dir, remote):
        experiment = experiment or load_run_config(run_dir, overrides)
        prepared = prepare(experiment, run_dir)
        with (
            RunDisplay(console, show != "progress") as display,
            resumable(run_dir / CONFIG, f"Resume with: sylva-ray run {where} --resume"),
        ):
            summary = driver.run_prepared(prepared, run_dir, purpose == "resume", display.on_event, remote)
    console.print(closing_table(summary))
    uri = tracking_uri(experiment.tracking, run_dir) if experiment.tracking.enabled else None
    print_lines(console, closing_lines(summary, where, uri))
    return summary


def evaluate(
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
    out: str | Path | None = None,
    show: Show = "progress",
) -> dict[str, Any]:
    """Attack the trained, personal models of a run. What was measured before is not measured again.

    Args:
        run: the folder of a finished run, a path or a URL.
        attacks: each ``NAME`` or ``NAME:key=value,...``, e.g. ``pgd:steps=100,restarts=5``.
        suite: ``quick``, ``standard`` (AutoAttack) or ``full``; None: ``quick`` if there are no ``attacks``.
        images: test images per client; None: as many as the run had.
        epsilon: of suites, curves and checks, in pixel units (``"8/255"``); None: that of the run's first attack.
        checks: whether to run checks S1 to S14 (docs/checks.md).
        curves: whether to measure accuracy against epsilon and against steps.
        transfer: whether to attack every client's model through the others.
        surrogates: other runs, through whose models to attack as well.
        certify: noise levels for randomised smoothing.
        overrides: ``KEY=VALUE`` of ``cluster.*``, ``training.device`` and ``evaluation.precision`` only.
        out: the JSON file; None: ``evaluation.json`` in the run folder, whose report is written again.
        show: what is printed.

    Returns:
        What was found, as in ``evaluation.json``.

    Raises:
        UserError: no finished run, an unknown attack, a value out of range.
        RunError: it failed while running; the same call continues it.
    """
    from sylva_ray.evaluation.request import Extras, build_request
    from sylva_ray.evaluation.run import PARTS, assess, prepare_assessment, write_assessment
    from sylva_ray.execution.ray.driver import pool_for
    from sylva_ray.reports.terminal import AssessmentDisplay, assessment_tables, print_lines, wide_console
    from sylva_ray.storage.remote_copy import run_folder_at

    out = None if out is None else Path(out)
    _check_target("--out", out)
    with ExitStack() as stack:
        run_dir, _ = stack.enter_context(run_folder_at(str(run), "change"))
        others = [stack.enter_context(run_folder_at(str(other), "read"))[0] for other in surrogates]
        assessment = prepare_assessment(run_dir, images, others, overrides)
        config, fleet = assessment.prepared.config, assessment.prepared.fleet
        extras = Extras(checks, curves, transfer or bool(surrogates), tuple(certify))
        budget = None if epsilon is None else str(epsilon)
        request = build_request(config, attacks, suite, budget, extras, fleet.num_clients, fleet.num_classes)
        console = wide_console(show)
        with (
            AssessmentDisplay(console, show != "progress") as display,
            resumable(run_dir / PARTS, "What was measured is kept: the same command goes on from there"),
            pool_for(assessment.prepared, display.on_lost, display.on_waiting) as pool,
        ):
            found = assess(assessment, request, pool, display.on_event)
        path = write_assessment(run_dir, found, out)
        for table in assessment_tables(found):
            console.print(table)
        print_lines(console, [path])
        if out is None:
            print_lines(console, [_send_report(run_dir, config)])
    return found


def _send_report(run_dir: Path, config: ExperimentConfig) -> Path:
    """Write the report again and send it to MLflow; a server that does not answer is a warning."""
    from sylva_ray.observers.mlflow.tracker import send_run
    from sylva_ray.reports.pages.run import write_report

    path = write_report(run_dir)
    for problem in send_run(run_dir, config) if config.tracking.enabled else ():
        print(f"warning: {problem}", file=sys.stderr)
    return path


def sweep(
    space: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    show: Show = "progress",
) -> Sweep:
    """Run a sweep of experiments on Ray Tune (docs/sweeps.md).

    Args:
        space: a YAML file, or with ``resume`` a sweep's folder.
        overrides: ``KEY=VALUE`` of the space, or of the experiment of all trials.
        out: the sweep's folder, a local or mounted one; None: ``runs/NAME-TIME``.
        resume: whether to go on with the trials that have not finished.
        show: what is printed.

    Returns:
        The trials and the points. Look at ``failed``: a trial that failed raises nothing.

    Raises:
        UserError: a point is no experiment, a trial fits nowhere, the folder is not free; nothing was written.
        RunError: the sweep failed while running; ``resume=True`` continues it.
    """
    from sylva_ray.reports.terminal import print_lines, wide_console
    from sylva_ray.sweeps.folder import SweepFolder
    from sylva_ray.sweeps.space import load_space

    for name, place in (("SPACE", space), ("--out", out)):
        if place is not None and ":/" in str(place):
            raise UserError(name, str(place), "is a URL: a sweep's folder is a local or mounted one")
    if Path(space).is_dir():
        if overrides or not resume:
            fix = "is a folder: add --resume, without overrides, to go on with its sweep"
            raise UserError("SPACE", str(space), fix)
        loaded, out = SweepFolder(Path(space)).load(), out or space
    else:
        loaded = load_space(Path(space), overrides)
    if resume and out is None:
        raise UserError("--resume", str(space), "needs --out DIR (or the sweep's folder in place of SPACE)")

    from sylva_ray.sweeps.ray_tune import run_sweep
    from sylva_ray.sweeps.terminal import SweepDisplay, sweep_lines, sweep_table

    sweep_dir = Path(out or _new_folder(loaded.name))
    console = wide_console(show)
    how = f"Resume with: sylva-ray tune {sweep_dir} --resume"
    with SweepDisplay(console, show != "progress") as display, resumable(sweep_dir / "space.yaml", how):
        done = run_sweep(loaded, sweep_dir, resume, display.on_event)
    console.print(sweep_table(done))
    print_lines(console, sweep_lines(done, sweep_dir))
    return done


def compare(
    sources: Sequence[str | Path],
    *,
    out: Sequence[str | Path] = (),
    uri: str | None = None,
    show: Show = "progress",
) -> list[Row]:
    """Put runs beside each other: means and spread over seeds, what dominates what, what failed its checks.

    Args:
        sources: run folders, folders of runs, summaries (``FILE.json``), MLflow experiments.
        out: files to write, ``.html``, ``.csv`` or ``.md``.
        uri: the MLflow store; None: ``MLFLOW_TRACKING_URI``, else ``runs/mlflow.db``.
        show: what is printed.

    Returns:
        One row per stage of every experiment, over its seeds.

    Raises:
        UserError: a source that is not a finished run, a file that cannot be written.
    """
    from sylva_ray.observers.sources import load
    from sylva_ray.reports import compare as comparison
    from sylva_ray.reports.compare.files import check_targets, write
    from sylva_ray.reports.terminal import print_lines, wide_console
    from sylva_ray.storage.remote_copy import run_folder_at

    targets = [Path(target) for target in out]
    check_targets(targets)
    with ExitStack() as stack:
        local = [str(stack.enter_context(run_folder_at(str(source), "read"))[0]) for source in sources]
        summaries, left_out = load(local, uri)
    rows = comparison.compare(summaries)
    console = wide_console(show)
    for table in comparison.terminal_tables(rows, console.width):
        console.print(table)
        console.print()
    for style, lines in comparison.remarks(rows, left_out):
        print_lines(console, lines, style)
    for target in targets:
        write(rows, target, left_out)
    print_lines(console, targets)
    return rows


def load_run(run: str | Path) -> LoadedRun:
    """Read what a run folder holds; nothing is written and no model is built.

    Args:
        run: the run folder, a path or a URL.

    Returns:
        Config, client states, records, summary and evaluation.

    Raises:
        UserError: no such run, nothing in it yet, or a damaged file.
    """
    from sylva_ray.storage import run_folder
    from sylva_ray.storage.jsonl import read_records
    from sylva_ray.storage.remote_copy import run_folder_at
    from sylva_ray.storage.run_files import read_evaluation, read_summary

    with run_folder_at(str(run), "read") as (run_dir, _):
        config, states = run_folder.load_run(run_dir)
        records = read_records(run_dir / run_folder.RECORDS)
        return LoadedRun(config, states, records, read_summary(run_dir), read_evaluation(run_dir))


def export(
    run: str | Path, to: str | Path, clients: Sequence[int] | None = None, *, merged: bool = False
) -> list[Path]:
    """Write clients as PEFT adapters; load them with ``PeftModel.from_pretrained`` on the timm model.

    Args:
        run: the run folder, a path or a URL.
        to: the folder that gets ``client_000/``, ``client_001/``, ...
        clients: which clients; None: all.
        merged: whether to write the whole model with the adapter merged in, too.

    Returns:
        One folder per client.

    Raises:
        UserError: no such run or client, or the run trained full models, which have no adapters.
    """
    from sylva_ray.models.export import export_clients

    loaded = load_run(run)
    everyone = range(len(loaded.states))
    for client in clients or ():
        if client not in everyone:
            raise UserError("--client", client, f"must be all or 0 to {len(everyone) - 1}")
    return export_clients(loaded.config, loaded.states, everyone if clients is None else clients, Path(to), merged)


def report(run: str | Path) -> Path:
    """Write ``report.html`` again from the run folder's files.

    Args:
        run: the run folder, a path or a URL.

    Returns:
        The report.

    Raises:
        UserError: no such run, or nothing in it yet.
    """
    from sylva_ray.reports.pages.run import write_report
    from sylva_ray.storage import run_folder
    from sylva_ray.storage.remote_copy import run_folder_at

    with run_folder_at(str(run), "change") as (run_dir, _):
        run_folder.load_run(run_dir)
        return write_report(run_dir)


def track(run: str | Path, overrides: Sequence[str] = ()) -> None:
    """Send to MLflow what it lacks of a run.

    Args:
        run: the run folder, a path or a URL.
        overrides: ``tracking.*`` as ``KEY=VALUE``, e.g. ``tracking.uri=...`` for another server.

    Raises:
        UserError: no such run, or nothing in it yet.
        RunError: MLflow could not be given everything.
    """
    from sylva_ray.observers.mlflow.tracker import send_run
    from sylva_ray.storage import run_folder
    from sylva_ray.storage.remote_copy import run_folder_at

    with run_folder_at(str(run), "change") as (run_dir, _):
        run_folder.load_run(run_dir)
        problems = send_run(run_dir, load_run_config(run_dir, overrides))
    if problems:
        raise RunError("; ".join(problems))


def pretrain(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path = "runs/pretrain",
    resume: bool = False,
    show: Show = "progress",
) -> Path:
    """Train a backbone where none can be downloaded.

    Args:
        config: a YAML file.
        overrides: ``KEY=VALUE`` with dotted keys.
        out: the folder of checkpoints, log and result.
        resume: whether to go on from the newest checkpoint.
        show: what is printed.

    Returns:
        The backbone, a safetensors file.

    Raises:
        UserError: a mistake in the configuration, or a folder that is not free.
    """
    from sylva_ray.pretraining import trainer
    from sylva_ray.reports.terminal import event_line, print_lines, wide_console

    console = wide_console("progress" if show == "progress" else "nothing")
    return trainer.pretrain(
        trainer.load_pretrain_config(config, overrides),
        Path(out),
        resume,
        lambda event: print_lines(console, [event_line(event)]),
    )


def traffic(
    backbone: str | None = None,
    *,
    ranks: Sequence[int] = (),
    target_modules: Sequence[str] = (),
    num_classes: int = 10,
    methods: Sequence[str] = (),
    num_clients: int = 10,
    csv: str | Path | None = None,
    show: Show = "progress",
) -> list[TrafficRow]:
    """Compute the bytes per client and round of every method, and compare them to the full model.

    Args:
        backbone: a timm model with a linear classifier; None: the one that ships with this package.
        ranks: LoRA ranks; none: the default rank.
        target_modules: adapted layers; none: the default ones.
        num_classes: classes of the data set, at least 2.
        methods: names of methods; none: all.
        num_clients: how many clients' factors FLoRA and FedEx-LoRA send down.
        csv: a file that gets the table, too.
        show: what is printed.

    Returns:
        One row per method, rank and compression.

    Raises:
        UserError: an unknown backbone or method, a rank that does not fit, a file that cannot be written.
    """
    lora = LoraSection(**({"target_modules": tuple(target_modules)} if target_modules else {}))
    ranks = ranks or [lora.rank]
    for rank in ranks:
        build(LoraSection, {"rank": rank}, "lora")
    csv = None if csv is None else Path(csv)
    _check_target("--csv", csv)

    from sylva_ray.reports.terminal import print_lines, wide_console
    from sylva_ray.reports.traffic import terminal_table, traffic_table, write_csv

    section = BackboneSection(name=backbone) if backbone else BackboneSection()
    rows = traffic_table(section, lora, ranks, num_classes, methods or None, num_clients)
    title = f"{section.name}, {num_classes} classes, {', '.join(lora.target_modules)}: bytes per client and round"
    console = wide_console(show)
    if not console.is_terminal:
        console.width = 112  # room for the methods' names
    console.print(terminal_table(rows, title))
    if csv is not None:
        write_csv(rows, csv)
        print_lines(console, [csv])
    return rows


def check_cluster(file: str | Path, config: Config | None = None, overrides: Sequence[str] = ()) -> list[str]:
    """Check a cluster file offline, and say what a run would ask of the cluster. Nothing is started.

    Args:
        file: a ``cluster.yaml`` for ``ray up``.
        config: an experiment; None: the file alone is checked.
        overrides: ``KEY=VALUE`` of the experiment.

    Returns:
        Lines of text.

    Raises:
        UserError: a mistake in one of the files.
    """
    if overrides and config is None:
        raise UserError("override", overrides[0], "changes a run's config, and there is none: add --config CONFIG")

    from sylva_ray.provisioning.demand import demand_lines, demand_of, launcher_lines
    from sylva_ray.provisioning.launcher_file import load_launcher_file

    launcher = load_launcher_file(Path(file))
    lines = launcher_lines(launcher)
    if config is not None:
        lines += demand_lines(demand_of(load_config(config, overrides), launcher), launcher)
    return lines


def _new_folder(name: str) -> Path:
    """A folder in ``runs/`` that is named by the time."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _check_target(key: str, path: Path | None) -> None:
    """Whether a file can be written there.

    Raises:
        UserError: it is a folder, or its folder does not exist.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(key, str(path), "is a folder" if path.is_dir() else "its folder does not exist")


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested mappings, so that overrides do not change the caller's."""
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
