"""One trial of a sweep: an experiment whose coordinator is Tune's process, in the placement group that Tune reserved.

    Tune ── values, seed ──► trial = coordinator (bundle 0) ── tasks ──► client actors (bundles 1, 2, ...)
      ◄── metrics per step ───       └── SWEEP/trials/POINT-sSEED: an ordinary run folder

The run folder is the checkpoint. A trial that is repeated, or resumed with the sweep, first reports the steps that its
folder holds and continues after the last of them; one that has finished only reports. With ``cluster.pool=in_process``
the process does the clients' work as well.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.actor import ActorHandle

from sylva_ray.config.experiment import ExperimentConfig, load_config
from sylva_ray.core.credentials import mask_credentials
from sylva_ray.core.errors import UserError
from sylva_ray.core.records import StageRecord
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.ray.driver_context import DriverContext
from sylva_ray.execution.run import pool_for
from sylva_ray.federation.observer import Notice, Observer
from sylva_ray.federation.stages.kinds import is_exchange
from sylva_ray.preparation.experiment import prepare
from sylva_ray.preparation.inputs import claim_run, digest_inputs
from sylva_ray.preparation.resolve import trial_actors
from sylva_ray.provisioning.launcher_file import Resources
from sylva_ray.provisioning.placement import ROUNDING
from sylva_ray.storage.run_folder import RunFolder
from sylva_ray.sweeps.events import AttemptEvent, Outcome
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.metrics import step_metrics
from sylva_ray.sweeps.points import Trial
from sylva_ray.sweeps.space import Space
from sylva_ray.sweeps.tracking import TrialTracking, trial_config

COORDINATOR_FRACTION = 0.001
"""What a coordinator reserves of its node's own resource, of which a node has 1."""

MAX_CONCURRENT_TRIALS = 1000
"""How many coordinators that resource allows."""

LOCK_TIMEOUT_S = 30.0
"""Seconds to wait for an earlier process of the same trial, which Tune has given up and which is about to end."""

SHUTDOWN_TIMEOUT_S = 60
"""How long Tune waits for a pruned trial to stop before its process runs the next trial."""


def trial_bundles(config: ExperimentConfig, driver_node: str) -> list[dict[str, float]]:
    """Return what a trial reserves: the coordinator's bundle, then one per client actor.

    The coordinator waits most of the time and takes no CPU. In process, one bundle does all the work.

    Args:
        config: of the trial.
        driver_node: a resource that only the node with the sweep's folder has, e.g. ``node:10.0.0.1``; the coordinator
            runs there.
    """
    section = config.cluster
    worker = {"CPU": section.cpus_per_actor, "GPU": section.gpus_per_actor}
    coordinator = {driver_node: COORDINATOR_FRACTION}
    if section.pool == "in_process":
        return [coordinator | worker]
    return [coordinator, *([worker] * trial_actors(config))]


def trials_that_fit(
    bundles: Sequence[Resources], nodes: Sequence[Resources], limit: int = MAX_CONCURRENT_TRIALS
) -> int:
    """Return how many trials fit on empty nodes at the same time.

    Places each trial's bundles, the largest first, on the first node with room.

    Args:
        bundles: of one trial.
        nodes: resources of each node.
        limit: the largest answer.
    """
    free = [_FreeResources(node) for node in nodes]
    ordered = sorted(bundles, key=lambda bundle: (-bundle.get("GPU", 0.0), -bundle.get("CPU", 0.0)))
    trials = 0
    while trials < limit and all(any(node.take(bundle) for node in free) for bundle in ordered):
        trials += 1
    return trials


class _FreeResources:
    """What is free on a node. Ray places a fraction of a GPU on a single GPU, and whole GPUs on empty ones."""

    def __init__(self, node: Resources) -> None:
        self.gpus = [1.0] * int(node.get("GPU", 0.0))
        self.rest = {name: amount for name, amount in node.items() if name != "GPU"}

    def take(self, bundle: Resources) -> bool:
        """Reserve a bundle if there is room, and return whether there was."""
        wanted = bundle.get("GPU", 0.0)
        fraction = min(1.0, wanted)
        chosen = [i for i, free in enumerate(self.gpus) if free + ROUNDING >= fraction][: math.ceil(wanted)]
        rest = {name: amount for name, amount in bundle.items() if name != "GPU"}
        if len(chosen) < math.ceil(wanted) or any(self.rest.get(n, 0.0) + ROUNDING < a for n, a in rest.items()):
            return False
        for i in chosen:
            self.gpus[i] -= fraction
        self.rest |= {name: self.rest.get(name, 0.0) - amount for name, amount in rest.items()}
        return True


