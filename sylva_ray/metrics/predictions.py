"""``predictions.safetensors``: what every client's final model answered, image by image, under every condition.

Accuracies forget which images they are made of; paired comparisons of two runs on the same images need to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from sylva_ray.core.errors import UserError
from sylva_ray.storage.atomic import write_atomically

PREDICTIONS = "predictions.safetensors"
LABELS = "labels"


def write_predictions(run_dir: Path, answers: Sequence[Mapping[str, np.ndarray]], labels: Sequence[np.ndarray]) -> None:
    """Names are ``CONDITION/CLIENT`` and ``labels/CLIENT``; ``[n] int16`` each."""
    arrays = {f"{LABELS}/{client:04d}": own.astype(np.int16) for client, own in enumerate(labels)}
    for client, conditions in enumerate(answers):
        arrays |= {f"{condition}/{client:04d}": own.astype(np.int16) for condition, own in conditions.items()}
    write_atomically(run_dir / PREDICTIONS, save(dict(sorted(arrays.items()))))


def read_correct(run_dir: Path, condition: str) -> list[np.ndarray]:
    """Per client ``[n] bool``: right under ``condition`` (``benign`` or an attack's label).

    Raises:
        UserError: the run has no predictions, or not under this condition."""
    path = run_dir / PREDICTIONS
    if not path.exists():
        raise UserError("RUN", str(run_dir), f"has no {PREDICTIONS}: it is unfinished or older than that file")
    arrays = load_file(path)
    names = sorted(name for name in arrays if name.startswith(f"{LABELS}/"))
    known = sorted({name.rpartition("/")[0] for name in arrays} - {LABELS})
    if condition not in known:
        raise UserError("condition", condition, f"was not evaluated there; known: {', '.join(known)}")
    return [arrays[name] == arrays[name.replace(LABELS, condition, 1)] for name in names]


def paired_difference(
    first: Sequence[Sequence[np.ndarray]],
    second: Sequence[Sequence[np.ndarray]],
    rng: np.random.Generator,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> tuple[float, float, float]:
    """Mean over clients of accuracy(first) - accuracy(second), with a paired percentile bootstrap over seeds and images.

    Args:
        first, second: ``[seed][client] [n] bool``, the same images in both.
        confidence: of the two one-sided bounds together, so that each one's is (1 + confidence) / 2.

    Returns:
        difference, lower bound, upper bound. With few seeds the bounds are rough: seeds are resampled too.
    """
    gaps = [
        [a.astype(float) - b.astype(float) for a, b in zip(one, other, strict=True)]
        for one, other in zip(first, second, strict=True)
    ]
    observed = float(np.mean([np.mean([gap.mean() for gap in seed]) for seed in gaps]))
    draws = np.empty((len(gaps), resamples))
    for row, seed in enumerate(gaps):  # resampled images give every client's gap; clients are what the fleet is made of
        draws[row] = np.mean([_resampled_means(gap, resamples, rng) for gap in seed], axis=0)
    chosen = rng.integers(len(gaps), size=(len(gaps), resamples))
    means = np.take_along_axis(draws, chosen, axis=0).mean(0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return observed, float(low), float(high)


def _resampled_means(gap: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means of bootstrap samples of values in {-1, 0, 1}: their counts are multinomial."""
    shares = np.array([np.mean(gap == value) for value in (-1, 0, 1)])
    counts = rng.multinomial(len(gap), shares, size=resamples)
    return (counts[:, 2] - counts[:, 0]) / len(gap)
