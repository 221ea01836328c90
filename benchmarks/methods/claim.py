"""Does a method dominate Sylva? A paired bootstrap of class-balanced accuracies over images and seeds.

Every method is evaluated on the same images of the same clients, so an image is drawn for all methods at once. Images
are drawn within a client and class; seeds, that is partitions and initial weights, are drawn too; clients are not. A
method dominates another one in a statistic over the clients (their mean, or their worst decile) if it is better in
benign *and* in robust accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sylva_ray.core.sections import Section

STATISTICS = ("mean", "worst decile")


class Difference(Section):
    """Another method minus Sylva, as fractions.

    Attributes:
        benign: class-balanced benign accuracy: observed, and the ends of the 90 % interval.
        robust: class-balanced accuracy under the strongest attack, likewise.
        dominates: share of the resamples in which the method is better in both.
    """

    benign: tuple[float, float, float]
    robust: tuple[float, float, float]
    dominates: float

    @property
    def is_ahead(self) -> bool:
        """Whether the method is at least as good in both observed accuracies."""
        return min(self.benign[0], self.robust[0]) >= 0 and max(self.benign[0], self.robust[0]) > 0


def differences(
    correct: Mapping[str, Sequence[Sequence[np.ndarray]]],
    labels: Sequence[Sequence[np.ndarray]],
    reference: str,
    rng: np.random.Generator,
    resamples: int = 2000,
) -> dict[str, dict[str, Difference]]:
    """Compare every method with one of them.

    Args:
        correct: ``{method: [seed][client] [2, n] bool}``, benign and robust outcomes.
        labels: of the same images, ``[seed][client] [n]``.
        reference: the method that the others are compared with.
        rng: for the resamples.
        resamples: number of bootstrap samples.

    Returns:
        ``{method: {statistic: difference}}`` of the others.
    """
    others = [method for method in correct if method != reference]
    methods = [reference, *others]
    stacked = [
        [np.stack([correct[method][seed][client] for method in methods]) for client in range(len(clients))]
        for seed, clients in enumerate(labels)
    ]  # [seed][client] [M, 2, n]
    observed = _over_clients(np.stack([_balanced(*seed, None, 1) for seed in zip(stacked, labels, strict=True)]))
    drawn = _over_clients(np.stack([_balanced(*seed, rng, resamples) for seed in zip(stacked, labels, strict=True)]))
    seeds = rng.integers(len(labels), size=(len(labels), resamples))
    found: dict[str, dict[str, Difference]] = {method: {} for method in others}
    for statistic in STATISTICS:
        at = observed[statistic].mean(0)[0]  # [M, 2]
        samples = np.take_along_axis(drawn[statistic], seeds[:, :, None, None], axis=0).mean(0)  # [B, M, 2]
        for index, method in enumerate(others, start=1):
            difference = samples[:, index] - samples[:, 0]
            low, high = np.quantile(difference, [0.05, 0.95], axis=0)
            intervals = [(float(at[index, c] - at[0, c]), float(low[c]), float(high[c])) for c in range(2)]
            dominates = float((difference > 0).all(1).mean())
            found[method][statistic] = Difference(benign=intervals[0], robust=intervals[1], dominates=dominates)
    return found


def _balanced(
    clients: Sequence[np.ndarray], labels: Sequence[np.ndarray], rng: np.random.Generator | None, resamples: int
) -> np.ndarray:
    """Return the class-balanced accuracies of resamples, ``[resamples, clients, M, 2]``; of the images without rng."""
    accuracies = []
    for outcomes, y in zip(clients, labels, strict=True):
        recalls = []
        for label in np.unique(y):
            chosen = outcomes[:, :, y == label].astype(float)
            n = chosen.shape[-1]
            counts = np.ones((resamples, n)) if rng is None else rng.multinomial(n, np.full(n, 1 / n), size=resamples)
            recalls.append(np.einsum("bn,mcn->bmc", counts / n, chosen))
        accuracies.append(np.mean(recalls, axis=0))
    return np.stack(accuracies, axis=1)


def _over_clients(accuracies: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean and worst decile over clients of ``[seeds, resamples, clients, M, 2]``."""
    tenth = max(1, accuracies.shape[2] // 10)
    worst = np.sort(accuracies, axis=2)[:, :, :tenth].mean(2)
    return dict(zip(STATISTICS, (accuracies.mean(2), worst), strict=True))
