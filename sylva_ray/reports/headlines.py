"""The first things to know of a run: mean accuracies with their confidence intervals."""

from __future__ import annotations

from sylva_ray.core.summary import Spread, Summary
from sylva_ray.metrics.intervals import fleet_interval


def interval_of(summary: Summary, spread: Spread) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean over the honest clients, over their test images; None where these are unknown.

    Args:
        summary: of the run, which has the numbers of images.
        spread: of an accuracy on all test images.
    """
    images = [client.test for client in summary.clients if not client.byzantine]
    return fleet_interval(spread.mean, images, summary.test_images) if images and min(images) > 0 else None


def accuracy_text(summary: Summary, spread: Spread) -> str:
    """Return a mean in per cent with its interval: ``31.4 % (28.1 to 34.9)``."""
    interval = interval_of(summary, spread)
    bounds = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    return f"{100 * spread.mean:.1f} %{bounds}"
