"""The folder of a run: the names of its files, the claim to write to it, and what it holds.

::

    config.yaml       the configuration, resolved        checkpoint/     client states after the last stages
    rounds.jsonl      one record per stage               adapters/       PEFT adapters, ``client_000/`` ...
    summary.json      the results                        predictions.safetensors   classes predicted for the test images
    evaluation.json   results of `sylva-ray evaluate`    evaluation/     its finished measurements
    report.html       all of it, drawn                   tracking.json   what MLflow has received
    missing.jsonl     clients that missed a deadline
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
from sylva_ray.storage.atomic import write_json
from sylva_ray.storage.checkpoint import CheckpointFolder
from sylva_ray.storage.claim import check_claim, list_names, write_marker
from sylva_ray.storage.jsonl import append_record, read_records, rewrite_records

T = TypeVar("T")

RECORDS, SUMMARY, CHECKPOINTS = "rounds.jsonl", "summary.json", "checkpoint"


class RunFolder:
    """The files of one run. Creating the object does not access the disk.

    Args:
        path: the folder; it need not exist.

    Attributes:
        checkpoints: of the run.
        adapters: the folder of the exported adapters.
        measurements: the folder of the finished measurements of `sylva-ray evaluate`.
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

    # -- the claim -----------------------------------------------------------------------------------------------------

    def claim(self, config: ExperimentConfig, resume: bool) -> None:
        """Write ``config.yaml``; one that is there must describe the same experiment.

        Only ``cluster`` (but its threads) and ``tracking`` may differ on resume: they do not change the result.

        Args:
            config: resolved.
            resume: whether the folder must hold this run already; else it must be free.

        Raises:
            UserError: the folder is not free, holds no run to resume, holds another one, or cannot be written.
        """
        check_claim(str(self), list_names(self.path), CONFIG, "run", resume)
        if self.config_file.exists():
            difference = _difference(self.load_config(), config)
            if difference:
                raise UserError("--out", str(self), f"holds a run with another config ({difference})")
        write_marker(self.config_file, config.to_yaml())

    def check_has_run(self) -> None:
        """Check that the folder holds a run.

        Raises:
            UserError: it does not.
        """
        if not self.config_file.exists():
            raise UserError("RUN", str(self), f"is not a run folder (it contains no {CONFIG})")

    # -- what it holds -------------------------------------------------------------------------------------------------

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

    def num_records(self) -> int:
        """Return the number of completed stages that are recorded."""
        return len(read_records(self.records_file))

    def write_records(self, records: Sequence[StageRecord]) -> None:
        """Replace ``rounds.jsonl``."""
        rewrite_records(self.records_file, [record.to_json() for record in records])

    def append_record(self, record: StageRecord) -> None:
        """Add one line to ``rounds.jsonl``."""
        append_record(self.records_file, record.to_json())

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
        """Write an evaluation.

        Args:
            evaluation: to write.
            path: the file; None: ``evaluation.json`` in the folder.

        Returns:
            The file.
        """
        return write_json(path or self.evaluation_file, evaluation.to_json())

    def adapter(self, client: int) -> Path:
        """Return the folder of a client's exported adapter."""
        return adapter_folder(self.adapters, client)

    def load_missing(self, round: int) -> list[int] | None:
        """Return the clients that missed the deadline of a round, or None where it was not logged."""
        entries = read_records(self.missing_file)
        return next((entry["missing"] for entry in entries if entry["round"] == round), None)

    def log_missing(self, round: int, clients: Sequence[int]) -> None:
        """Log the clients that missed the deadline of a round, so that a resumed run repeats it."""
        append_record(self.missing_file, {"round": round, "missing": list(clients)})


def adapter_folder(root: Path, client: int) -> Path:
    """Return the folder of a client's exported adapter in the folder ``root`` of all clients' adapters."""
    return root / f"client_{client:03d}"


def _difference(stored: ExperimentConfig, config: ExperimentConfig) -> str:
    """Return the first key that changes the result and differs, or ''. An unresolved ``auto`` accepts any choice."""
    before, now = with_choices_of(stored, config).flat(), config.flat()
    for key in sorted(before.keys() | now.keys()):
        is_free = key.startswith(("cluster.", "tracking.")) and key != "cluster.threads_per_actor"
        if not is_free and before.get(key) != now.get(key):
            return f"{key}: {before.get(key, 'not set')} there, {now.get(key, 'not set')} now"
    return ""


def _read(path: Path, parse: Callable[[object, str], T], fix: str) -> T | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(path.stem, str(path), f"is not JSON ({error}); {fix}") from None
    return parse(content, str(path))
