"""Participants of a round and their cohorts: functions of the configuration and the step, not of the cluster."""

from __future__ import annotations

from collections.abc import Sequence

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.seeding import numpy_generator


def choose_participants(config: ExperimentConfig, step: int, missing: Sequence[int]) -> list[int]:
    """Return the clients of a round, sorted: first those that were missing in the previous one, the rest drawn."""
    everyone = config.partition.num_clients
    wanted = config.training.clients_per_round or everyone
    order = numpy_generator(config.seed, "participants", round=step).permutation(everyone).tolist()
    queue = [*missing, *(client for client in order if client not in missing)]
    return sorted(queue[:wanted])


def make_cohorts(clients: Sequence[int], sizes: Sequence[int], cohort_size: int) -> list[tuple[int, ...]]:
    """Divide ``clients`` into cohorts of at most ``cohort_size`` with about equal numbers of images, the largest first.

    The client with the most images goes to the cohort with the fewest so far (longest processing time first).

    Args:
        clients: their numbers.
        sizes: training images of all clients of the fleet.
        cohort_size: the largest number of clients in a cohort.

    >>> make_cohorts([0, 1, 2, 3], sizes=[10, 40, 20, 30], cohort_size=2)
    [(0, 1), (2, 3)]
    """
    num_cohorts = -(-len(clients) // cohort_size)
    cohorts: list[list[int]] = [[] for _ in range(num_cohorts)]
    for client in sorted(clients, key=lambda c: (-sizes[c], c)):
        open_cohorts = [cohort for cohort in cohorts if len(cohort) < cohort_size]
        min(open_cohorts, key=lambda cohort: sum(sizes[c] for c in cohort)).append(client)
    cohorts.sort(key=lambda cohort: (-sum(sizes[c] for c in cohort), min(cohort)))
    return [tuple(sorted(cohort)) for cohort in cohorts]
