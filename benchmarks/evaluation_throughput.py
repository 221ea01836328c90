"""Measure the standard suite on a trained fleet: images per second, and the fraction that the bare passes take.

    python benchmarks/evaluation_throughput.py RUN [--images N] [--rounds R] [--clients C] [--only LABEL]

Every attack runs on the whole stack of clients and on one client after the other. A third cost, that of an attack which
no image leaves early, is counted and not run. The bare cost is that of the passes which the attack made, in full
batches, with nothing between them. Runs alternate, so that a busy machine disturbs them alike, and medians are
compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from sylva_ray.attacks.losses import cross_entropy
from sylva_ray.attacks.registry import attack_stack
from sylva_ray.config.experiment import load_config
from sylva_ray.config.stored import RUN_CONFIG
from sylva_ray.core.types import AttackSpec, ParameterStack, Split, stack_states
from sylva_ray.evaluation.plan import suite
from sylva_ray.federation.client.batches import client_images, split_draws
from sylva_ray.federation.client.measuring import EVALUATION_ROWS
from sylva_ray.models.cohort import to_parameters
from sylva_ray.preparation.experiment import create_worker, prepare
from sylva_ray.storage.run_folder import RunFolder

T = TypeVar("T")

Passes = tuple[int, int]
"""Numbers of images in forward and in backward passes."""


class Bench:
    """The clients' models and some of their test images.

    Args:
        run_dir: a finished run.
        clients: how many clients.
        images: test images per client.
    """

    def __init__(self, run_dir: Path, clients: int, images: int) -> None:
        config, states = RunFolder(run_dir).load_config(), RunFolder(run_dir).load_states()
        prepared = prepare(
            load_config(run_dir / RUN_CONFIG, ["cluster.pool=in_process", "cluster.threads_per_actor=1"])
        )
        self.worker = create_worker(prepared.config, prepared.fleet, prepared.backbone)
        self.clients = list(range(min(clients, len(states))))
        tests = [prepared.fleet.client(client).test for client in self.clients]
        self.pieces = [Split(test.images[:images], test.labels[:images]) for test in tests]
        self.states, self.seed, self.num_classes = states, config.seed, prepared.fleet.num_classes
        self.epsilon = config.attack.epsilon
        self.total = sum(map(len, self.pieces))

    def attack(self, spec: AttackSpec, members: Sequence[int]) -> Passes:
        """Run one attack on a stack of some of the clients, in the batches of `sylva-ray evaluate`."""
        pieces = [self.pieces[m] for m in members]
        params = self.params(members)
        rows = max(1, EVALUATION_ROWS // len(members))
        forwards = backwards = 0
        for first in range(0, max(map(len, pieces)), rows):
            window = [Split(p.images[first : first + rows], p.labels[first : first + rows]) for p in pieces]
            images = client_images(window, torch.float32, self.worker.device)
            draws = split_draws(self.seed, spec.label, [self.clients[m] for m in members], window, first)
            hit = attack_stack(self.worker.model, params, images, spec, draws.to(self.worker.device))
            forwards, backwards = forwards + hit.forwards, backwards + hit.backwards
        return forwards, backwards

    def one_by_one(self, spec: AttackSpec) -> Passes:
        """Run one attack on one client after the other."""
        parts = [self.attack(spec, [m]) for m in range(len(self.pieces))]
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    def bare(self, repeats: int) -> tuple[float, float]:
        """Return the seconds per image of a forward pass, and of a forward and backward pass, in full batches."""
        rows = max(1, EVALUATION_ROWS // len(self.pieces))
        window = [Split(p.images[:rows], p.labels[:rows]) for p in self.pieces]
        images = client_images(window, torch.float32, self.worker.device)
        x, y, owner = images.x, images.y, images.owner
        params = self.params(range(len(self.pieces)))
        model = self.worker.model

        @torch.no_grad()
        def forward() -> None:
            model.forward(params, x, owner)

        def both() -> None:
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(cross_entropy(model.forward(params, leaf, owner), y).sum(), leaf)

        ways: tuple[Callable[[], None], ...] = (forward, both)
        first, second = (statistics.median(timed(way)[0] for _ in range(repeats)) / len(x) for way in ways)
        return first, second

    def params(self, members: Sequence[int]) -> ParameterStack:
        """Return the stacked states of some clients."""
        stack = stack_states([self.states[self.clients[m]] for m in members])
        return to_parameters(stack, self.worker.device, torch.float32)


def timed(work: Callable[..., T], *given: object) -> tuple[float, T]:
    """Return the seconds of a call and its result: CPU time, or wall time where there is a GPU, including its queue."""
    if not torch.cuda.is_available():
        started = time.process_time()
        result = work(*given)
        return time.process_time() - started, result
    started = time.perf_counter()
    result = work(*given)
    torch.cuda.synchronize()
    return time.perf_counter() - started, result


def passes_without_early_stop(bench: Bench, spec: AttackSpec) -> Passes:
    """Count an attack's passes where none succeeds: the budget is zero and the labels are the model's own answers."""
    params = bench.params(range(len(bench.pieces)))
    few = [Split(piece.images[:1], piece.labels[:1]) for piece in bench.pieces]
    images = client_images(few, torch.float32, bench.worker.device)
    images = replace(images, y=bench.worker.model.forward(params, images.x, images.owner).argmax(1))
    draws = split_draws(bench.seed, spec.label, bench.clients, few, 0).to(bench.worker.device)
    hit = attack_stack(bench.worker.model, params, images, replace(spec, epsilon=0.0, step_size=0.0), draws)
    return hit.forwards * bench.total // len(images), hit.backwards * bench.total // len(images)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--images", type=int, default=24, help="test images per client")
    parser.add_argument("--only", default="", help="attacks whose label begins like this, e.g. autoattack")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; medians are printed")
    arguments = parser.parse_args()
    bench = Bench(arguments.run, arguments.clients, arguments.images)
    specs = [s for s in suite("standard", bench.epsilon, bench.num_classes) if s.label.startswith(arguments.only)]
    if not specs:
        parser.error(f"no attack of the standard suite begins like {arguments.only!r}")
    everyone = list(range(len(bench.pieces)))
    bench.attack(suite("quick", bench.epsilon, bench.num_classes)[0], everyone)  # warm up
    print(f"{len(everyone)} clients, {bench.total} images, epsilon {bench.epsilon * 255:g}/255\n")
    print("| attack | images/s | bare fraction | one client at a time / stack | passes / without early stop |")
    print("|---|---|---|---|---|")
    sums = {"stack": 0.0, "single": 0.0, "bare": 0.0, "passes": 0.0, "whole": 0.0}
    for spec in specs:
        times = []
        for _ in range(arguments.rounds):
            stack, (forwards, backwards) = timed(bench.attack, spec, everyone)
            single, _ = timed(bench.one_by_one, spec)
            forward, both = bench.bare(3)
            times.append((stack, single, (forwards - backwards) * forward + backwards * both))
        stack, single, bare = (statistics.median(column) for column in zip(*times, strict=True))
        passes, whole = forwards + backwards, sum(passes_without_early_stop(bench, spec))
        ratios = f"{bare / stack:.2f} | {single / stack:.2f} | {passes / whole:.2f}"
        print(f"| `{spec.label}` | {bench.total / stack:.1f} | {ratios} |")
        for name, value in zip(sums, (stack, single, bare, passes, whole), strict=True):
            sums[name] += value
    stack = sums["stack"]
    ratios = f"{sums['bare'] / stack:.2f} | {sums['single'] / stack:.2f} | {sums['passes'] / sums['whole']:.2f}"
    print(f"| all | {bench.total / stack:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
