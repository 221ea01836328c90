"""Where the summaries of a comparison come from: run folders, folders of runs, JSON files, MLflow experiments."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from sylva_ray.config.experiment import CONFIG, TrackingSection
from sylva_ray.core.credentials import mask_credentials
from sylva_ray.core.errors import UserError
from sylva_ray.observers.mlflow.tracker import experiment_files, tracking_uri
from sylva_ray.reports.compare.runs import Run
from sylva_ray.storage.run_folder import SUMMARY

ALLOWED = (
    "give a run folder, a folder of run folders, a summary as FILE.json, or an MLflow EXPERIMENT (or EXPERIMENT/SWEEP)"
)


def load_runs(sources: Sequence[str], uri: str | None = None) -> tuple[list[Run], list[str]]:
    """The summaries behind ``sources``, for `sylva_ray.reports.compare.compare`, and what was left out of folders and
    experiments because it has not finished.

    Args:
        uri: the MLflow store; default ``MLFLOW_TRACKING_URI``, else ``runs/mlflow.db``.

    Raises:
        UserError: names the source that is none of these, or not finished.
    """
    summaries: list[Run] = []
    left_out: list[str] = []
    for source in sources:
        path = Path(source)
        if path.is_file():
            summaries.append(_from_file(path))
        elif (path / SUMMARY).is_file():
            summaries.append(_from_file(path / SUMMARY, str(path)))
        elif path.is_dir():
            found, runs = _from_folder(path)
            summaries += found
            left_out += [f"{run} has not finished and is left out" for run in runs]
        else:
            found, unfinished = _from_mlflow(source, uri)
            summaries += found
            left_out += [f"run {run!r} of experiment {source!r} has no {SUMMARY} and is left out" for run in unfinished]
    return summaries, left_out


def _from_file(path: Path, source: str | None = None) -> Run:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("RUN", str(path), f"cannot be read ({error}); {ALLOWED}") from None
    config = path.with_name(CONFIG)
    try:
        config_text = config.read_text(encoding="utf-8") if config.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("RUN", str(config), f"cannot be read ({error})") from None
    return _loaded(text, config_text, source or str(path))


def _loaded(text: str, config: str | None, source: str) -> Run:
    """Check a summary, and put its config beside it."""
    try:
        summary = json.loads(text)
    except ValueError as error:
        raise UserError("RUN", source, f"is not JSON ({error}); {ALLOWED}") from None
    run = Run.from_json(summary, source)
    if config is not None:
        try:
            known = yaml.safe_load(config)
        except yaml.YAMLError as error:
            raise UserError("RUN", source, f"has a damaged {CONFIG} ({' '.join(str(error).split())})") from None
        run = run.model_copy(update={"config": known}) if isinstance(known, dict) else run
    return run.model_copy(update={"source": source})


def _from_folder(folder: Path) -> tuple[list[Run], list[Path]]:
    """Summaries of the run folders in ``folder`` (a sweep keeps its own in ``trials``) and, beside them, runs that have not
    finished."""
    folder = folder / "trials" if (folder / "space.yaml").is_file() else folder
    if (folder / CONFIG).is_file():
        raise UserError("RUN", str(folder), f"has not finished; resume it with: sylva-ray run {folder} --resume")
    runs = sorted(path for path in folder.iterdir() if (path / CONFIG).is_file() or (path / SUMMARY).is_file())
    finished = [run for run in runs if (run / SUMMARY).is_file()]
    unfinished = [run for run in runs if run not in finished]
    if not finished and unfinished:
        raise UserError(
            "RUN", str(folder), f"holds no finished run; resume with: sylva-ray run {unfinished[0]} --resume"
        )
    if not finished:
        raise UserError("RUN", str(folder), f"is no run folder and holds none; {ALLOWED}")
    return [_from_file(run / SUMMARY, str(run)) for run in finished], unfinished


def _from_mlflow(experiment: str, uri: str | None) -> tuple[list[Run], list[str]]:
    store = tracking_uri(TrackingSection(uri=uri), Path("runs") / "any")
    shown = mask_credentials(store)
    if not _may_exist(store):
        where = f"there is no MLflow store at {shown} (--uri names another)"
        raise UserError("RUN", experiment, f"no such file or folder, and {where}; {ALLOWED}")
    try:
        runs = experiment_files(experiment, store, (SUMMARY, CONFIG))
        if runs is None and "/" in experiment:
            name, _, sweep = experiment.rpartition("/")
            runs = experiment_files(name, store, (SUMMARY, CONFIG), sweep)
    except Exception as error:  # whatever a server, a driver or a proxy may throw
        reason = mask_credentials(" ".join(str(error).split())[:200]) or type(error).__name__
        raise UserError("--uri", shown, f"MLflow cannot be asked about experiment {experiment!r} ({reason})") from None
    if runs is None:
        raise UserError(
            "RUN", experiment, f"no such file or folder, and no experiment of that name in MLflow at {shown}; {ALLOWED}"
        )
    finished = [(name, files) for name, files in runs.values() if SUMMARY in files]
    if not finished:
        raise UserError("RUN", experiment, f"the MLflow experiment at {shown} has no run with a {SUMMARY}")
    found = [_loaded(files[SUMMARY], files.get(CONFIG), f"{experiment}/{name}") for name, files in finished]
    return found, [name for name, files in runs.values() if SUMMARY not in files]


def _may_exist(uri: str) -> bool:
    """False for a store of files that are not there; asking MLflow for it would make them."""
    place = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else uri.removeprefix("file://")
    return "://" in place or os.path.exists(place)