def run_trial(
    given: Mapping[str, Any],
    sweep: str,
    space: Space,
    tracking: TrialTracking,
    driver: DriverContext,
    shared: ActorHandle[Any],
    allow_changed: bool = False,
) -> None:
    """Run a trial; the function that Tune calls.

    Args:
        given: ``{"trial": {"values": ..., "seed": ...}}``.
        sweep: the sweep's folder.
        space: its space.
        tracking: how the trial is tracked.
        driver: the sweep's driver.
        shared: keeps data and backbones in the object store, once for all trials.
        allow_changed: whether data and weights may differ from those that a trial began with.
    """
    driver.enter()
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(SHUTDOWN_TIMEOUT_S))
    trial, folder, began = Trial(**given["trial"]), SweepFolder(Path(sweep)), time.time()
    was_pruned = folder.outcome(trial.key) == "pruned"
    outcome: Outcome = "died"
    error = ""

    def note(**event: Any) -> None:
        folder.add_event(trial.key, AttemptEvent(began=began, **event))

    note(process=os.getpid(), node=ray.get_runtime_context().get_node_id())
    try:
        config = trial_config(space, trial, tracking, load_config(folder.compute))
        records = _replay(config, folder.trial(trial.key))
        if was_pruned:
            outcome = "pruned"
        else:
            _run(config, folder.trial(trial.key), records, driver.process, note, shared, allow_changed)
            outcome = "finished"
    except SystemExit:  # Tune's way to end a trial from within `report`
        outcome = "pruned"
        raise
    except UserError as problem:  # it would happen again: the trial is not repeated
        outcome, error = "refused", str(problem)
    except BaseException as problem:
        error = mask_credentials(f"{type(problem).__name__}: {problem}")
        raise
    finally:
        note(ended=time.time(), outcome=outcome, error=error)


class _TrialObserver(Observer):
    """Reports every step to Tune, and adds what happens to the trial's history.

    Args:
        config: of the trial.
        records: of the steps that are done already; it grows, and is replaced by those that the run goes on from.
        note: takes the fields of an `AttemptEvent`.
    """

    def __init__(self, config: ExperimentConfig, records: list[StageRecord], note: Callable[..., None]) -> None:
        self.config, self.records, self.note = config, records, note

    def on_resume(self, records: Sequence[StageRecord]) -> None:
        """See `Observer.on_resume`. A kill between a checkpoint and its line leaves the file one record short."""
        self.records[:] = records

    def on_record(self, record: StageRecord) -> None:
        """See `Observer.on_record`."""
        self.records.append(record)
        self.note(alive=time.time(), step=record.step)
        try:
            _report(self.records, self.config)
        except SystemExit:  # the end of the run may take longer than Tune waits for it
            self.note(alive=time.time(), outcome="pruned")
            raise

    def on_notice(self, notice: Notice) -> None:
        """See `Observer.on_notice`."""
        self.note(alive=time.time(), notice=notice.text)


def _replay(config: ExperimentConfig, folder: RunFolder) -> list[StageRecord]:
    """Report the steps that the folder of a trial holds, and return their records."""
    records = folder.load_records()
    for known in range(1, len(records) + 1):
        _report(records[:known], config)
    return records


def _run(
    config: ExperimentConfig,
    folder: RunFolder,
    records: list[StageRecord],
    driver: int,
    note: Callable[..., None],
    shared: ActorHandle[Any],
    allow_changed: bool,
) -> None:
    """Continue the experiment of a trial and report every step.

    Args:
        config: of the trial.
        folder: its run folder.
        records: of the steps that are done already; it grows.
        driver: process id of the sweep's driver.
        note: takes the fields of an `AttemptEvent`.
        shared: keeps data and backbones in the object store, once for all trials.
        allow_changed: whether data and weights may differ from those that the trial began with.
    """
    if folder.load_summary() is None:
        prepared = prepare(config, folder)
        observer = _TrialObserver(config, records, note)
        with folder.locked(driver, LOCK_TIMEOUT_S):
            is_begun = folder.config_file.exists()
            other = None if is_begun else _on_the_same_data(folder, config)
            if other is not None:  # points are compared with each other
                check = other.check_inputs(config, digest_inputs(prepared), allow_changed)
                prepared = dataclasses.replace(prepared, changed_inputs=check.changed)
            prepared = claim_run(
                prepared, folder, is_begun, allow_changed, lambda text: observer.on_notice(Notice(text))
            )
            with pool_for(prepared, observer, shared) as pool:
                run_experiment(prepared, folder, pool, observer)
    _report(records, config, finished=True)


def _on_the_same_data(folder: RunFolder, config: ExperimentConfig) -> RunFolder | None:
    """Return another trial of the sweep that is to have the same data and backbone; None: there is none yet."""
    sections = ("dataset", "partition", "backbone", "seed")
    for path in sorted(folder.path.parent.iterdir()):
        other = RunFolder(path)
        if path == folder.path or not other.config_file.exists() or other.load_inputs() is None:
            continue
        stored = other.load_config()
        if all(getattr(stored, name) == getattr(config, name) for name in sections):
            return other
    return None


def _report(records: list[StageRecord], config: ExperimentConfig, finished: bool = False) -> None:
    """Report the metrics after the last step to Tune, which raises `SystemExit` in a trial that it prunes."""
    last = records[-1]
    rounds = sum(is_exchange(record.stage) for record in records)
    place = {"step": last.step, "stage": last.stage, "rounds": rounds, "finished": finished}
    tune.report(place | step_metrics(records, config))
