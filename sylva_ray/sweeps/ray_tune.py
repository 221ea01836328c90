"""What the driver of a sweep does: check, connect, hand the trials to Ray Tune, wait, collect.

    space ── points ──► Tune ──► trials, as many at once as fit ──► run folders ──► sweep.json, report.html, best.yaml
                          └─ its own state every two seconds ──► SWEEP/tune (for --resume)

Nothing is written before every point has turned out to be an experiment and the cluster to hold one trial.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.errors import RunError, UserError
from sylva_ray.execution.ray.session import node_resources, promised_cluster, ray_session, require_reachable
from sylva_ray.provisioning.launcher_file import LauncherFile, Resources
from sylva_ray.provisioning.placement import largest_cluster
from sylva_ray.sweeps.folder import SweepFolder
from sylva_ray.sweeps.output import write_results
from sylva_ray.sweeps.points import Trial, check_space, corners, planned_trials, prepare_points, resolved_first
from sylva_ray.sweeps.results import Sweep, collect
from sylva_ray.sweeps.space import Space
from sylva_ray.sweeps.tracking import SweepTracking
from sylva_ray.sweeps.trial import HOME_SHARE, MOST_TRIALS, run_trial, trial_bundles, trials_that_fit

WATCH_S = 1.0
"""How often the driver looks for news of the trials."""

WAITING_S = 30.0
"""While no trial runs, how often to say so: a process needs ten seconds or twenty, a cloud node minutes."""

HEAD = "node:__internal_head__"
"""A resource that Ray gives to the head alone. (Of nodes on one machine, the address may be the same.)"""

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run folders say more
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends us at once; --resume goes on
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

OnEvent = Callable[[dict[str, Any]], None]


def run_sweep(space: Space, sweep_dir: Path, resume: bool, on_event: OnEvent) -> Sweep:
    """Run a sweep, or go on with it, and return what it found, which is also written.

    Raises:
        UserError: a point is no experiment, a trial fits nowhere, the folder is not free; nothing was written.
    """
    folder = SweepFolder(Path(sweep_dir).resolve())
    folder.check(space, resume)
    check_space(space)
    if space.cluster.address is not None:
        require_reachable(space.cluster.address, space.cluster.connect_timeout_s)
    prepare_points(space)
    with ray_session(space.cluster):
        home = _home()
        slots = check_trials_fit(space, home, promised_cluster(space.cluster))
        folder.claim(space, resume)
        if not folder.compute.exists():  # once: trials that differ in precision could not be compared
            began_before_there_was_a_choice = folder.trials.exists()
            chosen = resolved_first(space, measure=not began_before_there_was_a_choice)
            folder.write(folder.compute, chosen.to_yaml())
        tracking = SweepTracking(folder, space)
        tracking.open()
        for problem in tracking.problems:
            on_event({"event": "warning", "text": problem})
        with watching(folder, space, on_event):
            trials, failed = _fit(space, folder, home, slots, tracking.changes)
    sweep = collect(folder, space, trials, failed)
    write_results(folder, sweep)
    tracking.close(sweep)
    for problem in tracking.problems:
        on_event({"event": "warning", "text": problem})
    return sweep


def check_trials_fit(space: Space, home: str, promised: LauncherFile | None) -> int:
    """How many of the largest trials run at once on the empty cluster (and by ``trials.at_once``).

    Args:
        home: the resource that only the node of this process has.
        promised: what an autoscaler may bring; its largest cluster counts.

    Raises:
        UserError: not even one.
    """
    live = node_resources()
    here = next(node for node in live if home in node)
    others = [node for node in live if node is not here]
    slots = MOST_TRIALS if space.trials.at_once == "auto" else min(MOST_TRIALS, space.trials.at_once)
    for config in _largest(space):
        nodes = [here, *(others if promised is None else largest_cluster(config.cluster, promised)[1:])]
        fit = trials_that_fit(trial_bundles(config, home), nodes, slots)
        if fit == 0:
            raise _fits_nowhere(config, here, nodes)
        slots = min(slots, fit)
    return slots


def _fits_nowhere(config: ExperimentConfig, here: Resources, nodes: Sequence[Resources]) -> UserError:
    section = config.cluster
    worker = f"({section.cpus_per_actor:g} CPUs, {section.gpus_per_actor:g} GPUs)"
    if section.pool == "in_process":
        has = f"{here.get('CPU', 0.0):g} CPUs and {here.get('GPU', 0.0):g} GPUs"
        fix = f"such a trial needs {worker} on this node, which has {has}; cluster.pool=ray uses all nodes"
        return UserError("cluster.pool", section.pool, fix)
    has = " and ".join(f"{sum(node.get(name, 0.0) for node in nodes):g} {name}s" for name in ("CPU", "GPU"))
    fix = f"one trial needs {section.num_actors} x {worker}, and the whole cluster, at its largest, has {has}"
    return UserError("cluster.num_actors", section.num_actors, fix)


def _largest(space: Space) -> list[ExperimentConfig]:
    """One experiment for every number of actors that a trial may have."""
    configs = (space.config(values, space.seeds[0]) for values in corners(space))
    return list({config.cluster.num_actors: config for config in configs}.values())


def _home() -> str:
    """The resource that only this node has: the head's, or one that is called by its address."""
    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return max((name for name in resources if name.startswith("node:")), key=lambda name: name == HEAD)


