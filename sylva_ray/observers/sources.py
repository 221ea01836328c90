"""Loading of finished runs for a comparison, from run folders, folders of runs, JSON files and MLflow experiments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sylva_ray.config.schema import build
from sylva_ray.config.stored import RUN_CONFIG
from sylva_ray.config.tracking import TrackingSection
from sylva_ray.core.credentials import mask_value
from sylva_ray.core.errors import UserError, asked_as, reason_of
from sylva_ray.core.files import read_regular_file, read_text_file
from sylva_ray.core.text import as_argument
from sylva_ray.core.yaml import YamlError, parse_yaml
from sylva_ray.observers.mlflow.tracker import experiment_files, tracking_uri
from sylva_ray.reports.compare.runs import Run
from sylva_ray.storage.reading import parse_json
from sylva_ray.storage.run_folder import SPACE, SUMMARY, TRIALS, RunFolder

ALLOWED = (
    "give a run folder, a folder of run folders, a summary as FILE.json, or an MLflow EXPERIMENT (or EXPERIMENT/SWEEP)"
)
"""End of the error messages about a source."""


def load_runs(sources: Sequence[str], uri: str | None = None) -> tuple[list[Run], list[str]]:
    """Load finished runs, for `sylva_ray.reports.compare.compare`.

    Args:
        sources: run folders, folders of run folders (or of a sweep), JSON files with a summary, and names of MLflow
            experiments, each optionally followed by ``/`` and the name of a sweep.
        uri: address of the MLflow store; default ``MLFLOW_TRACKING_URI``, else ``runs/mlflow.db``.

    Returns:
        The runs, and one sentence for each run of a folder or experiment that is left out because it has not finished.

    Raises:
        UserError: a source is none of these, cannot be read, or holds no finished run.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_file():
            runs.append(_from_file(path))
        elif RunFolder(path).summary_file.is_file():
            runs.append(_from_file(RunFolder(path).summary_file, str(path)))
        elif path.is_dir():
            finished, folders = _from_folder(path)
            runs += finished
            left_out += [f"{folder} has not finished and is left out" for folder in folders]
        else:
            finished, names = _from_mlflow(source, uri)
            runs += finished
            left_out += [f"run {name!r} of experiment {source!r} has no {SUMMARY} and is left out" for name in names]
    return runs, left_out


def _from_file(path: Path, source: str | None = None) -> Run:
    """Read a summary. In a run folder its ``config.yaml`` is read, too, and must be that of the checkpoints."""
    try:
        content = read_regular_file(path, "RUN")
    except FileNotFoundError:
        raise UserError("RUN", str(path), f"is gone; {ALLOWED}") from None
    folder = RunFolder(path.parent)
    if path != folder.summary_file:
        return _parse(content, None, source or str(path))
    if folder.checkpoints.root.exists():
        folder.check_config()
    config = read_text_file(folder.config_file) if folder.config_file.exists() else None
    return _parse(content, config, source or str(path))


def _parse(summary: bytes | str, config: str | None, source: str) -> Run:
    """Parse a summary and its config (None: not available)."""
    try:
        content = parse_json(summary)
    except ValueError as error:
        raise UserError("RUN", source, f"is not JSON ({error}); {ALLOWED}") from None
    with asked_as("RUN", "file"):
        run = Run.from_json(content, source)
    if config is not None:
        try:
            parsed = parse_yaml(config)
        except YamlError as error:
            raise UserError("RUN", source, f"has a damaged {RUN_CONFIG} ({error})") from None
        run = run.model_copy(update={"config": parsed}) if isinstance(parsed, dict) else run
    return run.model_copy(update={"source": source})


def _from_folder(folder: Path) -> tuple[list[Run], list[Path]]:
    """Return the finished runs in a folder of run folders, and the folders of the others.

    A sweep keeps its runs in a folder of their own.
    """
    is_sweep, given = (folder / SPACE).is_file(), folder
    folder = folder / TRIALS if is_sweep else folder
    if RunFolder(folder).config_file.is_file():
        raise UserError(
            "RUN", str(folder), f"has not finished; resume it with: sylva-ray run {as_argument(folder)} --resume"
        )
    runs = [RunFolder(path) for path in (sorted(folder.iterdir()) if folder.is_dir() else [])]
    finished = [run for run in runs if run.summary_file.is_file()]
    unfinished = [run.path for run in runs if run.config_file.is_file() and run not in finished]
    if not finished and (unfinished or is_sweep):
        command = f"tune {as_argument(given)}" if is_sweep else f"run {as_argument(unfinished[0])}"
        raise UserError("RUN", str(given), f"holds no finished run; resume with: sylva-ray {command} --resume")
    if not finished:
        raise UserError("RUN", str(folder), f"is not a run folder and does not contain one; {ALLOWED}")
    return [_from_file(run.summary_file, str(run)) for run in finished], unfinished


def _from_mlflow(experiment: str, uri: str | None) -> tuple[list[Run], list[str]]:
    """Return the finished runs of an MLflow experiment, and the names of the others."""
    with asked_as("--uri", "tracking.uri"):
        section = build(TrackingSection, {"uri": uri}, "tracking")
        store = tracking_uri(section, Path("runs/NAME"))  # where runs are by default
    shown_uri = mask_value(store)
    if not _may_exist(store):
        reason = f"there is no MLflow store at {shown_uri} (choose another with --uri)"
        raise UserError("RUN", experiment, f"is not a file or folder, and {reason}; {ALLOWED}")
    try:
        runs = experiment_files(experiment, store, (SUMMARY, RUN_CONFIG))
        if runs is None and "/" in experiment:
            name, _, sweep = experiment.rpartition("/")
            runs = experiment_files(name, store, (SUMMARY, RUN_CONFIG), sweep)
    except Exception as error:  # a server, a driver or a proxy may raise anything
        fix = f"the request for experiment {experiment!r} failed ({reason_of(error, store)})"
        raise UserError("--uri", shown_uri, fix) from None
    if runs is None:
        reason = f"MLflow at {shown_uri} has no experiment of that name"
        raise UserError("RUN", experiment, f"is not a file or folder, and {reason}; {ALLOWED}")
    finished = [run for run in runs.values() if SUMMARY in run.files]
    if not finished:
        raise UserError("RUN", experiment, f"the MLflow experiment at {shown_uri} has no run with a {SUMMARY}")
    loaded = [_parse(run.files[SUMMARY], run.files.get(RUN_CONFIG), f"{experiment}/{run.name}") for run in finished]
    return loaded, [run.name for run in runs.values() if SUMMARY not in run.files]


def _may_exist(uri: str) -> bool:
    """Return False for a store in files that do not exist; MLflow would create them when it is asked."""
    place = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else uri.removeprefix("file://")
    return "://" in place or os.path.exists(place)
