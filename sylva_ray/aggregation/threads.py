"""Threads of a process that merges, whose workers wait meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MERGING_THREADS = min(4, os.cpu_count() or 1)
"""How many there are. Every piece of work runs on one thread, so results do not depend on this number."""


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results of ``work`` for every item, in their order."""
    with ThreadPoolExecutor(MERGING_THREADS) as threads:
        return list(threads.map(work, items))


def in_turn(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the same as `in_threads`, from the calling thread."""
    return list(map(work, items))