def _fit(
    space: Space, folder: SweepFolder, home: str, slots: int, tracking: dict[str, Any]
) -> tuple[list[Trial], dict[str, str]]:
    """Tune's part; returns all trials, and what it says of those that died too often.

    A search that learns and a scheduler that prunes go on from Tune's state on disk. A plain list of trials needs none: those
    without a result are what is left."""
    os.environ.update(SETTINGS)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)

    def bundles(given: dict[str, Any]) -> tune.PlacementGroupFactory:
        try:
            config = space.config(given["trial"]["values"], given["trial"]["seed"])
        except UserError:
            # a point of Optuna's, in a range whose ends are fine: the trial itself says so, and the others go on
            return tune.PlacementGroupFactory([{home: HOME_SHARE}])
        return tune.PlacementGroupFactory(trial_bundles(config, home))

    trainable = tune.with_parameters(
        run_trial,
        sweep=str(folder.root),
        space=space,
        tracking=tracking,
        working_dir=os.getcwd(),
        environment={name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")},
    )
    trainable = tune.with_resources(trainable, bundles)
    remembers = space.remembers
    if remembers and any(folder.tune.glob("experiment_state-*")):
        results = _run(tune.Tuner.restore(str(folder.tune), trainable, restart_errored=True))
    else:
        shutil.rmtree(folder.tune, ignore_errors=True)
        planned = [] if space.search.kind == "optuna" else planned_trials(space)
        left = planned if remembers else [trial for trial in planned if not folder.finished(trial.key)]
        is_over = bool(planned) and not left
        results = [] if is_over else _run(_new_tuner(space, folder, trainable, slots, left))
    ran = [(Trial(**result.config["trial"]), result.error) for result in results]
    failed = {trial.key: str(error).strip().splitlines()[-1] for trial, error in ran if error}
    return ([trial for trial, _ in ran] if remembers else planned_trials(space)), failed


def _run(tuner: tune.Tuner) -> Any:
    try:
        return tuner.fit()
    except tune.TuneError as error:
        raise RunError(f"Ray Tune: {str(error).strip().splitlines()[-1]}") from error


def _new_tuner(space: Space, folder: SweepFolder, trainable: Any, slots: int, planned: list[Trial]) -> tune.Tuner:
    config: dict[str, Any] = {
        "reuse_actors": True,  # a process's imports take longer than a small trial
        "trial_dirname_creator": _trial_key,
    }
    param_space: dict[str, Any] = {}
    if space.search.kind == "optuna":
        from sylva_ray.sweeps.optuna_search import PointSearch

        assert space.search.num_points is not None
        config["search_alg"] = PointSearch(space)
        config["num_samples"] = space.search.num_points * len(space.seeds)
        config["max_concurrent_trials"] = slots  # to suggest more than can run would be to guess more than needed
    else:
        trials = [{"values": dict(trial.values), "seed": trial.seed} for trial in planned]
        param_space["trial"] = tune.grid_search(trials)
        if space.trials.at_once != "auto":
            config["max_concurrent_trials"] = space.trials.at_once
    if space.scheduler.kind == "asha":
        config["scheduler"] = asha(space)
    return tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(**config),
        run_config=tune.RunConfig(
            name=folder.tune.name,
            storage_path=str(folder.root),
            failure_config=tune.FailureConfig(max_failures=space.trials.retries),
            verbose=0,
        ),
    )


def _trial_key(trial: Any) -> str:
    return Trial(**trial.config["trial"]).key


def asha(space: Space) -> ASHAScheduler:
    """Successive halving on rounds of phase 1; who survives them all runs to the end, phase 2 included."""
    objective, section = space.objectives[0], space.scheduler
    rounds = max(space.config(values, space.seeds[0]).training.rounds for values in corners(space))
    return ASHAScheduler(
        time_attr="step",
        metric=objective.metric,
        mode=objective.mode,
        max_t=rounds,
        grace_period=section.grace_rounds,
        reduction_factor=section.reduction_factor,
        stop_last_trials=False,
    )


@contextmanager
def watching(folder: SweepFolder, space: Space, on_event: OnEvent) -> Iterator[None]:
    """Pass on what the trials' histories say, from a thread, for as long as the block lasts."""
    total = (space.search.num_points or 0) * len(space.seeds) or len(planned_trials(space))
    done, seen, running = threading.Event(), dict[str, int](), dict[str, int]()

    def look(tell: OnEvent = on_event) -> None:
        for path in sorted((folder.root / "attempts").glob("*.jsonl")):
            history = folder.attempts(path.stem)
            for entry in history[seen.get(path.stem, 0) :]:
                tell({"event": "trial", "key": path.stem, **entry})
                if "ended" in entry:
                    running.pop(path.stem, None)
                elif "process" in entry:
                    running[path.stem] = entry["process"]
            seen[path.stem] = len(history)

    def watch() -> None:
        idle_since = time.monotonic()
        while not done.wait(WATCH_S):
            look()
            idle_since = time.monotonic() if any(map(_is_alive, running.values())) else idle_since
            if time.monotonic() - idle_since > WAITING_S:
                idle_since = time.monotonic()
                nodes = node_resources()
                has = f"nodes: {len(nodes)}, GPUs: {sum(node.get('GPU', 0.0) for node in nodes):g}"
                on_event(
                    {"event": "waiting", "what": f"no trial runs: waiting for room, or for a process to start ({has})"}
                )

    look(tell=lambda _: None)  # what was before a --resume
    running.clear()
    known = sorted(key for key in seen if folder.finished(key))
    on_event({"event": "sweep", "trials": total, "finished": known})
    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


def _is_alive(process: int) -> bool:
    """Whether a coordinator, which is on this node, is there. One that was killed could not say so."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, hence there
        pass
    return True
