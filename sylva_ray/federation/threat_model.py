"""The threat model of a run in words, and whether it was trained for the budget at which it is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sylva_ray.attacks.registry import find_attack
from sylva_ray.config.resolved import ResolvedConfig
from sylva_ray.core.records import StageRecord
from sylva_ray.core.text import clients_text, of_255
from sylva_ray.core.types import AttackSpec
from sylva_ray.federation.stages.layer_game.refine import Refine
from sylva_ray.federation.stages.layer_game.stage import LayerGame
from sylva_ray.transport.byzantine import byzantine_clients

TEST_POOLS = {"test": "test", "train": "held-out training"}
"""``dataset.test_pool`` in words."""

TEST_SHARES = {"own": "", "equal": ", as many of each of its classes"}
"""``partition.test_shares`` in words."""

NORMS = {"linf": "L-infinity", "l2": "L2", "l0": "L0 (pixels)"}
"""Norms in words."""

GUARDED = {LayerGame.name, Refine.name}
"""Names of the stages that attack images to guard robustness, not to train it."""

_EVALUATION_PRECISION = {
    "float32": "float32 at evaluation",
    "bfloat16": "benign accuracy in float32; attacks compute their steps in bfloat16, and an image counts as broken "
    "only if the float32 model misclassifies it, too",
}


def threat_model(
    config: ResolvedConfig, attacks: Sequence[AttackSpec], records: Sequence[StageRecord]
) -> dict[str, str]:
    """Describe what is attacked, how, and what the attacker knows.

    Args:
        config: of the run.
        attacks: of the evaluation.
        records: of the run's stages: whether they attacked images in training.

    Returns:
        ``norm``, ``training``, ``evaluation``, ``knowledge`` and ``precision``; ``byzantine`` where there are such
        clients.
    """
    used = {spec.norm for spec in attacks} or {"linf"}
    norms = ", ".join(words for norm, words in NORMS.items() if norm in used)
    labels = ", ".join(spec.label for spec in attacks)
    black_box = sorted({spec.name for spec in attacks if find_attack(spec.name).black_box})
    box = f"white box, except {' and '.join(black_box)} (the model's answers only)" if black_box else "white box"
    training = f"{config.attack.title} at epsilon {of_255(config.attack.epsilon)}"
    return {
        "norm": f"{norms}, on pixels in [0, 1] at the images' own size, before the model resizes them",
        "training": training if _is_adversarial(config, records) else "without an attack",
        "evaluation": f"{labels}; {box}, on every client's own {TEST_POOLS[config.dataset.test_pool]} images"
        f"{TEST_SHARES[config.partition.test_shares]}; "
        "an image counts as broken if the model misclassifies it unchanged or after any step of the attack",
        "knowledge": "the attacker knows the deployed personal weights; nothing is randomised at inference",
        "precision": _EVALUATION_PRECISION[config.evaluation.precision],
        **_byzantine(config),
    }


def _byzantine(config: ResolvedConfig) -> dict[str, str]:
    attackers = byzantine_clients(config)
    if not attackers:
        return {}
    who = f"{clients_text(attackers)} of {config.partition.num_clients}"
    return {"byzantine": f"{who} attack the training ({config.byzantine.attack}), and count in no mean"}


def budget_warnings(
    config: ResolvedConfig,
    attacks: Sequence[AttackSpec],
    records: Sequence[StageRecord],
    other_epsilons: Sequence[float] = (),
) -> list[str]:
    """Say that no attack of an evaluation has the norm and epsilon that training or guard defend against.

    Args:
        config: of the run.
        attacks: of the evaluation.
        records: of the run's stages: whether they attacked images in training and played the layer game.
        other_epsilons: L-infinity budgets at which something else was measured, such as a curve.

    Returns:
        One sentence per budget that is not measured; none where no attack has a budget, or nothing was defended.
    """
    has_guard = any(record.stage in GUARDED for record in records)
    bounded = [spec for spec in attacks if math.isfinite(spec.epsilon)]
    linf = [*other_epsilons, *(spec.epsilon for spec in bounded if spec.norm == "linf")]
    budgets = {"training": config.attack.epsilon} if _is_adversarial(config, records) else {}
    budgets |= {"the guard of phase 2": config.reported_epsilon} if has_guard else {}
    missed = {
        name: epsilon for name, epsilon in budgets.items() if not any(math.isclose(other, epsilon) for other in linf)
    }
    if not missed or not bounded:
        return []
    verb = "was" if len(bounded) == 1 else "were"
    measured = f"only {', '.join(spec.label for spec in bounded)} {verb} measured"
    sentences = []
    for epsilon in dict.fromkeys(missed.values()):
        names = " and ".join(name for name, other in missed.items() if other == epsilon)
        text = of_255(epsilon)
        used = f"{names} used L-infinity epsilon {text}"
        sentences.append(f"{used}, but {measured}; for that: sylva-ray evaluate RUN --attack pgd:epsilon={text}")
    return sentences


def _is_adversarial(config: ResolvedConfig, records: Sequence[StageRecord]) -> bool:
    """Return whether images were attacked in training, and could change."""
    attacked = any("attack" in record.seconds for record in records if record.stage not in GUARDED)
    return attacked and config.attack.epsilon > 0
