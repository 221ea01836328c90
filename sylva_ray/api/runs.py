"""Runs and sweeps: start, resume, load and repair them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sylva_ray.api.arguments import check_show, check_texts
from sylva_ray.config import experiment as experiments
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.recipes import asked_for, recipe_or_path
from sylva_ray.config.schema import build, overridden
from sylva_ray.config.stored import load_run_config
from sylva_ray.core.bounds import MAX_DEPTH
from sylva_ray.core.credentials import mask_value
from sylva_ray.core.errors import UserError, asked_as
from sylva_ray.core.locations import is_url, local_path, output_path, run_location
from sylva_ray.core.own_code import import_options, importing_from
from sylva_ray.core.resumable import resumable
from sylva_ray.core.text import LogFormat, Show, as_argument
from sylva_ray.reports.output import Output

if TYPE_CHECKING:
    from sylva_ray.core.evaluation import Evaluation
    from sylva_ray.core.records import StageRecord
    from sylva_ray.core.summary import Summary
    from sylva_ray.core.types import ClientState
    from sylva_ray.federation.observer import Observer
    from sylva_ray.storage.run_folder import RunFolder
    from sylva_ray.sweeps.results import Sweep


Config = str | Path | Mapping[str, Any] | ExperimentConfig
"""An experiment: a YAML file, the name of a recipe, a run folder (its ``config.yaml``), a mapping of sections, or a
checked configuration."""


@dataclass(frozen=True)
class LoadedRun:
    """The contents of a run folder.

    Attributes:
        config: the configuration, resolved.
        states: the newest state of every client, ``{parameter name: array}``, float32: of adapters
            ``lora_A [rank, inputs]`` and ``lora_B [outputs, rank]``, of the head ``[num_classes, width]`` and
            ``[num_classes]``; of a whole model the shapes of its parameters.
        records: one record per stage, as in ``rounds.jsonl``.
        summary: ``summary.json``; None while the run has not finished.
        evaluation: ``evaluation.json``; None where `evaluate` has not run.
    """

    config: ExperimentConfig
    states: Sequence[ClientState]
    records: Sequence[StageRecord]
    summary: Summary | None
    evaluation: Evaluation | None


def load_config(
    config: Config, overrides: Sequence[str] = (), *, imports: Sequence[str | Path] = ()
) -> ExperimentConfig:
    """Read and check an experiment.

    Args:
        config: see `Config`.
        overrides: ``KEY=VALUE`` with dotted keys, e.g. ``training.rounds=5``.
        imports: directories of your own attacks' code.

    Returns:
        The checked configuration.

    Raises:
        UserError: a missing file, an unknown key, a value out of range.
    """
    check_texts("overrides", overrides)
    with importing_from(imports):
        return _load_config(config, overrides)


def _load_config(config: Config, overrides: Sequence[str]) -> ExperimentConfig:
    if isinstance(config, ExperimentConfig):
        return build(ExperimentConfig, overridden(config.model_dump(mode="json"), overrides)) if overrides else config
    if isinstance(config, Mapping):
        return build(ExperimentConfig, overridden(_copied(config), overrides))
    if not isinstance(config, str | Path):
        fix = "must be a YAML file, a run folder, a mapping of sections, or an ExperimentConfig"
        raise UserError("config", config, fix)
    if "://" in str(config):
        raise UserError(
            "config", str(config), "is a URL, which only `resume` takes; give a YAML file or a local folder"
        )
    path = recipe_or_path("CONFIG", config, "experiment")
    with asked_for("CONFIG", path, "experiment"), asked_as("CONFIG", "file"):
        return load_run_config(path, overrides) if path.is_dir() else experiments.load_config(path, overrides)


def add_dataset(name: str, train: object, test: object) -> None:
    """Make two objects a data set of this process: ``dataset.name`` may then be ``name``.

    A command that continues or evaluates such a run in another process needs the same call before it. Trials of a sweep
    run in processes of their own, and need a function ``package.module:function`` instead.

    Args:
        name: letters, digits, ``_`` and ``-``.
        train: a `torch.utils.data.Dataset` of pairs (image, label), or a `datasets.Dataset` of Hugging Face with the
            columns ``image`` and ``label``. An image is one of Pillow, ``[H, W, 3] uint8``, or a tensor ``[3, H, W]``
            in [0, 1]; labels are integers from 0.
        test: likewise.

    Raises:
        UserError: the name has other characters, or an object is no such data set.
    """
    from sylva_ray.data import own

    own.add_dataset(name, train, test)


def run(
    config: Config,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    imports: Sequence[str | Path] = (),
    show: Show = "progress",
    log_format: LogFormat | None = None,
    observer: Observer | None = None,
) -> Summary:
    """Run one experiment: both phases, evaluation, report.

    Args:
        config: see `Config`.
        overrides: ``KEY=VALUE`` with dotted keys.
        out: the run folder, a path or a URL; None: ``runs/NAME-TIME``.
        imports: directories of your own methods' code; what a configuration names is imported from no other.
        show: what is printed: ``tasks``, ``progress``, ``result`` or ``nothing`` (`sylva_ray.core.text.Show`).
        log_format: None: bars and tables; ``plain``: lines with time stamps in place of the bars; ``json``: one JSON
            object per event and nothing else (`sylva_ray.reports.run_log.RunLog`).
        observer: is told of stages, tasks, records and notices as they come (`sylva_ray.federation.observer.Observer`);
            its errors end the run, which can then be resumed.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: the experiment cannot run, or the run folder is not free; nothing was written.
        RunError: it failed while running; `resume` continues it.
    """
    check_show(show, log_format)
    with importing_from(imports):
        experiment = load_config(config, overrides)
        where = _new_folder(experiment.name) if out is None else run_location("--out", out)
        if not is_url(where):
            output_path("--out", where, "folder")
        return _run_in_folder(where, experiment, (), "start", Output(show, log_format), observer=observer)


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    config: Config | None = None,
    allow_changed: bool = False,
    imports: Sequence[str | Path] = (),
    show: Show = "progress",
    log_format: LogFormat | None = None,
    observer: Observer | None = None,
) -> Summary:
    """Continue a run from its newest checkpoint, to the same result as if it had never stopped.

    A run that has finished is read, and nothing is computed or written again.

    Args:
        run: the run folder, a path or a URL.
        overrides: ``KEY=VALUE`` with dotted keys; only ``cluster`` and ``tracking`` may change, and
            ``training.rounds`` of a run in a local folder may grow where the schedule allows it (docs/howto.md).
        config: the experiment that the folder must hold; None: whatever it holds.
        allow_changed: whether data and weights may differ from those that the run began with; ``summary.json`` then
            says so.
        imports: directories of your own methods' code; what a configuration names is imported from no other.
        show: what is printed: ``tasks``, ``progress``, ``result`` or ``nothing`` (`sylva_ray.core.text.Show`).
        log_format: as of `run`.
        observer: as of `run`.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: the folder holds no run, or another one.
        RunError: it failed while running.
    """
    check_show(show, log_format)
    check_texts("overrides", overrides)
    with importing_from(imports):
        experiment = None if config is None else load_config(config, overrides)
        output = Output(show, log_format)
        with asked_as("RUN" if config is None else "--out", "RUN", "--out", "run folder"):
            where = run_location("RUN", run)
            return _run_in_folder(where, experiment, overrides, "resume", output, allow_changed, observer)


def _run_in_folder(
    where: str,
    experiment: ExperimentConfig | None,
    overrides: Sequence[str],
    purpose: Literal["start", "resume"],
    output: Output,
    allow_changed: bool = False,
    observer: Observer | None = None,
) -> Summary:
    from sylva_ray.reports.console import print_lines, working_on
    from sylva_ray.storage.remote_copy import run_folder_at

    console = output.console()
    with run_folder_at(where, purpose) as (folder, remote):
        with working_on(console, f"preparing {mask_value(where)}", quiet=not output.has_bars):
            from sylva_ray.federation.observer import Guarded, Observers
            from sylva_ray.observers.mlflow.tracker import tracking_uri
            from sylva_ray.observers.registry import check_observers
            from sylva_ray.preparation.experiment import prepare
            from sylva_ray.preparation.extension import plan_extension

            folder.check_claim(None, purpose == "resume")
            experiment = experiment or folder.load_config(overrides)
            check_observers(experiment.tracking.observers)
            uri = tracking_uri(experiment.tracking, folder.path) if experiment.tracking.enabled else None
            plan = plan_extension(folder, experiment) if purpose == "resume" and remote is None else None
            finished = _finished(folder, experiment) if purpose == "resume" and plan is None else None
            prepared = prepare(experiment, folder) if finished is None else None
        if prepared is None:
            assert finished is not None
            summary = finished
            print_lines(console, [f"{mask_value(where)} has finished: nothing is computed or written again"])
        else:
            from sylva_ray.execution.run import run_prepared

            resume = f"sylva-ray run {as_argument(mask_value(where))} --resume{import_options()}"
            instruction = f"The finished stages are kept. Resume with: {resume}"
            with output.observing(console, folder) as displays, resumable(folder.config_file, instruction):
                observers = Observers([*map(Guarded, displays), *([] if observer is None else [observer])])
                summary = run_prepared(prepared, folder, purpose == "resume", observers, remote, allow_changed, plan)
        output.print_result(console, summary, folder, mask_value(where), uri)
    return summary


def _finished(folder: RunFolder, experiment: ExperimentConfig) -> Summary | None:
    """Return the summary of a run that has finished; None where something is left to do.

    The folder stays as it is, but for ``tracking.json`` if MLflow lacks something of the run, which is then sent.

    Raises:
        UserError: the folder holds another experiment.
    """
    from sylva_ray.observers.mlflow.tracker import send_rest
    from sylva_ray.preparation.experiment import as_stored

    summary = folder.load_finished()
    if summary is not None:
        folder.check_same(as_stored(experiment, folder.load_config()))
        for problem in send_rest(folder, experiment) if experiment.tracking.enabled else ():
            print(f"warning: {problem}", file=sys.stderr)
    return summary


def sweep(
    space: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    allow_changed: bool = False,
    imports: Sequence[str | Path] = (),
    show: Show = "progress",
    log_format: LogFormat | None = None,
) -> Sweep:
    """Run a sweep of experiments on Ray Tune (docs/sweeps.md).

    Args:
        space: a YAML file or the name of a recipe, or with ``resume`` a sweep's folder.
        overrides: ``KEY=VALUE`` of the space, or of the experiment of all trials.
        out: the sweep's folder, a local or mounted one; None: ``runs/NAME-TIME``.
        resume: whether to go on with the trials that have not finished.
        allow_changed: whether data and weights may differ from those that these trials began with.
        imports: directories of your own methods' code; what a configuration names is imported from no other.
        show: what is printed: ``tasks``, ``progress``, ``result`` or ``nothing`` (`sylva_ray.core.text.Show`).
        log_format: None: bars and a table; ``plain``: lines with time stamps in place of the bars; ``json``: one JSON
            object per event and nothing else (`sylva_ray.sweeps.terminal.SweepLog`).

    Returns:
        The trials and the points. Look at ``failed``: a trial that failed raises nothing.

    Raises:
        UserError: a point is not a valid experiment, a trial fits nowhere, the folder is not free; nothing was written.
        RunError: the sweep failed while running; ``resume=True`` continues it.
    """
    check_show(show, log_format)
    check_texts("overrides", overrides)
    with importing_from(imports):
        return _run_sweep(space, overrides, out, resume, allow_changed, Output(show, log_format))


def _run_sweep(
    space: str | Path,
    overrides: Sequence[str],
    out: str | Path | None,
    resume: bool,
    allow_changed: bool,
    output: Output,
) -> Sweep:
    """Run a sweep; the arguments are those of `sweep`."""
    from sylva_ray.sweeps.folder import SweepFolder
    from sylva_ray.sweeps.space import load_space

    path, out = recipe_or_path("SPACE", space, "space"), None if out is None else local_path("--out", out)
    if path.is_dir():
        if overrides or not resume:
            fix = "is a folder: add --resume, without overrides, to go on with its sweep"
            raise UserError("SPACE", str(space), fix)
        loaded, folder_key = SweepFolder(path).load(), "SPACE" if out is None else "--out"
        out = path if out is None else out
    else:
        with asked_for("SPACE", path, "space"):
            loaded, folder_key = load_space(path, overrides), "--out"
    if resume and out is None:
        raise UserError("--resume", str(space), "needs --out FOLDER (or the sweep's folder in place of SPACE)")

    from sylva_ray.sweeps.check import check_sweep
    from sylva_ray.sweeps.folder import SweepFolder
    from sylva_ray.sweeps.terminal import observing_sweep, print_sweep

    with asked_as(folder_key, "--out"):
        sweep_dir = output_path("--out", _new_folder(loaded.name) if out is None else out, "folder")
        loaded = check_sweep(loaded, sweep_dir, resume)

    from sylva_ray.sweeps.ray_tune import run_checked_sweep  # Ray: after what needs no cluster

    console = output.console()
    instruction = (
        f"The finished trials are kept. Resume with: sylva-ray tune {as_argument(sweep_dir)} --resume{import_options()}"
    )
    with observing_sweep(console, output) as on_event, resumable(SweepFolder(sweep_dir).space, instruction):
        done = run_checked_sweep(loaded, sweep_dir, resume, on_event, allow_changed)
    print_sweep(console, output, done, sweep_dir)
    return done


def load_run(run: str | Path) -> LoadedRun:
    """Read what a run folder holds; nothing is written and no model is built.

    Args:
        run: the run folder, a path or a URL.

    Returns:
        Config, client states, records, summary and evaluation.

    Raises:
        UserError: no such run, nothing in it yet, or a damaged file.
    """
    from sylva_ray.storage.remote_copy import run_folder_at

    with run_folder_at(str(run), "read") as (folder, _):
        states = folder.load_states()
        return LoadedRun(
            folder.load_config(), states, folder.load_records(), folder.load_summary(), folder.load_evaluation()
        )


def repair(run: str | Path) -> list[str]:
    """Restore ``config.yaml`` and other files of a run folder from its newest checkpoint, as far as they are damaged.

    Args:
        run: the run folder, a path or a URL.

    Returns:
        One sentence for everything that was done; none where nothing was necessary.

    Raises:
        UserError: there is no checkpoint to repair from, or another process uses the folder.
    """
    from sylva_ray.storage.remote_copy import run_folder_at
    from sylva_ray.storage.repair import repair_run

    with run_folder_at(str(run), "repair") as (folder, _):
        return repair_run(folder)


def _new_folder(name: str) -> str:
    """Return a new folder in ``runs/``, named by the time."""
    return f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _copied(tree: Any, depth: int = 0) -> Any:
    """Copy nested mappings and lists, so that overrides do not change those of the caller.

    Raises:
        UserError: they are nested too deeply, perhaps without end.
    """
    if depth > MAX_DEPTH:
        fix = f"has more than {MAX_DEPTH} lists and mappings inside each other"
        raise UserError("config", type(tree).__name__, fix)
    if isinstance(tree, Mapping):
        return {key: _copied(value, depth + 1) for key, value in tree.items()}
    return [_copied(value, depth + 1) for value in tree] if isinstance(tree, list) else tree
