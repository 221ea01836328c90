"""Simulate how often the guard of phase 2 accepts a refinement, and how often one that it should not.

    python benchmarks/guard.py [--fleets 1000]

Outcomes of guard images are drawn; the decision is the package's (`accepted_strength`, with the default parameters).
Every image of a client keeps its outcome, is lost or is gained, with the same draw for all strengths: what a strength
breaks, the larger ones break too, in proportion.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from sylva_ray.aggregation.neighbours import neighbour_graph
from sylva_ray.federation.parameters import Phase2Parameters
from sylva_ray.federation.stages.layer_game.client import PairedOutcomes
from sylva_ray.federation.stages.layer_game.server import Evidence, accepted_strength

NUM_CLIENTS = 10
CHANGING = {"benign": 0.06, "robust": 0.08}
"""Shares of the images whose outcome a refinement of full strength changes."""

SCENARIOS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "harm: benign +2, robust -10": ([0.02] * NUM_CLIENTS, [-0.1] * NUM_CLIENTS),
    "overfit: benign -2, robust 0": ([-0.02] * NUM_CLIENTS, [0.0] * NUM_CLIENTS),
    "no effect: 0 and 0": ([0.0] * NUM_CLIENTS, [0.0] * NUM_CLIENTS),
    "gain: benign +2, robust 0": ([0.02] * NUM_CLIENTS, [0.0] * NUM_CLIENTS),
    "gain: benign +3, robust 0": ([0.03] * NUM_CLIENTS, [0.0] * NUM_CLIENTS),
    "one client: benign +3, robust -12, others +3, 0": ([0.03] * NUM_CLIENTS, [-0.12] + [0.0] * (NUM_CLIENTS - 1)),
}
"""True net gains of full strength, benign and robust, of every client."""


def draw(net: float, changing: float, images: int, strengths: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Return images that are lost and gained at every strength, ``[2, 1 + strengths]``; at strength 0 none."""
    lost, gained = (changing - net) / 2, (changing + net) / 2
    kind = rng.random(images)
    until = rng.random(images)  # an image changes at the strength that reaches this
    levels = np.array([0.0, *strengths])[:, None]
    changed = until < levels
    return np.stack([(changed & (kind < lost)).sum(1), (changed & (kind >= lost) & (kind < lost + gained)).sum(1)])


def accepted(scenario: str, images: int, fleets: int) -> tuple[float, float]:
    """Return how often client 0 keeps something, and how often something false, over ``fleets`` draws.

    False is a strength whose true loss of robust accuracy reaches the tolerance, or with no true benign gain.
    """
    benign, robust = SCENARIOS[scenario]
    phase2 = Phase2Parameters()
    updates = np.random.default_rng(0).normal(size=(NUM_CLIENTS, 20))
    graph = neighbour_graph(updates @ updates.T, np.ones(NUM_CLIENTS))
    kept, false = 0, 0
    for fleet in range(fleets):
        rng = np.random.default_rng([fleet, images])
        outcomes = {}
        for client in range(NUM_CLIENTS):
            pair = [
                draw(net[client], CHANGING[kind], images, phase2.strengths, rng)
                for kind, net in (("benign", benign), ("robust", robust))
            ]
            lost, gained = np.stack(pair, axis=-1)
            outcomes[client] = PairedOutcomes(lost, gained, images)
        row = accepted_strength(0, Evidence(outcomes, graph, phase2)).row
        strength = (0.0, *phase2.strengths)[row]
        kept += row > 0
        false += row > 0 and (benign[0] <= 0 or -strength * robust[0] >= phase2.guard_tolerance)
    return kept / fleets, false / fleets


def main() -> None:
    """Print a table of Markdown: scenarios by guard images of a client; kept, and in brackets falsely so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=int, default=1000)
    fleets = parser.parse_args().fleets
    sizes = (16, 32, 100, 300)
    print("| true effect of full strength | " + " | ".join(f"{n} images" for n in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for scenario in SCENARIOS:
        shares = [accepted(scenario, n, fleets) for n in sizes]
        print(f"| {scenario} | " + " | ".join(f"{kept:.0%} ({false:.0%})" for kept, false in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
