"""Participants of a round and their cohorts: functions of the configuration and the step, not of the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from sylva_ray.config.experiment import ExperimentConfig
from sylva_ray.core.seeding import numpy_generator

MAX_IMBALANCE = 1.1
"""Images of the busier one of two workers, at most, as a ratio to a half of all."""


def choose_participants(config: ExperimentConfig, step: int, missing: Sequence[int]) -> list[int]:
    """Return the clients of a round, sorted: first those in ``missing``, which have another try, the rest drawn."""
    everyone = config.partition.num_clients
    wanted = config.training.clients_per_round or everyone
    order = numpy_generator(config.seed, "participants", round=step).permutation(everyone).tolist()
    queue = [*missing, *(client for client in order if client not in missing)]
    return sorted(queue[:wanted])


def make_cohorts(clients: Sequence[int], sizes: Sequence[int], cohort_size: int) -> list[tuple[int, ...]]:
    """Divide ``clients`` into cohorts of at most ``cohort_size`` with similar numbers of images, the largest first.

    Clients of similar size run out of batches together, so that few steps are made with a part of the cohort. If two
    workers would then be busy for unequal times (a fleet of few cohorts), every two neighbouring cohorts exchange
    clients until they have about equal numbers of images.

    Args:
        clients: their numbers.
        sizes: training images of all clients of the fleet.
        cohort_size: the largest number of clients in a cohort.

    >>> make_cohorts(range(8), sizes=[10, 40, 20, 30, 11, 41, 21, 31], cohort_size=2)
    [(1, 5), (3, 7), (2, 6), (0, 4)]
    >>> make_cohorts([0, 1, 2, 3], sizes=[10, 40, 20, 30], cohort_size=2)
    [(0, 1), (2, 3)]
    """
    num_cohorts = -(-len(clients) // cohort_size)
    order = sorted(clients, key=lambda c: (-sizes[c], c))
    bounds = [round(i * len(order) / num_cohorts) for i in range(num_cohorts + 1)]
    cohorts = [order[first:end] for first, end in pairwise(bounds)]

    def load(cohort: Sequence[int]) -> int:
        return sum(sizes[client] for client in cohort)

    if max(map(sum, _two_workers([load(cohort) for cohort in cohorts]))) > MAX_IMBALANCE * load(order) / 2:
        cohorts = [half for i in range(0, num_cohorts, 2) for half in _balanced(cohorts[i : i + 2], sizes)]
    cohorts.sort(key=lambda cohort: (-load(cohort), min(cohort)))
    return [tuple(sorted(cohort)) for cohort in cohorts]


def _two_workers(loads: Sequence[int]) -> tuple[list[int], list[int]]:
    """Give every load, in this order, to the one of two workers with less so far."""
    workers: tuple[list[int], list[int]] = ([], [])
    for load in loads:
        min(workers, key=sum).append(load)
    return workers


def _balanced(cohorts: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[list[int]]:
    """Exchange clients between cohorts: the client with the most images goes to the one with the fewest so far."""
    largest = max(map(len, cohorts))
    exchanged: list[list[int]] = [[] for _ in cohorts]
    for client in sorted((c for cohort in cohorts for c in cohort), key=lambda c: (-sizes[c], c)):
        unfilled = [cohort for cohort in exchanged if len(cohort) < largest]
        min(unfilled, key=lambda cohort: sum(sizes[c] for c in cohort)).append(client)
    return exchanged
