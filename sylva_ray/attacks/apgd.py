"""Auto-PGD (Croce and Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
Attacks"): PGD with momentum, whose step is halved, from the best point so far, whenever progress stalls.
"""

from __future__ import annotations

import torch

from sylva_ray.attacks.losses import cross_entropy, dlr, targeted_dlr
from sylva_ray.attacks.norms import L2, NORMS, Linf
from sylva_ray.attacks.state import Objective, Search
from sylva_ray.core.seeding import ImageDraws
from sylva_ray.core.types import AttackSpec

MOMENTUM = 0.75
"""Share of the new step; the rest repeats the last one. (The paper's alpha; its code does the same.)"""
IMPROVED = 0.75
"""A step is kept while more than this share of the steps since the last checkpoint has raised the loss."""


def apgd(search: Search, spec: AttackSpec, draws: ImageDraws) -> None:
    """``spec.loss`` is ``ce`` or ``dlr``, or ``targeted``: the DLR towards each of the ``targets`` most likely wrong classes."""
    if spec.loss == "targeted":
        ranked = ranked_targets(search.clean, search.y, int(spec.option("targets", 9)))
        for turn in range(spec.restarts * len(ranked)):
            _run(search, spec, draws, turn, _towards(search, ranked[turn % len(ranked)]))
        return
    loss = {"ce": cross_entropy, "dlr": dlr}[spec.loss]
    for restart in range(spec.restarts):
        _run(search, spec, draws, restart, lambda logits, rows: loss(logits, search.y[rows]))


def ranked_targets(clean: torch.Tensor, y: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The wrong classes of every image, the most likely first: at most ``count`` tensors ``[N]``."""
    wrong = clean.scatter(1, y[:, None], float("-inf"))
    order = wrong.argsort(dim=1, descending=True)
    return [order[:, k] for k in range(min(count, clean.shape[1] - 1))]


def _towards(search: Search, targets: torch.Tensor) -> Objective:
    return lambda logits, rows: targeted_dlr(logits, search.y[rows], targets[rows])


def checkpoints(steps: int) -> list[int]:
    """After which steps progress is looked at: 22, 41, 57, 70, ... of 100."""
    length, least, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, at = [], 0
    while at + length <= steps:
        at += length
        found.append(at)
        length = max(length - shrink, least)
    return found


def _run(search: Search, spec: AttackSpec, draws: ImageDraws, turn: int, objective: Objective) -> None:
    norm = NORMS[spec.norm]
    rows = search.alive()
    if not len(rows):
        return
    x_adv = search.x[rows]
    x_adv = norm.project(x_adv + spec.epsilon * norm.surface(x_adv, draws.of(rows), turn), x_adv, spec.epsilon)
    value, gradient, _ = search.gradient(x_adv, rows, objective)
    state = {
        "previous": x_adv,
        "x_adv": x_adv,
        "gradient": gradient,
        "best": x_adv,
        "best_gradient": gradient,
        "best_value": value,
        "value": value,
        "rises": torch.zeros_like(value),
        "value_at_check": value,
        "halved_at_check": torch.ones_like(value, dtype=torch.bool),
        "step": torch.full_like(value, 2 * spec.epsilon),
    }
    checks, since = checkpoints(spec.steps), 0
    for step in range(spec.steps):
        keep = search.stands[rows]
        rows, state = rows[keep], {name: part[keep] for name, part in state.items()}
        if not len(rows):
            return
        state = _advance(state, search.x[rows], norm, spec.epsilon, first=step == 0)
        value, state["gradient"], _ = search.gradient(state["x_adv"], rows, objective)
        state["rises"] = state["rises"] + (value > state["value"])
        state["value"] = value
        better = value > state["best_value"]
        state["best"] = _where(better, state["x_adv"], state["best"])
        state["best_gradient"] = _where(better, state["gradient"], state["best_gradient"])
        state["best_value"] = torch.where(better, value, state["best_value"])
        since += 1
        if step + 1 in checks:
            state = _check(state, since)
            since = 0


def _advance(
    state: dict[str, torch.Tensor], x: torch.Tensor, norm: Linf | L2, epsilon: float, first: bool
) -> dict[str, torch.Tensor]:
    at, share = state["x_adv"], 1.0 if first else MOMENTUM
    step = state["step"].view(-1, 1, 1, 1)
    target = norm.project(at + step * norm.ascent(state["gradient"]), x, epsilon)
    moved = norm.project(at + share * (target - at) + (1 - share) * (at - state["previous"]), x, epsilon)
    return state | {"previous": at, "x_adv": moved}


def _check(state: dict[str, torch.Tensor], since: int) -> dict[str, torch.Tensor]:
    """Halve the step, and go back to the best point, where too few steps helped or the best has not changed at a kept step."""
    stalled = (state["best_value"] <= state["value_at_check"]) & ~state["halved_at_check"]
    halved = (state["rises"] <= since * IMPROVED) | stalled
    return state | {
        "step": torch.where(halved, state["step"] / 2, state["step"]),
        "x_adv": _where(halved, state["best"], state["x_adv"]),
        "gradient": _where(halved, state["best_gradient"], state["gradient"]),
        "value_at_check": state["best_value"],
        "halved_at_check": halved,
        "rises": torch.zeros_like(state["rises"]),
    }


def _where(mask: torch.Tensor, yes: torch.Tensor, no: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.view(-1, 1, 1, 1), yes, no)
