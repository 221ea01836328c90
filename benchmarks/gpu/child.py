"""The process that computes: it runs parts of the proof one after the other and prints a JSON line for every item."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from benchmarks.gpu.bits import bits, digests
from benchmarks.gpu.lab import Lab, Line, error_text
from benchmarks.gpu.memory import memory
from benchmarks.gpu.rates import rates
from benchmarks.gpu.right import right
from benchmarks.gpu.runs import runs
from benchmarks.gpu.sharing import load, sharing
from benchmarks.gpu.speed import speed
from benchmarks.gpu.utilisation import utilisation

PARTS: Mapping[int, Callable[[Lab], Iterator[Line]]] = {
    **{0: rates, 1: runs, 2: right, 3: bits},
    **{4: memory, 5: speed, 6: sharing, 7: utilisation},
}


def emit(line: Line) -> None:
    """Print a line at once, so that it is there whatever happens next."""
    print(json.dumps(line), flush=True)


def run_parts(lab: Lab, parts: Sequence[int]) -> None:
    """Run parts until one of them ends with an error, after which the device may be unusable in this process.

    A line with ``starts`` comes before a part and one with ``ended`` after it.
    """
    prepare(lab)
    for part in parts:
        emit({"part": part, "starts": True})
        started = time.perf_counter()
        error = None
        try:
            for line in PARTS[part](lab):
                emit({"part": part, **line})
            lab.synchronise()
        except Exception as problem:  # the parent goes on with the next part in a new process
            error = error_text(problem)
        seconds = round(time.perf_counter() - started, 1)
        emit({"part": part, "ended": True, "seconds": seconds, **({"error": error} if error else {})})
        if error:
            return


def run_digests(lab: Lab) -> None:
    """Print the digests of part 3."""
    prepare(lab)
    emit(digests(lab))


def run_load(lab: Lab) -> None:
    """Print the speed of one of the processes of part 6."""
    prepare(lab)
    emit(load(lab))


def prepare(lab: Lab) -> None:
    """Use one thread on a CPU, on which the bits depend."""
    if not lab.is_cuda:
        torch.set_num_threads(1)
