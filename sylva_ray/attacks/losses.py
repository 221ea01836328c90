"""Per-image objectives that attacks maximise and defences minimise. All take logits ``[N, num_classes]``, return ``[N]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p_y."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Best wrong logit minus the true one (Carlini and Wagner 2017, kappa = 0): positive means misclassified.

    The true class is masked with -inf, not with zero, which would be wrong for negative logits.
    """
    true = logits.gather(1, labels[:, None])[:, 0]
    wrong = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
    return wrong - true


def kl_divergence(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(p_reference || p): how far a prediction moved from the reference (TRADES, Zhang et al. 2019)."""
    reference = F.log_softmax(reference_logits, 1)
    return (reference.exp() * (reference - F.log_softmax(logits, 1))).sum(1)


def boosted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p_y - log(1 - max_{c != y} p_c) (MART, Wang et al. 2020, with its guards against log 0)."""
    runner_up = F.softmax(logits, 1).scatter(1, labels[:, None], 0.0).amax(1)
    return cross_entropy(logits, labels) - torch.log(1.0001 - runner_up + 1e-12)


def true_class_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """p_y: bounded in [0, 1] and, averaged, linear in the images: what the layer game counts."""
    return F.softmax(logits, 1).gather(1, labels[:, None])[:, 0]
