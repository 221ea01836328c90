"""Measure whether logging slows down training when MLflow holds hundreds of trials.

    python benchmarks/sweep_tracking.py [--trials N] [--pairs N]

A store is filled with N finished trials of a sweep. Then one small experiment runs alternately with and without
tracking, as a trial of that sweep, in one process on one thread. The medians of the steps' wall seconds are compared,
and those of whole runs, which wait at their end until MLflow has everything. Records are sent by another thread, which
competes for the interpreter.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from sylva_ray.config.stored import RUN_CONFIG
from sylva_ray.execution.experiment import run_experiment
from sylva_ray.execution.in_process import InProcessPool
from sylva_ray.federation.observer import Observer
from sylva_ray.observers.mlflow.tracker import experiment_files, open_sweep, send_run
from sylva_ray.preparation.experiment import create_worker, prepare
from sylva_ray.storage.run_folder import SUMMARY, RunFolder
from sylva_ray.sweeps.space import load_space

SPACE = Path(__file__).parents[1] / "tune_spaces" / "smoke.yaml"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    space = load_space(SPACE, ["training.rounds=6"])
    plain = space.config({"lora.rank": 2, "attack.epsilon": "8/255"}, 0)
    plain = plain.model_copy(update={"tracking": plain.tracking.model_copy(update={"enabled": False})})
    prepared = prepare(plain)
    worker = create_worker(prepared.config, prepared.fleet, prepared.backbone)

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        uri = f"sqlite:///{root / 'mlflow.db'}"
        parent = open_sweep(uri, "sweep", "sweep", {}, {})
        tracking = prepared.config.tracking.model_copy(
            update={"enabled": True, "uri": uri, "experiment": "sweep", "parent_run_id": parent, "detail": "fleet"}
        )
        tracked = prepared.config.model_copy(update={"tracking": tracking})

        def run(name: str, with_tracking: bool) -> tuple[float, float]:
            """Return the seconds of the steps and of the whole run."""
            config = tracked if with_tracking else prepared.config
            one = type(prepared)(config, prepared.fleet, prepared.backbone, prepared.setup_seconds)
            RunFolder(root / name).claim(config, resume=False)
            started = time.perf_counter()
            run_experiment(one, RunFolder(root / name), InProcessPool(worker), Observer())
            whole = time.perf_counter() - started
            return sum(record.seconds["wall"] for record in RunFolder(root / name).load_records()), whole

        run("first", True)
        started = time.perf_counter()
        for number in range(arguments.trials):
            copy = root / f"copy{number}"
            shutil.copytree(
                root / "first", copy, ignore=shutil.ignore_patterns("tracking.json", "adapters", "checkpoint")
            )
            problems = send_run(RunFolder(copy), tracked)
            assert not problems, problems
        filling = time.perf_counter() - started
        pairs = [(run(f"without{n}", False), run(f"with{n}", True)) for n in range(arguments.pairs)]
        started = time.perf_counter()
        found = experiment_files("sweep", uri, (SUMMARY, RUN_CONFIG))
        reading = time.perf_counter() - started
        assert found is not None
        assert len(found) == arguments.trials + 1 + arguments.pairs, "every trial has arrived"
        state = json.loads(RunFolder(root / "with0").tracking_file.read_text())
        assert state["finished"], "the last record has arrived"
    without, with_tracking = ([pair[i] for pair in pairs] for i in (0, 1))
    steps = [statistics.median(value for value, _ in side) for side in (without, with_tracking)]
    whole = [statistics.median(value for _, value in side) for side in (without, with_tracking)]
    print(f"store            {arguments.trials} trials, {filling / arguments.trials:.2f} s to send each")
    print(f"steps            {steps[0]:.2f} s without, {steps[1]:.2f} s with tracking: ratio {steps[1] / steps[0]:.3f}")
    print(f"whole run        {whole[0]:.2f} s without, {whole[1]:.2f} s with tracking: ratio {whole[1] / whole[0]:.3f}")
    print(f"reading it all   {reading:.1f} s (what `sylva-ray compare sweep` asks MLflow for)")


if __name__ == "__main__":
    main()
