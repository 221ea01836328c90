"""Per-image objectives that attacks maximise and defences minimise. All take logits ``[N, num_classes]``, return ``[N]``."""

from __future__ import annotations

from sylva_ray.core.lazy import torch


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p_y."""
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Best wrong logit minus the true one (Carlini and Wagner 2017, kappa = 0): positive means misclassified.

    The true class is masked with -inf, not with zero, which would be wrong for negative logits.
    """
    true = logits.gather(1, labels[:, None])[:, 0]
    wrong = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
    return wrong - true


def kl_divergence(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(p_reference || p): how far a prediction moved from the reference (TRADES, Zhang et al. 2019)."""
    reference = torch.nn.functional.log_softmax(reference_logits, 1)
    return (reference.exp() * (reference - torch.nn.functional.log_softmax(logits, 1))).sum(1)


def boosted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p_y - log(1 - max_{c != y} p_c) (MART, Wang et al. 2020, with its guards against log 0)."""
    runner_up = torch.nn.functional.softmax(logits, 1).scatter(1, labels[:, None], 0.0).amax(1)
    return cross_entropy(logits, labels) - torch.log(1.0001 - runner_up + 1e-12)


def true_class_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """p_y: bounded in [0, 1] and, averaged, linear in the images: what the layer game counts."""
    return torch.nn.functional.softmax(logits, 1).gather(1, labels[:, None])[:, 0]


def dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio (Croce and Hein 2020): unchanged by a shift or a positive scaling of the logits.

    -(z_y - max_{c != y} z_c) / (z_(1) - z_(3)); needs three classes."""
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) (Croce and Hein 2020); needs four classes."""
    top = logits.topk(4, dim=1).values
    return lead(logits, labels, targets) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def lead(logits: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """z_t - z_y: positive where the target is ahead of the true class."""
    return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
