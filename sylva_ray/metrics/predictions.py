"""The file ``predictions.safetensors``: predictions of the final models per image and condition.

Paired comparisons of two runs on the same images need them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from safetensors.numpy import load_file, save

from sylva_ray.core.errors import UserError
from sylva_ray.storage.atomic import write_atomically
from sylva_ray.storage.run_folder import RunFolder

LABELS = "labels"


def write_predictions(
    folder: RunFolder, predictions: Sequence[Mapping[str, np.ndarray]], labels: Sequence[np.ndarray]
) -> None:
    """Write arrays ``[n] int16`` named ``CONDITION/CLIENT`` and ``labels/CLIENT``.

    Args:
        folder: of the run.
        predictions: per client, ``{condition: [n]}``.
        labels: per client, ``[n]``.
    """
    arrays = {f"{LABELS}/{client:04d}": y.astype(np.int16) for client, y in enumerate(labels)}
    for client, conditions in enumerate(predictions):
        arrays |= {f"{condition}/{client:04d}": y.astype(np.int16) for condition, y in conditions.items()}
    write_atomically(folder.predictions_file, save(dict(sorted(arrays.items()))))


def read_correct(folder: RunFolder, condition: str) -> list[np.ndarray]:
    """Read which predictions are correct under a condition.

    Args:
        folder: of the run.
        condition: ``benign`` or the label of an attack.

    Returns:
        Per client, ``[n] bool``.

    Raises:
        UserError: the run has no predictions, or none for this condition.
    """
    arrays = _read(folder)
    names = sorted(name for name in arrays if name.startswith(f"{LABELS}/"))
    conditions = sorted({name.rpartition("/")[0] for name in arrays} - {LABELS})
    if condition not in conditions:
        raise UserError("condition", condition, f"was not evaluated in {folder}; available: {', '.join(conditions)}")
    return [arrays[name] == arrays[name.replace(LABELS, condition, 1)] for name in names]


def read_labels(folder: RunFolder) -> list[np.ndarray]:
    """Read the labels of the images that `read_correct` is about.

    Args:
        folder: of the run.

    Returns:
        Per client, ``[n]``.

    Raises:
        UserError: the run has no predictions.
    """
    arrays = _read(folder)
    return [arrays[name] for name in sorted(arrays) if name.startswith(f"{LABELS}/")]


def _read(folder: RunFolder) -> dict[str, np.ndarray]:
    path = folder.predictions_file
    if not path.exists():
        raise UserError("RUN", str(folder), f"has no {path.name}: it is not finished, or of an older version")
    return dict(load_file(path))


def paired_difference(
    first: Sequence[Sequence[np.ndarray]],
    second: Sequence[Sequence[np.ndarray]],
    rng: np.random.Generator,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> tuple[float, float, float]:
    """Estimate the mean over clients of accuracy(first) - accuracy(second) with a paired percentile bootstrap.

    Seeds and images are resampled, clients are not.

    Args:
        first: correct predictions, ``[seed][client] [n] bool``.
        second: the same for the other run, on the same images.
        rng: for the resamples.
        confidence: of the two-sided interval; each one-sided bound has the confidence (1 + confidence) / 2.
        resamples: number of bootstrap samples.

    Returns:
        Difference, lower bound and upper bound. With few seeds the bounds are approximate. They are too narrow where
        the difference varies from seed to seed: of three, by a factor sqrt(2/3) in the share of the seeds. They are too
        wide where it varies with the images alone, since these are resampled within seeds that are resampled, too: of
        three, by a factor 1.5. Seeds count as independent; if they share test images, that makes them too narrow.
    """
    differences = [
        [a.astype(float) - b.astype(float) for a, b in zip(one, other, strict=True)]
        for one, other in zip(first, second, strict=True)
    ]
    observed = float(np.mean([np.mean([client.mean() for client in clients]) for clients in differences]))
    resampled = np.empty((len(differences), resamples))
    for row, clients in enumerate(differences):
        resampled[row] = np.mean([_resampled_means(client, resamples, rng) for client in clients], axis=0)
    seeds = rng.integers(len(differences), size=(len(differences), resamples))
    means = np.take_along_axis(resampled, seeds, axis=0).mean(0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return observed, float(low), float(high)


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return the means of bootstrap samples of values in {-1, 0, 1}, whose counts are multinomial."""
    frequencies = np.array([np.mean(values == value) for value in (-1, 0, 1)])
    counts = rng.multinomial(len(values), frequencies, size=resamples)
    means: np.ndarray = (counts[:, 2] - counts[:, 0]) / len(values)
    return means
