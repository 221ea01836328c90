"""Per-image losses, which attacks maximise and defences minimise.

All functions take logits ``[N, num_classes]`` and integer labels ``[N]``, and return ``[N]``.
"""

from __future__ import annotations

from sylva_ray.core.lazy import torch


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy -log p_y."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return max_{c != y} z_c - z_y (Carlini and Wagner 2017, kappa = 0); positive: misclassified."""
    true = logits.gather(1, labels[:, None])[:, 0]
    wrong = logits.scatter(1, labels[:, None], float("-inf")).amax(1)  # not 0: logits may be negative
    return wrong - true


def kl_divergence(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(p_reference || p), the regulariser of TRADES (Zhang et al. 2019)."""
    reference = torch.nn.functional.log_softmax(reference_logits, 1)
    return (reference.exp() * (reference - torch.nn.functional.log_softmax(logits, 1))).sum(1)


def boosted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return -log p_y - log(1 - max_{c != y} p_c).

    This is the BCE of MART (Wang et al. 2020), with the constants of the authors' code that avoid log 0.
    """
    runner_up = torch.nn.functional.softmax(logits, 1).scatter(1, labels[:, None], 0.0).amax(1)
    return cross_entropy(logits, labels) - torch.log(1.0001 - runner_up + 1e-12)


def true_class_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return p_y in [0, 1]; its mean over images is the value function of the layer game."""
    return torch.nn.functional.softmax(logits, 1).gather(1, labels[:, None])[:, 0]


def dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the difference of logits ratio (DLR) of Croce and Hein (2020).

    -(z_y - max_{c != y} z_c) / (z_(1) - z_(3)), where z_(k) is the k-th largest logit. It is invariant to shifts and to
    positive scaling of the logits. It needs at least three classes.
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the targeted DLR -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) of Croce and Hein (2020).

    It needs at least four classes. ``targets`` are the classes t, ``[N]``.
    """
    top = logits.topk(4, dim=1).values
    return target_margin(logits, labels, targets) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def target_margin(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return z_t - z_y, which is positive where the target class has the larger logit."""
    return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
