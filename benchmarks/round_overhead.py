"""Compare a round through Ray with the same steps in a bare loop, and measure the memory of a client actor.

    python benchmarks/round_overhead.py [--rounds N]

The bare loop trains the same cohorts with the same batches in this process and does nothing else. The round through Ray
adds stacking, the object store, the actor, aggregation, the checkpoint and the record. Both have one worker with one
thread. Rounds alternate, so that a busy machine disturbs both alike, and medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from sylva_ray.algorithms.registry import create_algorithm
from sylva_ray.config.experiment import load_config
from sylva_ray.core.seeding import generator
from sylva_ray.core.types import stack_states
from sylva_ray.execution.ray.pool import RayPool
from sylva_ray.execution.ray.session import ray_session
from sylva_ray.federation.client.training import TrainSettings, TrainTask
from sylva_ray.federation.cohorts import make_cohorts
from sylva_ray.federation.contract import stages_of_run
from sylva_ray.federation.loop import Rounds
from sylva_ray.federation.observer import Observer
from sylva_ray.federation.server import Server
from sylva_ray.preparation.experiment import create_worker, prepare
from sylva_ray.storage.run_folder import RunFolder

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"


def main() -> None:
    """Measure and print."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="the first warms up and is not counted")
    rounds = parser.parse_args().rounds
    if rounds < 2:
        parser.error(f"--rounds {rounds}: nothing would be counted; use at least 2")
    overrides = ["cluster.num_actors=1", f"training.rounds={rounds}", "evaluation.attacks=[]", "tracking.enabled=false"]
    prepared = prepare(load_config(CONFIG, overrides))
    config, fleet = prepared.config, prepared.fleet
    worker = create_worker(config, fleet, prepared.backbone)
    state = worker.model.initial_state(generator(config.seed, "initial state"))
    cohorts = make_cohorts(range(fleet.num_clients), fleet.label_matrix().sum(1).tolist(), config.training.cohort_size)

    def bare_round(number: int) -> float:
        tasks = [
            TrainTask(number, c, stack_states([state] * len(c)), TrainSettings(config.attack.epsilon, 1e-3))
            for c in cohorts
        ]
        started = time.perf_counter()
        for task in tasks:
            worker.run(task)
        return time.perf_counter() - started

    with ray_session(config.cluster), tempfile.TemporaryDirectory() as folder:
        fleet_ref, backbone_ref = ray.put(fleet), ray.put(prepared.backbone)
        pool = RayPool(config, fleet_ref, backbone_ref, 1, Observer())
        algorithm = create_algorithm(config.algorithm)
        algorithm.bind_model(worker.model, fleet.num_classes, {}, worker.device)
        initial = [state] * fleet.num_clients
        server = Server(config, algorithm, fleet, initial, {}, pool, RunFolder(folder), Observer())
        loop = Rounds(server, stages_of_run(algorithm, config))

        def ray_round(number: int) -> float:
            started = time.perf_counter()
            record = loop.run_stage(number)
            peaks.append(record.peak_memory_bytes)
            return time.perf_counter() - started

        peaks: list[int] = []
        bare_round(1)  # both warm up once
        ray_round(1)
        times = [(bare_round(n), ray_round(n)) for n in range(2, rounds + 1)]
        pool.close()
    bare, through_ray = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"bare loop      {bare:.2f} s per round")
    print(f"through Ray    {through_ray:.2f} s per round")
    print(f"ratio          {through_ray / bare:.3f}")
    print(f"client actor   {max(peaks) / 2**20:.0f} MiB peak resident memory, {fleet.num_clients} clients")


if __name__ == "__main__":
    main()
