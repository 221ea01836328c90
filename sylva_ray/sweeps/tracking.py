"""A sweep in MLflow: a parent run, and its trials as runs under it.

The trials send themselves (`sylva_ray.tracking`), from a thread, as any run does. What one of them did not manage, because it was
pruned or killed, is sent at the end. A store that is down costs the sweep a warning, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sylva_ray.config.experiment import MEASURED, ExperimentConfig, load_run_config, with_choices_of
from sylva_ray.config.schema import build
from sylva_ray.core.credentials import mask_credentials
from sylva_ray.observers.mlflow.delivery import STATE
from sylva_ray.observers.mlflow.tracker import SWEEP_NAME_TAG, open_sweep, send_run, tracking_uri, update_sweep
from sylva_ray.preparation.resolve import resolve_trial_device
from sylva_ray.storage.run_folder import RECORDS
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.points import Trial, point_label
from sylva_ray.sweeps.results import STATES, Sweep, markdown
from sylva_ray.sweeps.space import Space


class SweepTracking:
    """Follows one sweep. Its methods never raise; what went wrong is in ``problems``.

    ``changes``: what the trials' ``tracking`` section differs in from the space's."""

    def __init__(self, folder: SweepFolder, space: Space) -> None:
        self.folder, self.space = folder, space
        self.problems: list[str] = []
        given = space.experiment.get("tracking") or {}
        section = build(ExperimentConfig, {"tracking": given}).tracking
        self.enabled = section.enabled
        self.experiment = section.experiment if "experiment" in given else space.name
        self.uri = tracking_uri(section, folder.root)
        self.tags = {SWEEP_NAME_TAG: folder.root.name}
        self.changes: dict[str, Any] = {"experiment": self.experiment, "detail": given.get("detail", "fleet")}
        self.changes["tags"] = self.tags
        if self.uri.startswith("sqlite:///"):  # beside the sweep, not beside the trials
            self.changes["uri"] = self.uri
        self._run_id: str | None = None

    def open(self) -> None:
        """Make the parent run, or find the one of a sweep that is resumed."""
        if not self.enabled:
            return
        known = self.folder.read_json(self.folder.parent)
        where = {"uri": mask_credentials(self.uri), "experiment": self.experiment}
        if known is not None and {name: known[name] for name in where} == where:
            self._run_id = known["run_id"]
            self._try(lambda: update_sweep(self.uri, known["run_id"], "RUNNING", {}, "", []))
        else:
            self._try(lambda: self._make(where))
        self.changes["parent_run_id"] = self._run_id

    def close(self, sweep: Sweep) -> None:
        """Send what trials could not, and the sweep's own results."""
        if not self.enabled:
            return
        self.problems.clear()
        for trial in sweep.trials:
            run_dir = self.folder.trial(trial.key)
            state = self.folder.read_json(run_dir / STATE) or {}
            if (run_dir / RECORDS).exists() and not state.get("finished"):
                self.problems += send_run(run_dir, load_run_config(run_dir))
        if self._run_id is not None:
            status = "FAILED" if sweep.failed else "FINISHED"
            self._try(
                lambda: update_sweep(
                    self.uri, str(self._run_id), status, _numbers(sweep), markdown(sweep), self._files()
                )
            )

    def _make(self, where: dict[str, str]) -> None:
        space = self.space
        params = {key: f"{p.kind} {json.dumps(p.values)}" for key, p in space.parameters.items()}
        params |= {
            "sweep.search": space.search.kind,
            "sweep.scheduler": space.scheduler.kind,
            "sweep.objectives": ", ".join(f"{o.mode} {o.metric}" for o in space.objectives),
            "sweep.seeds": ", ".join(map(str, space.seeds)),
        }
        self._run_id = open_sweep(self.uri, self.experiment, f"sweep {self.folder.root.name}", params, self.tags)
        self.folder.write(self.folder.parent, json.dumps(where | {"run_id": self._run_id}) + "\n")

    def _files(self) -> list[Path]:
        folder = self.folder
        files = [folder.space, folder.results, folder.report, folder.best, *sorted(folder.pareto.glob("*.yaml"))]
        return [path for path in files if path.exists()]

    def _try(self, send: Callable[[], object]) -> None:
        try:
            send()
        except Exception as error:  # whatever a server, a driver or a proxy may throw: the sweep goes on
            reason = mask_credentials(" ".join(str(error).split())[:160])
            self.problems.append(f"MLflow at {mask_credentials(self.uri)} did not take the sweep's own run: {reason}")


def trial_config(
    space: Space, trial: Trial, tracking: Mapping[str, Any], chosen: ExperimentConfig | None = None
) -> ExperimentConfig:
    """A trial's experiment, tracked as a child of the sweep's run; it computes as ``chosen`` where its space says ``auto``."""
    config = space.config(trial.values, trial.seed)
    if chosen is not None:
        config = with_choices_of(config, chosen, MEASURED)
    tags = tracking.get("tags", {}) | {"sylva.point": trial.point, "sylva.seed": str(trial.seed)}
    changes = dict(tracking) | {
        "run_name": f"{point_label(trial.values)}, seed {trial.seed}",
        "tags": config.tracking.tags | tags,
    }
    config = resolve_trial_device(config)
    return config.model_copy(update={"tracking": config.tracking.model_copy(update=changes)})


def _numbers(sweep: Sweep) -> dict[str, float]:
    """What the parent run shows beside its trials."""
    numbers = {f"trials.{state}": float(sweep.counts.get(state, 0)) for state in STATES}
    numbers["busy_share"] = sweep.busy_share
    for point in sweep.chosen[:1]:
        numbers |= {f"best.{name}": value.mean for name, value in point.metrics.items()}
    return numbers
