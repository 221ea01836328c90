"""The driver of a sweep: check the space, connect to Ray, run the trials with Ray Tune, collect the results.

    space ── points ──► Tune ──► trials, as many at once as fit ──► run folders ──► sweep.json, report.html, best.yaml
                          └─ its state every two seconds ──► SWEEP/tune (for --resume)

Nothing is written before every point has been checked and the cluster has room for a trial.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.actor import ActorHandle
from ray.tune.schedulers import ASHAScheduler

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.core.processes import is_running
from sylva_ray.execution.ray.driver_context import DriverContext
from sylva_ray.execution.ray.session import (
    node_resources,
    own_node_resources,
    promised_cluster,
    ray_session,
    require_reachable,
)
from sylva_ray.execution.ray.shared_inputs import share_inputs
from sylva_ray.provisioning.launcher_file import LauncherFile, Resources
from sylva_ray.provisioning.placement import largest_cluster
from sylva_ray.sweeps.events import OnEvent, SweepStarted, SweepWarning, TrialProgress, Waiting
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.output import write_results
from sylva_ray.sweeps.points import Trial, corners, planned_trials, resolve_first_point
from sylva_ray.sweeps.results import Sweep, collect_results
from sylva_ray.sweeps.space import Space
from sylva_ray.sweeps.tracking import SweepTracking, TrialTracking
from sylva_ray.sweeps.trial import (
    COORDINATOR_FRACTION,
    MAX_CONCURRENT_TRIALS,
    run_trial,
    trial_bundles,
    trials_that_fit,
)

if TYPE_CHECKING:
    from sylva_ray.sweeps.optuna_search import PointSearch

POLL_INTERVAL_S = 1.0
"""How often the driver reads the histories of the trials."""

STATUS_INTERVAL_S = 30.0
"""How often the driver says that no trial runs. A process takes 10 to 20 s to start, a cloud node minutes."""

HEAD_RESOURCE = "node:__internal_head__"
"""A resource that only the head has. (Nodes on one machine may have the same address.)"""

TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders hold more
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep at once; --resume continues it
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_checked_sweep(
    space: Space, sweep_dir: Path, resume: bool, on_event: OnEvent, allow_changed: bool = False
) -> Sweep:
    """Run or resume a sweep that `check_sweep` has found right.

    Args:
        space: the sweep's space.
        sweep_dir: its folder.
        resume: whether to continue the sweep that the folder holds.
        on_event: called with every event.
        allow_changed: whether data and weights may differ from those that the trials began with.

    Returns:
        The results, which are also written to the folder.

    Raises:
        UserError: a trial fits nowhere, or the folder is not free. Nothing was written.
        RunError: Ray Tune failed; the sweep can be resumed.
    """
    folder = SweepFolder(Path(sweep_dir).resolve())
    if space.cluster.address is not None:
        require_reachable(space.cluster.address, space.cluster.connect_timeout_s)
    with ray_session(space.cluster):
        driver_node = _driver_node()
        slots = check_trials_fit(space, driver_node, promised_cluster(space.cluster))
        with folder.locked():
            folder.claim(space, resume)
            return _run_claimed(folder, space, driver_node, slots, on_event, allow_changed)


def _run_claimed(
    folder: SweepFolder, space: Space, driver_node: str, slots: int, on_event: OnEvent, allow_changed: bool
) -> Sweep:
    """Run what is left of a sweep in its own folder; the arguments are as in `_run_trials` and `run_checked_sweep`."""
    choose_compute(folder, space)
    tracking = SweepTracking(folder, space)
    tracking.open()
    for problem in tracking.problems:
        on_event(SweepWarning(problem))
    with watching(folder, space, on_event):
        trials, failures = _run_trials(space, folder, driver_node, slots, tracking.trials, allow_changed)
    sweep = collect_results(folder, space, trials, failures)
    write_results(folder, sweep)
    tracking.close(sweep)
    for problem in tracking.problems:
        on_event(SweepWarning(problem))
    return sweep


def choose_compute(folder: SweepFolder, space: Space) -> None:
    """Choose precision and attention kernels once for all trials, which could not be compared otherwise.

    The choice is kept in ``compute.yaml``. A folder that holds trials but no choice comes from version 0.1, which
    computed in the precision of the configuration with fused attention: nothing is measured there.

    Args:
        folder: the sweep's folder; it has been claimed.
        space: its space.
    """
    if not folder.compute.exists():
        is_from_an_older_version = any(folder.trials.iterdir())
        folder.write(folder.compute, resolve_first_point(space, measure=not is_from_an_older_version).to_yaml())


def check_trials_fit(space: Space, driver_node: str, promised: LauncherFile | None) -> int:
    """Return how many of the largest trials fit on the empty cluster at once, at most ``trials.at_once``.

    Args:
        space: the sweep's space.
        driver_node: the resource that only the node of this process has.
        promised: the cluster's file, if it has an autoscaler; its largest cluster counts.

    Raises:
        UserError: not even one fits.
    """
    live = node_resources()
    here = next(node for node in live if driver_node in node)
    others = [node for node in live if node is not here]
    at_once = space.trials.at_once
    slots = MAX_CONCURRENT_TRIALS if at_once == "auto" else min(MAX_CONCURRENT_TRIALS, at_once)
    for config in _largest(space):
        nodes = [here, *(others if promised is None else largest_cluster(config.cluster, promised)[1:])]
        fit = trials_that_fit(trial_bundles(config, driver_node), nodes, slots)
        if fit == 0:
            raise _fits_nowhere(config, here, nodes)
        slots = min(slots, fit)
    return slots


def _fits_nowhere(config: ExperimentConfig, here: Resources, nodes: Sequence[Resources]) -> UserError:
    section = config.cluster
    kinds = {"CPU": section.cpus_per_actor} | ({"GPU": section.gpus_per_actor} if section.gpus_per_actor else {})
    worker = f"({', '.join(f'{number:g} {kind}s' for kind, number in kinds.items())})"
    if section.pool == "in_process":
        has = " and ".join(f"{here.get(kind, 0.0):g} {kind}s" for kind in kinds)
        fix = f"such a trial needs {worker} on this node, which has {has}; cluster.pool=ray uses all nodes"
        return UserError("cluster.pool", section.pool, fix)
    has = " and ".join(f"{sum(node.get(kind, 0.0) for node in nodes):g} {kind}s" for kind in kinds)
    fix = f"one trial needs {section.num_actors} x {worker}, and the whole cluster, at its largest, has {has}"
    return UserError("cluster.num_actors", section.num_actors, fix)


def _largest(space: Space) -> list[ExperimentConfig]:
    """Return one experiment for every number of actors that a trial may have."""
    configs = (space.config(values, space.seeds[0]) for values in corners(space))
    return list({config.cluster.num_actors: config for config in configs}.values())


def _driver_node() -> str:
    """Return the resource that only the node of this process has: the head's, or one named by the node's address."""
    names = [name for name in own_node_resources() if name.startswith("node:")]
    return HEAD_RESOURCE if HEAD_RESOURCE in names else names[0]


def _run_trials(
    space: Space, folder: SweepFolder, driver_node: str, slots: int, tracking: TrialTracking, allow_changed: bool
) -> tuple[list[Trial], dict[str, str]]:
    """Run the trials with Tune.

    Tune always starts anew, since its own state on disk is a pickle, which could execute code. What a sweep needs to
    continue is in the run folders of its trials and, with Optuna, in the JSON state of the search.

    Returns:
        All trials of the sweep, and for each trial that failed in every attempt, by key, the error that Tune reports.
    """
    os.environ.update(TUNE_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    shared = share_inputs()
    trainable = _trainable(space, folder, driver_node, tracking, shared, allow_changed)
    if space.search.kind == "optuna":
        from sylva_ray.sweeps.optuna_search import open_search

        search = open_search(space, folder)
        folder.write(folder.search, search.to_json())
        results = _fit(_new_tuner(space, folder, trainable, slots, search=search)) if search.num_left else []
        trials = open_search(space, folder).trials
    else:
        trials = planned_trials(space)
        left = trials_left(space, folder, trials)
        results = _fit(_new_tuner(space, folder, trainable, slots, left)) if left else []
    ray.kill(shared)  # with it, data and backbones leave the object store
    ran = [(Trial(**result.config["trial"]), result.error) for result in results]
    return trials, {trial.key: str(error).strip().splitlines()[-1] for trial, error in ran if error}


def trials_left(space: Space, folder: SweepFolder, trials: Sequence[Trial]) -> list[Trial]:
    """Return the planned trials that Tune is to run, in this order; none where all have ended.

    With ASHA these are all of them, because it compares every trial with the others: first those that have ended, which
    only report again what they had.
    """
    open_trials = [trial for trial in trials if not folder.has_ended(trial.key)]
    if space.scheduler.kind == "fifo" or not open_trials:
        return open_trials
    return [*(trial for trial in trials if trial not in open_trials), *open_trials]


def _trainable(
    space: Space,
    folder: SweepFolder,
    driver_node: str,
    tracking: TrialTracking,
    shared: ActorHandle[Any],
    allow_changed: bool,
) -> Any:
    """Return what Tune runs: `run_trial` with its arguments and with the bundles that each trial reserves."""

    def bundles(given: dict[str, Any]) -> tune.PlacementGroupFactory:
        try:
            config = space.config(given["trial"]["values"], given["trial"]["seed"])
        except UserError:
            # a point of Optuna's between valid ends of a range: the trial itself reports it, and the others continue
            return tune.PlacementGroupFactory([{driver_node: COORDINATOR_FRACTION}])
        return tune.PlacementGroupFactory(trial_bundles(config, driver_node))

    trainable = tune.with_parameters(
        run_trial,
        sweep=str(folder.root),
        space=space,
        tracking=tracking,
        driver=DriverContext.of_this_process(),
        shared=shared,
        allow_changed=allow_changed,
    )
    return tune.with_resources(trainable, bundles)


def _fit(tuner: tune.Tuner) -> Any:
    try:
        return tuner.fit()
    except tune.TuneError as error:
        raise RunError(f"Ray Tune: {str(error).strip().splitlines()[-1]}") from error


def _new_tuner(
    space: Space,
    folder: SweepFolder,
    trainable: Any,
    slots: int,
    planned: Sequence[Trial] = (),
    search: PointSearch | None = None,
) -> tune.Tuner:
    """Return a Tuner for the points that ``search`` suggests or, without one, for the planned trials."""
    shutil.rmtree(folder.tune, ignore_errors=True)
    config = tune.TuneConfig(
        reuse_actors=True,  # a process's imports take longer than a small trial
        trial_dirname_creator=_trial_key,
        scheduler=asha(space) if space.scheduler.kind == "asha" else None,
    )
    param_space = {}
    if search is not None:
        config.search_alg = search
        config.num_samples = search.num_left
        config.max_concurrent_trials = slots  # a suggestion made before it can run knows fewer results
    else:
        trials = [{"values": dict(trial.values), "seed": trial.seed} for trial in planned]
        param_space["trial"] = tune.grid_search(trials)
        if space.trials.at_once != "auto":
            config.max_concurrent_trials = space.trials.at_once
    return tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=config,
        run_config=tune.RunConfig(
            name=folder.tune.name,
            storage_path=str(folder.root),
            failure_config=tune.FailureConfig(max_failures=space.trials.retries),
            verbose=0,
        ),
    )


def _trial_key(trial: tune.experiment.Trial) -> str:
    return Trial(**trial.config["trial"]).key


def asha(space: Space) -> ASHAScheduler:
    """Return successive halving on rounds of phase 1, of which all trials have as many (`check_space`).

    The last rung is before the last round: a trial that did all of them has nothing left to save, and runs to its end.
    """
    objective, section = space.objectives[0], space.scheduler
    rounds = space.config(next(iter(corners(space))), space.seeds[0]).training.rounds
    return ASHAScheduler(
        time_attr="rounds",
        metric=objective.metric,
        mode=objective.mode,
        max_t=rounds - 1,
        grace_period=section.grace_rounds,
        reduction_factor=section.reduction_factor,
        stop_last_trials=False,
    )


@contextmanager
def watching(folder: SweepFolder, space: Space, on_event: OnEvent) -> Iterator[None]:
    """Pass on new lines of the trials' histories, from a thread, for as long as the block lasts.

    Args:
        folder: the sweep's folder.
        space: its space.
        on_event: called with every event.
    """
    is_planned = space.search.kind != "optuna"
    num_trials = len(planned_trials(space)) if is_planned else (space.search.num_points or 0) * len(space.seeds)
    histories, done = _Histories(folder), threading.Event()

    def watch() -> None:
        idle_since = time.monotonic()
        while not done.wait(POLL_INTERVAL_S):
            for event in histories.read():
                on_event(event)
            now = time.monotonic()
            if any(map(is_running, histories.running.values())):
                idle_since = now
            elif now - idle_since > STATUS_INTERVAL_S:
                idle_since = now
                on_event(_waiting())

    histories.skip()  # what happened before a --resume
    finished = sorted(key for key in folder.started_trials() if folder.is_finished(key))
    on_event(SweepStarted(num_trials, finished))
    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for event in histories.read():
            on_event(event)


class _Histories:
    """Reads new lines of the trials' histories.

    Args:
        folder: the sweep's folder.

    Attributes:
        running: coordinator processes of the trials that began and did not end, by key.
    """

    def __init__(self, folder: SweepFolder) -> None:
        self.folder = folder
        self.running: dict[str, int] = {}
        self._num_read: dict[str, int] = {}

    def read(self) -> Iterator[TrialProgress]:
        """Yield the lines that are new."""
        for key in self.folder.started_trials():
            history = self.folder.history(key)
            for event in history[self._num_read.get(key, 0) :]:
                if event.ended is not None:
                    self.running.pop(key, None)
                elif event.process is not None:
                    self.running[key] = event.process
                yield TrialProgress(key, event)
            self._num_read[key] = len(history)

    def skip(self) -> None:
        """Skip the lines that are there already: their processes have ended."""
        for _ in self.read():
            pass
        self.running.clear()


def _waiting() -> Waiting:
    nodes = node_resources()
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    cluster = f"nodes: {len(nodes)}" + (f", GPUs: {gpus:g}" if gpus else "")
    return Waiting(f"no trial runs: waiting for room, or for a process to start ({cluster})")
