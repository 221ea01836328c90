"""The folder of a run: the names of its files, the claim to write to it, and what it holds.

::

    config.yaml       the configuration, resolved        checkpoint/     client states after the last stages
    inputs.json       digests of data and weights        adapters/       PEFT adapters, ``client_000/`` ...
    rounds.jsonl      one record per stage               predictions.safetensors   classes predicted for the test images
    summary.json      the results                        evaluation/     finished measurements of `sylva-ray evaluate`
    evaluation.json   results of `sylva-ray evaluate`    tracking.json   what MLflow has received
    report.html       all of it, drawn                   missing.jsonl   clients that missed a deadline
    run.log           what happened when                 extensions.json   rounds that were added to the run
    clients/          what records say of many clients

``config.yaml`` and ``inputs.json`` are written before the first stage and, but for added rounds, never again. Every
checkpoint holds a copy of both, from which `sylva_ray.storage.repair` restores them.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import numpy as np

from sylva_ray.config.comparison import changes, difference, result_settings
from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import RawConfig, build
from sylva_ray.config.stored import RUN_CONFIG, load_run_config
from sylva_ray.core.errors import UserError
from sylva_ray.core.evaluation import Evaluation
from sylva_ray.core.inputs import Inputs
from sylva_ray.core.own_code import import_options
from sylva_ray.core.records import Extension, GameRecord, StageRecord
from sylva_ray.core.summary import Summary
from sylva_ray.core.text import as_argument
from sylva_ray.core.types import ClientState
from sylva_ray.storage.atomic import draft_of, json_text, write_json
from sylva_ray.storage.checkpoint import Checkpoint, CheckpointFolder, Draft, Kept, Origin
from sylva_ray.storage.claim import check_claim, list_names, write_marker
from sylva_ray.storage.client_tables import ClientTables
from sylva_ray.storage.extensions import ExtensionsFile
from sylva_ray.storage.inputs import INPUTS, InputCheck, compare_inputs, load_inputs
from sylva_ray.storage.jsonl import append_record, read_records, rewrite_records
from sylva_ray.storage.lock import folder_lock
from sylva_ray.storage.reading import read_json

T = TypeVar("T")

RECORDS, SUMMARY, CHECKPOINTS = "rounds.jsonl", "summary.json", "checkpoint"

ADAPTER_FILES, EXPORT_FILES = ("adapter_model.safetensors", "adapter_config.json"), ("load.py", "base.safetensors")
"""What `sylva_ray.models.export` writes for every client, and for all of them."""

SPACE, TRIALS = "space.yaml", "trials"
"""In the folder of a sweep: its space, and the folder of its run folders; see `sylva_ray.sweeps.folder`."""


class RunFolder:
    """The files of one run. Creating the object does not access the disk.

    Args:
        path: the folder; it need not exist.

    Attributes:
        checkpoints: of the run.
        extensions: the file of the rounds that were added to the run.
        client_tables: the files of records of many clients.
        files: those directly in the folder.
        adapters: the folder of the exported adapters.
        measurements: the folder of the finished measurements of `sylva-ray evaluate`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / RUN_CONFIG
        self.inputs_file = self.path / INPUTS
        self.records_file = self.path / RECORDS
        self.summary_file = self.path / SUMMARY
        self.evaluation_file = self.path / "evaluation.json"
        self.report_file = self.path / "report.html"
        self.predictions_file = self.path / "predictions.safetensors"
        self.tracking_file = self.path / "tracking.json"
        self.missing_file = self.path / "missing.jsonl"
        self.log_file = self.path / "run.log"
        self.adapters = self.path / "adapters"
        self.measurements = self.path / "evaluation"
        self.checkpoints = CheckpointFolder(self.path / CHECKPOINTS)
        self.extensions = ExtensionsFile(self.path / "extensions.json")
        self.client_tables = ClientTables(self.path)
        self.files = (
            self.config_file,
            self.inputs_file,
            self.extensions.path,
            self.records_file,
            self.summary_file,
            self.evaluation_file,
            self.report_file,
            self.predictions_file,
            self.tracking_file,
            self.missing_file,
            self.log_file,
        )

    def __str__(self) -> str:
        return str(self.path)

    @property
    def _repair(self) -> str:
        """The command that restores its files."""
        return f"sylva-ray repair {as_argument(self)}"

    # -- the claim -----------------------------------------------------------------------------------------------------

    def locked(self, driver: int | None = None, wait_s: float = 0.0) -> AbstractContextManager[None]:
        """Lock the folder against other processes that write to it, for as long as a block lasts.

        Args:
            driver: process id of the command that started this process and with which it ends; None: there is none.
            wait_s: seconds to wait for another process.

        Raises:
            UserError: another process is writing to it.
        """
        return folder_lock(self.path, "run folder", driver, wait_s)

    def check_claim(self, config: ExperimentConfig | None, resume: bool) -> None:
        """Check what `claim` checks, and write nothing; without ``config``, the folder may hold any experiment."""
        names = list_names(self.path)
        if RUN_CONFIG not in names and CHECKPOINTS in names:
            raise self._without_config()
        check_claim(str(self), names, RUN_CONFIG, "run", resume, (INPUTS, draft_of(self.inputs_file).name))
        if RUN_CONFIG in names:
            if config is not None:
                self.check_same(config)
            self.load_checkpoint()

    def check_same(self, config: ExperimentConfig) -> None:
        """Check that ``config.yaml`` describes the same experiment.

        Only ``cluster`` (but its threads) and ``tracking`` may differ: they do not change the result.

        Args:
            config: resolved.

        Raises:
            UserError: it does not; names the first key that differs.
        """
        stored = self.load_config()
        found = difference(stored, config)
        if found:
            overrides = shlex.join(changes(stored, config))
            fix = (
                f"the run in {self} has another config ({found}); a run that is continued keeps its settings, but for "
                f"cluster and tracking. A new run: sylva-ray run {as_argument(self)} {overrides} --out NEW"
                f"{import_options()}"
            )
            raise UserError(found.key, found.now, fix)

    def claim(self, config: ExperimentConfig, resume: bool, inputs: Inputs | None = None) -> None:
        """Write ``inputs.json`` and ``config.yaml`` of a new run; a run to resume must be of the same experiment.

        ``inputs.json`` of a run without a checkpoint is written again.

        Args:
            config: resolved.
            resume: whether the folder must hold this run already; else it must be free.
            inputs: of the run; None: not known.

        Raises:
            UserError: the folder is not free, holds no run to resume, holds another one or one whose checkpoints are of
                another config, or cannot be written.
        """
        self.check_claim(config, resume)
        if self.config_file.exists():
            if inputs is not None and not self.checkpoints.steps():  # nothing has been computed with others yet
                write_marker(self.inputs_file, json_text(inputs.to_json()), replace=True)
            return
        try:
            if inputs is not None:
                write_marker(self.inputs_file, json_text(inputs.to_json()), replace=True)
            write_marker(self.config_file, config.to_yaml())
        except UserError:
            self.inputs_file.unlink(missing_ok=True)
            raise

    def check_has_run(self) -> None:
        """Check that the folder holds a run.

        Raises:
            UserError: it does not.
        """
        if self.config_file.exists():
            return
        if self.checkpoints.root.exists():
            raise self._without_config()
        reason = f"it contains no {RUN_CONFIG}" if self.path.exists() else "it does not exist"
        if self.path.is_file():
            reason = "it is a file"
        elif runs := sorted(path.parent.name for path in self.path.glob(f"*/{RUN_CONFIG}")):
            reason += (
                f", but its folders {runs[0]} and so on do: name one" if len(runs) > 1 else f"; {runs[0]} in it does"
            )
        raise UserError("RUN", str(self), f"is not a run folder ({reason})")

    def _without_config(self) -> UserError:
        fix = f"holds checkpoints but no {RUN_CONFIG}; restore it with: {self._repair}"
        return UserError("run folder", str(self), fix)

    # -- what it holds -------------------------------------------------------------------------------------------------

    def load_config(self, overrides: Sequence[str] = ()) -> ExperimentConfig:
        """Return the configuration, with ``KEY=VALUE`` overrides.

        Raises:
            UserError: as `sylva_ray.config.stored.load_run_config`; or the file is empty or damaged.
        """
        try:
            stored = load_run_config(self.path)
        except UserError as error:
            if not self.checkpoints.steps():
                raise
            fix = f"{error.fix} (in {self.config_file}; restore it with: {self._repair})"
            raise UserError(error.key, error.value, fix) from None
        return load_run_config(self.path, overrides) if overrides else stored

    def check_config(self) -> None:
        """Check that ``config.yaml`` is there and is that of the checkpoints; no states are read.

        Raises:
            UserError: it is not.
        """
        self.check_has_run()
        self._check_settings(self.load_config(), self.checkpoints.settings())

    def _check_settings(self, config: ExperimentConfig, copy: RawConfig | None) -> None:
        """Compare a configuration with the copy in a checkpoint; None: it holds none."""
        if copy is None:
            return
        if found := difference(self.extensions.applied(build(ExperimentConfig, copy), config), config):
            fix = f"is not the config of the run's checkpoints ({found}); restore it with: {self._repair}"
            raise UserError("config", str(self.config_file), fix)

    def extend(self, config: ExperimentConfig, extension: Extension) -> None:
        """Go back to the checkpoint before a step, and take a configuration with more rounds.

        A process that ends within it leaves a run that can be resumed with as many rounds as before.

        Args:
            config: resolved; that of the run but for ``training.rounds``.
            extension: what is changed.
        """
        for step in reversed(self.checkpoints.steps()):
            if step >= extension.step:
                self.checkpoints.remove(step)
        for path in (self.summary_file, self.evaluation_file, self.report_file):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.measurements, ignore_errors=True)  # of states that are no longer those of the run
        self.extensions.add(extension)
        write_marker(self.config_file, config.to_yaml(), replace=True)

    def load_states(self) -> list[dict[str, np.ndarray]]:
        """Return the newest states of the K clients.

        Raises:
            UserError: no run there, no checkpoint in it, or the newest one is damaged or of another config.
        """
        self.check_has_run()
        checkpoint = self.load_checkpoint()
        if checkpoint is None:
            raise UserError("RUN", str(self), "has no checkpoint yet")
        if checkpoint.damaged:
            fix = f"is damaged; compute its stage again with: sylva-ray run {as_argument(self)} --resume"
            raise UserError("checkpoint", checkpoint.damaged[0], fix)
        return checkpoint.states

    def load_checkpoint(self, config: ExperimentConfig | None = None) -> Checkpoint | None:
        """Return the newest checkpoint, after a check that it belongs to the run; None where there is none yet.

        Args:
            config: of the run; None: ``config.yaml``.

        Raises:
            UserError: see `CheckpointFolder.latest`; or it is of another config, or of another number of clients.
        """
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            return None
        config = config or self.load_config()
        self._check_settings(config, checkpoint.config)
        if checkpoint.inputs is not None:
            stored = self.load_inputs()
            if stored is None or stored.to_json() != checkpoint.inputs:
                fix = f"is not what the run's checkpoints hold; restore it with: {self._repair}"
                raise UserError("inputs", str(self.inputs_file), fix)
        num_clients = config.partition.num_clients
        if len(checkpoint.states) != num_clients:
            fix = f"{self.checkpoints.root} holds {len(checkpoint.states)} clients; start again with another --out"
            raise UserError("partition.num_clients", num_clients, fix)
        return checkpoint

    def complete_checkpoint(
        self,
        config: ExperimentConfig,
        draft: Draft,
        records: Sequence[StageRecord],
        game: GameRecord | None,
        residuals: Mapping[int, ClientState],
        always_kept: Collection[int] = (),
    ) -> None:
        """Write what belongs to the states of a checkpoint; see `CheckpointFolder.complete`.

        Args:
            config: of the run; the settings that results depend on are copied.
            draft: the states, by `CheckpointFolder.begin`.
            records: of all stages so far.
            game: what the layer game decided; None before it.
            residuals: ``{client: residual}`` of error feedback.
            always_kept: steps whose checkpoints stay, however many are newer.
        """
        inputs = self.load_inputs()
        origin = Origin(result_settings(config), None if inputs is None else inputs.to_json())
        kept = Kept(config.cluster.keep_checkpoints, always_kept)
        self.checkpoints.complete(draft, records, game, residuals, origin, kept)

    def load_inputs(self) -> Inputs | None:
        """Return ``inputs.json``; None where the run is of a version that did not write it.

        Raises:
            UserError: the file is damaged.
        """
        return load_inputs(self.path, f"restore it with: {self._repair}")

    def check_inputs(self, config: ExperimentConfig, now: Inputs, allow_changed: bool) -> InputCheck:
        """Compare data and weights with those that the run began with.

        Args:
            config: of the run, whose names of data and weights the messages use.
            now: what was loaded; what it lacks is not compared.
            allow_changed: whether a difference is accepted.

        Returns:
            What has changed, and what the user should know.

        Raises:
            UserError: something has changed and ``allow_changed`` is false; names all of it.
        """
        weights = config.backbone.checkpoint or config.backbone.name
        stored = self.load_inputs()
        return compare_inputs(stored, now, "RUN", self.path, "run", config.dataset.name, weights, allow_changed)

    def load_records(self) -> list[StageRecord]:
        """Return the records of all completed stages, oldest first.

        Raises:
            UserError: a line is not a record, or its file is missing or damaged; names it.
        """
        records = []
        for number, line in enumerate(read_records(self.records_file), 1):
            source = f"{self.records_file}, line {number}"
            records.append(StageRecord.from_json(self.client_tables.restored(line, source), source))
        return records

    def write_records(self, records: Sequence[StageRecord]) -> None:
        """Replace ``rounds.jsonl`` and the files that its lines name."""
        lines = [self.client_tables.stored(record.to_json()) for record in records]
        rewrite_records(self.records_file, lines)
        self.client_tables.remove_others(lines)

    def append_record(self, record: StageRecord) -> None:
        """Add one line to ``rounds.jsonl``, after the file that it names."""
        append_record(self.records_file, self.client_tables.stored(record.to_json()))

    def load_summary(self) -> Summary | None:
        """Return ``summary.json``; None while the run has not finished.

        Raises:
            UserError: the file is damaged.
        """
        return _read(self.summary_file, Summary.from_json, "resume the run to write it again")

    def write_summary(self, summary: Summary) -> None:
        """Write ``summary.json``."""
        write_json(self.summary_file, summary.to_json())

    def load_finished(self) -> Summary | None:
        """Return the summary of a run that has finished and has all its files; None where there is something to do.

        Raises:
            UserError: see `load_checkpoint`.
        """
        checkpoint = self.load_checkpoint()
        if checkpoint is None or checkpoint.damaged or not self.report_file.exists():
            return None
        num_clients, config = len(checkpoint.states), self.load_config()
        has_adapters = any(name.endswith(".lora_A") for name in checkpoint.states[0])
        if has_adapters and num_clients <= config.cluster.max_exported and not self._is_exported(num_clients, config):
            return None
        try:
            return self.load_summary() if self.load_records() == checkpoint.records else None
        except UserError:  # the run writes both again
            return None

    def _is_exported(self, num_clients: int, config: ExperimentConfig) -> bool:
        """Return whether the adapters of all clients are there, and what loads them."""
        is_at_the_hub = config.backbone.pretrained and config.backbone.checkpoint is None
        shared = EXPORT_FILES[: 1 if is_at_the_hub else 2]
        paths = [self.adapter(client) / name for client in range(num_clients) for name in ADAPTER_FILES]
        return all(path.exists() for path in (*(self.adapters / name for name in shared), *paths))

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

    def load_missing(self, step: int) -> list[int] | None:
        """Return the clients that missed the deadline of a stage, or None where it was not logged."""
        for number, entry in enumerate(read_records(self.missing_file), 1):
            missing = entry.get("missing")
            if not isinstance(missing, list) or not all(type(client) is int for client in missing):
                fix = f"line {number} must have the key missing, a list of client numbers"
                raise UserError("missing clients", str(self.missing_file), fix)
            if entry.get("round") == step:
                return missing
        return None

    def log_missing(self, step: int, clients: Sequence[int]) -> None:
        """Log the clients that missed the deadline of a stage, so that a resumed run repeats it."""
        append_record(self.missing_file, {"round": step, "missing": list(clients)})


def adapter_folder(root: Path, client: int) -> Path:
    """Return the folder of a client's exported adapter in the folder ``root`` of all clients' adapters."""
    return root / f"client_{client:03d}"


def _read(path: Path, parse: Callable[[object, str], T], fix: str) -> T | None:
    try:
        content = read_json(path, path.stem, fix)
    except FileNotFoundError:
        return None
    return parse(content, str(path))
