"""The folder of a run: the names of its files, who may write to it, and what it holds.

::

    config.yaml       the experiment, resolved           checkpoint/     client states after the last stages
    rounds.jsonl      one record per stage               adapters/       PEFT adapters, ``client_000/`` ...
    summary.json      what was found                     predictions.safetensors   answers on the test images
    evaluation.json   what `sylva-ray evaluate` found    evaluation/     its finished measurements
    report.html       all of it, drawn                   tracking.json   what MLflow has received
    missing.jsonl     who missed which deadline
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from sylva_ray.config.experiment import CONFIG, ExperimentConfig, load_run_config, with_choices_of
from sylva_ray.core.errors import UserError
from sylva_ray.core.evaluation import Evaluation
from sylva_ray.core.records import StageRecord
from sylva_ray.core.summary import Summary
from sylva_ray.storage.atomic import write_atomically, write_json
from sylva_ray.storage.checkpoint import CheckpointFolder
from sylva_ray.storage.claim import check_claim, is_empty
from sylva_ray.storage.jsonl import append_record, read_records, rewrite_records

T = TypeVar("T")

RECORDS, SUMMARY, CHECKPOINTS = "rounds.jsonl", "summary.json", "checkpoint"


class RunFolder:
    """The files of one run. Creating the object touches no file.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / CONFIG
        self.records_file = self.path / RECORDS
        self.summary_file = self.path / SUMMARY
        self.evaluation_file = self.path / "evaluation.json"
        self.report_file = self.path / "report.html"
        self.predictions_file = self.path / "predictions.safetensors"
        self.tracking_file = self.path / "tracking.json"
        self.missing_file = self.path / "missing.jsonl"
        self.adapters = self.path / "adapters"
        self.measurements = self.path / "evaluation"
        self.checkpoints = CheckpointFolder(self.path / CHECKPOINTS)

    def __str__(self) -> str:
        return str(self.path)

    # -- who may write ---------------------------------------------------------------------------------------------------

    def claim(self, config: ExperimentConfig, resume: bool) -> None:
        """Write ``config.yaml``, or check that the one in the folder describes the same experiment.

        Only ``cluster`` (but its threads) and ``tracking`` may differ on resume: they do not change the result.

        Args:
            config: resolved.
            resume: whether the folder must hold this run already; else it must be free.

        Raises:
            UserError: the folder is not free, holds no run to resume, holds another one, or cannot be written.
        """
        is_present = self.config_file.exists()
        check_claim(str(self), "run", is_present=is_present, is_empty=is_empty(self.path), resume=resume)
        difference = _difference(self.load_config(), config) if is_present else ""
        if difference:
            raise UserError("--out", str(self), f"holds a run with another config ({difference})")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config_file, config.to_yaml())
        except OSError as error:
            raise UserError("--out", str(self), f"cannot be written ({error.strerror})") from None

    def check_has_run(self) -> None:
        """Check that the folder holds a run.

        Raises:
            UserError: it does not.
        """
        if not self.config_file.exists():
            raise UserError("RUN", str(self), f"is no run folder (no {CONFIG} in it)")

    # -- what it holds ---------------------------------------------------------------------------------------------------

    def load_config(self, overrides: Sequence[str] = ()) -> ExperimentConfig:
        """Return the configuration, with ``KEY=VALUE`` overrides.

        Raises:
            UserError: as `sylva_ray.config.experiment.load_run_config`.
        """
        return load_run_config(self.path, overrides)

    def load_states(self) -> list[dict[str, np.ndarray]]:
        """Return the newest states of the K clients.

        Raises:
            UserError: no run there, or no checkpoint in it.
        """
        self.check_has_run()
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            raise UserError("RUN", str(self), "has no checkpoint yet")
        return checkpoint.states

    def load_records(self) -> list[StageRecord]:
        """Return the records of all completed stages, oldest first.

        Raises:
            UserError: a line is not a record; names it.
        """
        lines = read_records(self.records_file)
        return [StageRecord.from_json(line, f"{self.records_file}, line {n}") for n, line in enumerate(lines, 1)]

    def write_records(self, records: Sequence[StageRecord]) -> None:
        """Replace ``rounds.jsonl``."""
        rewrite_records(self.records_file, [record.to_json() for record in records])

    def load_summary(self) -> Summary | None:
        """Return ``summary.json``; None while the run has not finished.

        Raises:
            UserError: the file is damaged.
        """
        return _read(self.summary_file, Summary.from_json, "resume the run to write it again")

    def write_summary(self, summary: Summary) -> None:
        """Write ``summary.json``."""
        write_json(self.summary_file, summary.to_json())

    def load_evaluation(self) -> Evaluation | None:
        """Return ``evaluation.json``; None where `sylva-ray evaluate` has not run.

        Raises:
            UserError: the file is damaged.
        """
        return _read(self.evaluation_file, Evaluation.from_json, "run sylva-ray evaluate again")

    def write_evaluation(self, evaluation: Evaluation, path: Path | None = None) -> Path:
        """Write ``evaluation.json``, or the same to another ``path``; return where."""
        return write_json(path or self.evaluation_file, evaluation.to_json())

    def adapter(self, client: int) -> Path:
        """Return the folder of a client's exported adapter."""
        return self.adapters / f"client_{client:03d}"

    def load_missing(self, round: int) -> list[int] | None:
        """Return who missed the deadline of a round, or None where it was not logged."""
        entries = read_records(self.missing_file)
        return next((entry["missing"] for entry in entries if entry["round"] == round), None)

    def log_missing(self, round: int, clients: Sequence[int]) -> None:
        """Log who missed the deadline of a round, so that a resumed run repeats it."""
        append_record(self.missing_file, {"round": round, "missing": list(clients)})


def _difference(present: ExperimentConfig, wanted: ExperimentConfig) -> str:
    """Return the first key that changes the result and differs, or ''. An unresolved ``auto`` accepts any choice."""
    a, b = with_choices_of(present, wanted).flat(), wanted.flat()
    free = tuple(
        key for key in a | b if key.startswith(("cluster.", "tracking.")) and key != "cluster.threads_per_actor"
    )
    for key in sorted((a | b).keys() - set(free)):
        if a.get(key) != b.get(key):
            return f"{key}: {a.get(key, 'not set')} there, {b.get(key, 'not set')} now"
    return ""


def _read(path: Path, parse: Callable[[object, str], T], fix: str) -> T | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(path.stem, str(path), f"is not JSON ({error}); {fix}") from None
    return parse(content, str(path))
