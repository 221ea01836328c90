"""Part 3: equal inputs give equal bits, twice in one process and in another one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.gpu.lab import Lab, Line, computing_in
from sylva_ray.core.types import AttackSpec, stack_digest
from sylva_ray.federation.client.measuring import EvaluateTask
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.rankings.registry import create_ranking
from sylva_ray.federation.stages.layer_game.shapley import all_coalitions
from sylva_ray.federation.stages.layer_game.tasks import GameTask
from sylva_ray.models.lora import LoraStack

SCRIPT = Path(__file__).parents[1] / "gpu_proof.py"
CLIENTS = (0, 1, 2)


def bits(lab: Lab) -> Iterator[Line]:
    """Yield whether the digests of training, evaluation and game are the same."""
    first, again = digests(lab), digests(lab)
    for name, digest in first.items():
        yield {"item": f"{name}, twice in a process", "digest": digest, "holds": again[name] == digest}
    command = [sys.executable, str(SCRIPT), "--device", lab.device, "--digests", *["--reduced"] * lab.reduced]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    other: dict[str, str] = json.loads(answer.stdout.splitlines()[-1])
    for name, digest in first.items():
        yield {"item": f"{name}, in two processes", "digest": other[name], "holds": other[name] == digest}


def digests(lab: Lab) -> dict[str, str]:
    """Return the digests of what training, evaluation and the layer game result in, in both precisions."""
    found = {}
    for precision in ("float32", "bfloat16"):
        experiment = lab.experiment(sections=computing_in(precision))
        worker, stack = experiment.worker, experiment.stack(CLIENTS)
        trained = experiment.trained()
        found[f"train {precision}"] = digest_of({f"{c}/{n}": v for c, s in enumerate(trained) for n, v in s.items()})
        attacks = (AttackSpec("pgd", 4 / 255, 3, 1 / 255), AttackSpec("square", 4 / 255, 5, 0.0))
        measured = worker.run(EvaluateTask(2, CLIENTS, stack, attacks)).outcomes
        found[f"evaluate {precision}"] = digest_of(
            {f"{c}/{n}": v for c, o in enumerate(measured) for n, v in o.values.items()}
        )
        assert isinstance(worker.model, LoraStack)
        phase2 = Phase2Parameters(benign_epochs=1, attack_steps=2, max_images=4)
        coalitions = all_coalitions(len(worker.model.players))[::8]
        played = worker.run(GameTask(2, CLIENTS, stack, phase2, coalitions, create_ranking("shapley"))).outcomes
        found[f"game {precision}"] = digest_of({str(c): outcome.values for c, outcome in enumerate(played)})
    return found


def digest_of(arrays: dict[str, np.ndarray]) -> str:
    """Return eight hexadecimal digits of the digest of named arrays."""
    return stack_digest(arrays).hex()[:8]
