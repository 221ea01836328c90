"""The work of a round in a plain loop: PEFT, a pool of processes, and a mean.

python benchmarks/peers/plain.py CLIENTS IMAGES STEPS ROUNDS MARKS   # MARKS: when every round began, as JSON
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import numpy as np
from client_work import Arrays, Client, build_client, mark, parse_arguments, train

PROCESSES = 2


@cache
def client() -> tuple[Client, Arrays]:
    """Return the model of this process, and the head with which every client begins."""
    made = build_client()
    return made, made.arrays(made.head)


def work(number: int, adapters: Arrays, head: Arrays | None, num_images: int, steps: int) -> tuple[Arrays, Arrays]:
    """Train one client, and return its adapters and its head."""
    own, first_head = client()
    own.load(own.adapters, adapters)
    own.load(own.head, first_head if head is None else head)
    train(own, number, num_images, steps)
    return own.arrays(own.adapters), own.arrays(own.head)


def main() -> None:
    """Run the rounds."""
    given = parse_arguments(__doc__)
    own, _ = client()
    adapters, heads = own.arrays(own.adapters), dict.fromkeys(range(given.num_clients))
    marks = []
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for _ in range(given.rounds):
            marks.append(mark())
            jobs = [pool.submit(work, n, adapters, heads[n], given.num_images, given.steps) for n in heads]
            results = [job.result() for job in jobs]
            heads = {number: head for number, (_, head) in enumerate(results)}
            adapters = [np.mean(arrays, axis=0) for arrays in zip(*(found for found, _ in results), strict=True)]
    given.marks.write_text(json.dumps(marks))


if __name__ == "__main__":
    main()
