"""A sweep in MLflow: a parent run, and its trials as runs under it.

Each trial sends itself from a thread, as any run does (`sylva_ray.observers.mlflow`). What a trial did not send,
because it was pruned or killed, is sent at the end. If MLflow does not answer, the sweep continues and ends with a
warning.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.config.schema import build
from sylva_ray.config.stored import MEASURED, with_choices_of
from sylva_ray.config.tracking import TrackingSection
from sylva_ray.core.credentials import mask_value
from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.observers.mlflow.delivery import DeliveryState
from sylva_ray.observers.mlflow.tracker import (
    SWEEP_NAME_TAG,
    open_sweep,
    send_run,
    store_address,
    tracking_uri,
    update_sweep,
)
from sylva_ray.preparation.resolve import resolve_trial_device
from sylva_ray.storage.reading import read_json
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.points import Trial, point_label
from sylva_ray.sweeps.results import STATES, Sweep, markdown
from sylva_ray.sweeps.space import Space


class ParentRun(BaseModel):
    """``mlflow.json``: the sweep's own run.

    Attributes:
        uri: the store, without credentials.
        experiment: the experiment in the store.
        run_id: the run.
    """

    uri: str
    experiment: str
    run_id: str


@dataclass(frozen=True)
class TrialTracking:
    """How all trials of a sweep are tracked.

    Attributes:
        experiment: the experiment in MLflow.
        tags: on every trial, beside its own.
        uri: the store; None: as the space says, which may be the environment.
        parent_run_id: the sweep's own run; None if it could not be made.
    """

    experiment: str
    tags: dict[str, str]
    uri: str | None = None
    parent_run_id: str | None = None

    def section(self, config: ExperimentConfig, trial: Trial) -> TrackingSection:
        """Return the tracking section of a trial with the given configuration."""
        tags = self.tags | {"sylva.point": trial.point, "sylva.seed": str(trial.seed)}
        return config.tracking.model_copy(
            update={
                "experiment": self.experiment,
                "uri": self.uri or config.tracking.uri,
                "parent_run_id": self.parent_run_id,
                "run_name": f"{point_label(trial.values)}, seed {trial.seed}",
                "tags": config.tracking.tags | tags,
            }
        )


class SweepTracking:
    """Tracks one sweep. No method raises; what went wrong is listed in ``problems``.

    Args:
        folder: the sweep's folder.
        space: its space.

    Attributes:
        enabled: whether anything is sent.
        trials: how the trials are tracked.
        problems: one sentence per failure.
    """

    def __init__(self, folder: SweepFolder, space: Space) -> None:
        self.folder, self.space = folder, space
        self.problems: list[str] = []
        given = space.experiment.get("tracking") or {}
        section = build(ExperimentConfig, {"tracking": given}).tracking
        self.enabled = section.enabled
        self.uri = tracking_uri(section, folder.root) if self.enabled else ""
        self.trials = TrialTracking(
            experiment=section.experiment if "experiment" in given else space.name,
            tags={SWEEP_NAME_TAG: folder.root.name},
            uri=self.uri if self.uri.startswith("sqlite:///") else None,  # beside the sweep, not beside the trials
        )
        self._run_id: str | None = None

    def open(self) -> None:
        """Create the parent run, or continue that of a sweep that is resumed."""
        if not self.enabled:
            return
        known, uri = self._read_parent_run(), mask_value(self.uri)
        if known is not None and (known.uri, known.experiment) == (uri, self.trials.experiment):
            self._run_id = known.run_id
            self._try(lambda: update_sweep(self.uri, known.run_id, "RUNNING", {}, "", []))
        else:
            self._try(self._create_parent_run)
        self.trials = replace(self.trials, parent_run_id=self._run_id)

    def close(self, sweep: Sweep) -> None:
        """Send what trials did not send, and the results of the sweep."""
        if not self.enabled:
            return
        self.problems.clear()
        for trial in sweep.trials:
            run = self.folder.trial(trial.key)
            if run.records_file.exists():
                self._send_rest_of(run, Trial(trial.values, trial.seed))
        run_id = self._run_id
        if run_id is not None:
            status = "FAILED" if sweep.failed else "FINISHED"
            self._try(lambda: update_sweep(self.uri, run_id, status, _numbers(sweep), markdown(sweep), self._files()))

    def _send_rest_of(self, run: RunFolder, trial: Trial) -> None:
        """Send what MLflow lacks of a trial; the store and the parent may be others than when the trial ran."""
        try:
            config = run.load_config()
            config = config.model_copy(update={"tracking": trial_config(self.space, trial, self.trials).tracking})
        except UserError as error:
            self.problems.append(f"MLflow did not receive trial {trial.key}: {error}")
            return
        state = DeliveryState.read(run)
        is_sent = (
            state is not None and state.finished and state.uri == mask_value(store_address(config.tracking, run.path))
        )
        parent = config.tracking.parent_run_id
        if not is_sent or (state is not None and parent is not None and state.parent_run_id != parent):
            self.problems += send_run(run, config)

    def _read_parent_run(self) -> ParentRun | None:
        """Return the sweep's own run; None where there is none, or its file is damaged, so that another is made."""
        try:
            return ParentRun.model_validate(read_json(self.folder.parent_run, "tracking", ""))
        except (FileNotFoundError, UserError, ValidationError):
            return None

    def _create_parent_run(self) -> None:
        space, experiment = self.space, self.trials.experiment
        params = {key: f"{p.kind} {json.dumps(p.values)}" for key, p in space.parameters.items()}
        params |= {
            "sweep.search": space.search.kind,
            "sweep.scheduler": space.scheduler.kind,
            "sweep.objectives": ", ".join(f"{o.mode} {o.metric}" for o in space.objectives),
            "sweep.seeds": ", ".join(map(str, space.seeds)),
        }
        name = f"sweep {self.folder.root.name}"
        self._run_id = open_sweep(self.uri, experiment, name, params, self.trials.tags)
        parent = ParentRun(uri=mask_value(self.uri), experiment=experiment, run_id=self._run_id)
        self.folder.write(self.folder.parent_run, json.dumps(parent.model_dump()) + "\n")

    def _files(self) -> list[Path]:
        folder = self.folder
        files = [folder.space, folder.results, folder.report, folder.best, *sorted(folder.pareto.glob("*.yaml"))]
        return [path for path in files if path.exists()]

    def _try(self, send: Callable[[], object]) -> None:
        try:
            send()
        except Exception as error:  # whatever a server, a driver or a proxy raises: the sweep continues
            reason = reason_of(error, self.uri)
            self.problems.append(f"MLflow at {mask_value(self.uri)} did not receive the sweep's own run: {reason}")


def trial_config(
    space: Space, trial: Trial, tracking: TrialTracking, compute: ExperimentConfig | None = None
) -> ExperimentConfig:
    """Return a trial's experiment, tracked as a child of the sweep's run.

    Args:
        space: the sweep's space.
        trial: the trial.
        tracking: how it is tracked.
        compute: a configuration whose precision and attention kernels replace ``auto``; None: ``auto`` stays.

    Raises:
        UserError: the values do not make a valid experiment.
    """
    config = space.config(trial.values, trial.seed)
    if compute is not None:
        config = with_choices_of(config, compute, MEASURED)
    config = resolve_trial_device(config)
    return config.model_copy(update={"tracking": tracking.section(config, trial)})


def _numbers(sweep: Sweep) -> dict[str, float]:
    """Return the metrics of the parent run."""
    numbers = {f"trials/{state}": float(sweep.counts.get(state, 0)) for state in STATES}
    numbers["busy_share"] = sweep.busy_share
    for point in sweep.chosen[:1]:
        numbers |= {f"best/{name}": value.mean for name, value in point.metrics.items()}
    return numbers
