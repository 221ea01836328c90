"""Part 1: every kind of task, every method and every attack runs, with unequal clients and on other architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.lab import Experiment, Lab, Line, attempt, computing_in
from sylva_ray.algorithms.registry import ALGORITHMS
from sylva_ray.attacks.registry import ATTACKS
from sylva_ray.config.schema import build
from sylva_ray.core.types import AttackSpec
from sylva_ray.federation.client.measuring import CertifyTask, EvaluateTask, ProbeTask, TransferTask
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.rankings.registry import RANKINGS
from sylva_ray.federation.stages.layer_game.shapley import all_coalitions
from sylva_ray.federation.stages.layer_game.tasks import CandidatesTask, GameTask, RefineTask
from sylva_ray.federation.stages.mixture.tasks import MixtureTask
from sylva_ray.federation.tasks import CohortTask
from sylva_ray.models.lora import LoraStack

PRECISIONS = ("float32", "bfloat16")
EVERYBODY = (0, 1, 2)
PGD = AttackSpec("pgd", 4 / 255, 2, 1 / 255)

OTHERS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "batch normalisation": ({"name": "test_resnet"}, {"name": "fedavg_at"}),
    "32 to 224 px": ({"name": "vit_tiny_patch16_224"}, {"name": "sylva"}),
}
"""Architectures beside the shipped one: the backbone and the method."""

SMALL_OTHERS = {"32 to 224 px": ({"name": "test_vit"}, {"name": "sylva"})}
"""Those of a reduced proof that differ (here: to 160 px)."""


SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "fedrep_at": {"training": {"local_epochs": 2}},  # the head, then the body
    "hetlora_at": {"lora": {"rank": 8}},
}
"""Settings that a method needs to run."""

REDUCED_METHODS = ("sylva", "lorica", "pm_afl", "fedavg_at", "fedawp", "fedrep_at", "hetlora_at")
REDUCED_TASKS = ("attack pgd", "task mixture", "task refine", "task game, shapley")
"""What a reduced proof runs: of the methods in float32, and of attacks and tasks in bfloat16."""


def runs(lab: Lab) -> Iterator[Line]:
    """Yield a line for everything that ran, or the error that it ended with."""
    for name in REDUCED_METHODS if lab.reduced else ALGORITHMS:
        for precision in PRECISIONS[:1] if lab.reduced and name != "sylva" else PRECISIONS:
            yield from attempt(f"method {name}, {precision}", partial(method, lab, {"name": name}, precision))
    fast = partial(method, lab, {"name": "sylva"}, "float32", {"name": "fgsm_rs"})
    yield from attempt("method sylva, fast", fast)
    for title, (backbone, algorithm) in {**OTHERS, **(SMALL_OTHERS if lab.reduced else {})}.items():
        for precision in PRECISIONS:
            yield from attempt(f"{title}, {precision}", partial(method, lab, algorithm, precision, backbone=backbone))
    for precision in PRECISIONS:
        experiment = lab.experiment(sections=computing_in(precision) | {"lora": {"rank": 2}}).with_own_labels()
        for title, work in {**attacks(experiment), **tasks(experiment)}.items():
            if not lab.reduced or precision == "float32" or title in REDUCED_TASKS:
                yield from attempt(f"{title}, {precision}", work)
        lab.synchronise()  # an error that was left on the device belongs to this precision


def method(
    lab: Lab,
    algorithm: Mapping[str, Any],
    precision: str,
    attack: Mapping[str, Any] | None = None,
    backbone: Mapping[str, Any] | None = None,
) -> Line:
    """Train the clients of a method for one epoch, heads first, and evaluate them."""
    own = SETTINGS.get(str(algorithm["name"]), {})
    training = {"precision": precision, **own.get("training", {})}
    sections = {"algorithm": algorithm, "attack": attack or {}, "backbone": backbone or {}, "lora": own.get("lora", {})}
    experiment = lab.experiment(sections=computing_in(precision) | sections | {"training": training})
    states = experiment.trained(head_epochs=1, epochs=experiment.worker.config.training.local_epochs)
    if not all(np.isfinite(value).all() for state in states for value in state.values()):
        raise ArithmeticError("a trained parameter is not finite")
    experiment.worker.run(EvaluateTask(2, EVERYBODY, experiment.stack(EVERYBODY), (PGD,), max_samples=2))
    lab.synchronise()
    return {}


def attacks(experiment: Experiment) -> dict[str, Callable[[], Line]]:
    """Return the evaluation under every registered attack, with few steps."""

    def evaluate(name: str) -> Line:
        fields = ATTACKS[name].model_fields
        few = {"steps": 2, "restarts": 2, "queries": 4, "samples": 4}
        spec = build(ATTACKS[name], {key: value for key, value in few.items() if key in fields}).spec()
        task = EvaluateTask(2, EVERYBODY, experiment.stack(EVERYBODY), (spec,), max_samples=2, keep=True)
        forwards, _ = experiment.worker.run(task).outcomes[0].passes[spec.label]
        if forwards <= 2 * len(EVERYBODY):
            raise ArithmeticError(f"the attack passed {forwards} images forward: no more than the clean ones")
        return {}

    return {f"attack {name}": partial(evaluate, name) for name in ATTACKS}


def tasks(experiment: Experiment) -> dict[str, Callable[[], Line]]:
    """Return every other kind of task, with every ranking of the layer game."""
    worker, stack = experiment.worker, experiment.stack(EVERYBODY)
    assert isinstance(worker.model, LoraStack)
    num_players = len(worker.model.players)
    phase2 = Phase2Parameters(benign_epochs=1, refine_epochs=1, attack_steps=2, max_images=4, gate_steps=2)
    everything = all_coalitions(num_players)
    layers = np.zeros((len(EVERYBODY), 3, num_players), bool)
    layers[:, 1, -1] = layers[:, 2] = True
    benign = {name: value + np.float32(0.01) for name, value in stack.items()}
    names = tuple(name for name in stack if "lora" in name)
    mixture = worker.algorithm.parameters.mixture.model_copy(update={"attack_steps": 2, "own_shares": (0.5,)})
    made: dict[str, CohortTask] = {
        "transfer": TransferTask(2, EVERYBODY, stack, benign, PGD, max_samples=2),
        "probe": ProbeTask(2, EVERYBODY, stack, PGD, max_samples=1),
        "certify": CertifyTask(2, EVERYBODY, stack, 0.1, num_draws=2, max_samples=1),
        "mixture": MixtureTask(2, EVERYBODY, stack, (benign,), names, mixture),
        "candidates": CandidatesTask(2, EVERYBODY, stack, phase2, benign, layers),
        "refine": RefineTask(2, EVERYBODY, stack, phase2, layers[:, 1]),
    }
    made |= {
        f"game, {name}": GameTask(
            2, EVERYBODY, stack, phase2, everything if ranking.needs_all_coalitions else everything[::4], ranking()
        )
        for name, ranking in RANKINGS.items()
    }

    def run(name: str) -> Line:
        worker.run(made[name])
        if worker.device.type == "cuda":
            torch.cuda.synchronize()
        return {}

    return {f"task {name}": partial(run, name) for name in made}
