"""Windows: how many images pass through a model at once, so that a forward pass fits the memory of its process.

::

    budget, bytes per image ──► planned windows (config.yaml) ──► `WindowLimits` of the model
                                                                       │
    images of C clients ──► `split_windows` ──► parts, one after the other ──► out of memory: half of it, noted

A window holds the images of whole clients, or some images of one client: the stack of C adapters pads clients to equal
numbers of images, so a window counts as (its clients) x (images of the one with the most). Where everything fits there
is a single window and nothing is computed differently. Gradients of clients are independent, and attacks are
independent for every image, so windows change last bits at most: kernels and sums of gradients round differently. That
is why windows have a limit besides that of the memory, ``at_once``: where the memory holds more than the processor
needs to be busy, the windows are the same whatever the memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeVar

from sylva_ray.core.failures import is_out_of_memory, release_memory
from sylva_ray.core.lazy import torch

Pass = Literal["train", "attack", "evaluate", "forward", "walk"]
"""A kind of forward pass, see `sylva_ray.config.training.Windows`."""

UNLIMITED = 2**62
"""Images of a window without a limit."""

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """Consecutive images of a flat batch and the consecutive clients that own them.

    Attributes:
        rows: of the images.
        clients: their owners.
    """

    rows: slice
    clients: slice

    @property
    def num_images(self) -> int:
        """Number of its images."""
        return int(self.rows.stop - self.rows.start)

    def pieces(self, counts: Sequence[int]) -> list[slice]:
        """Return the places of its images among the images of each of its clients; ``counts`` are of all clients."""
        first, ends = self.clients.start, list(accumulate(counts))
        starts = [0, *ends][first : self.clients.stop]
        return [
            slice(max(self.rows.start, start) - start, min(self.rows.stop, end) - start)
            for start, end in zip(starts, ends[self.clients], strict=True)
        ]

    def select(self, params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return views of the parameters ``{name: [C, ...]}`` of its clients."""
        return {name: value[self.clients] for name, value in params.items()}


def split_windows(counts: Sequence[int], limit: int, divide_clients: bool = True) -> list[Window]:
    """Divide the images of C clients, which are sorted by client, among windows.

    Args:
        counts: images of every client.
        limit: the largest size of a window: its clients times the images of the one with the most.
        divide_clients: whether the images of a client may be in several windows; otherwise a client with too many
            images has a window of its own.

    Returns:
        The windows in order. If all fits one, that is all images and all clients, also those without images.

    >>> [(w.rows.start, w.rows.stop, w.clients.start, w.clients.stop) for w in split_windows([2, 2, 5], 4)]
    [(0, 4, 0, 2), (4, 8, 2, 3), (8, 9, 2, 3)]
    """
    total = sum(counts)
    if len(counts) * max(counts, default=0) <= limit:
        return [Window(slice(0, total), slice(0, len(counts)))]
    windows: list[Window] = []
    row = client = 0
    while client < len(counts):
        widest = counts[client]
        if widest > limit:
            size = limit if divide_clients else widest
            for start in range(0, widest, size):
                rows = slice(row + start, row + min(start + size, widest))
                windows.append(Window(rows, slice(client, client + 1)))
            row, client = row + widest, client + 1
            continue
        last = client + 1
        while last < len(counts) and (last + 1 - client) * max(widest, counts[last]) <= limit:
            widest = max(widest, counts[last])
            last += 1
        num_images = sum(counts[client:last])
        if num_images:
            windows.append(Window(slice(row, row + num_images), slice(client, last)))
        row, client = row + num_images, last
    return windows


class WindowLimits:
    """The windows of a model in one process: those that were planned, and those that turned out to fit.

    Args:
        planned: images that the memory holds, by `Pass`; a pass that is missing has no limit.
        at_once: images of a window at most.

    Attributes:
        is_training: whether attacks are those of training; otherwise those of evaluation, guard and game.
        num_passes: passes that were begun so far: where it does not grow, nothing is computed.
    """

    def __init__(self, planned: Mapping[str, int] | None = None, at_once: int = UNLIMITED) -> None:
        self._planned = dict(planned or {})
        self._fitting = dict(self._planned)
        self._at_once = at_once
        self._largest: dict[str, int] = {}
        self.is_training = False
        self.num_passes = 0

    def of(self, kind: Pass) -> int:
        """Return the images of a window; those of ``attack`` are ``evaluate`` outside of training."""
        return min(self.held(kind), self._at_once)

    def held(self, kind: Pass) -> int:
        """Return the images that the memory holds, in one window or in several whose activations are kept."""
        return self._fitting.get(self._name(kind), UNLIMITED)

    def _name(self, kind: Pass) -> Pass:
        return "evaluate" if kind == "attack" and not self.is_training else kind

    def begin_task(self) -> None:
        """Forget the passes of earlier tasks, of which `smaller` must know nothing."""
        self._largest = {}

    def begin(self, kind: Pass, num_images: int, indivisible: int = 1) -> None:
        """Note that a pass of ``num_images`` begins, of which so many cannot be divided."""
        self.num_passes += 1
        name = self._name(kind)
        if num_images > indivisible and num_images > self._largest.get(name, 0):
            self._largest[name] = num_images
        else:
            self._largest.setdefault(name, 1)

    def halve(self, kind: Pass, num_images: int) -> None:
        """Set a window to half of ``num_images``, for which the memory was too small."""
        self._fitting[self._name(kind)] = max(1, min(self.of(kind), num_images) // 2)

    def keep_less(self, kind: Pass, num_images: int) -> None:
        """Let several windows hold half of ``num_images`` together, or a single window what it holds now."""
        self._fitting[self._name(kind)] = max(self.of(kind), num_images // 2)

    def reduce(self, windows: Mapping[str, int]) -> None:
        """Make windows at most as large as ``windows``, which turned out to fit before."""
        self._fitting = {name: min(size, windows.get(name, size)) for name, size in self._fitting.items()}

    def smaller(self) -> dict[str, int]:
        """Return windows for another attempt at the task, which did not fit the memory.

        They are half of the largest passes that it made, which the plan may exceed by far; of a task that made none,
        half of all windows.

        Returns:
            ``{pass: images}`` of the passes that become smaller; empty: none can.
        """
        used = dict(self._largest) or self._fitting  # a copy: another thread may ask while a pass begins
        tried = {name: min(size, self._fitting[name]) for name, size in used.items() if name in self._fitting}
        return {name: size // 2 for name, size in tried.items() if size > 1}

    @property
    def fitting(self) -> dict[str, int]:
        """The windows in use, ``{pass: images}``."""
        return dict(self._fitting)

    @property
    def reduced(self) -> dict[str, int]:
        """The windows that had to be made smaller than planned, ``{pass: images}``."""
        return {name: size for name, size in self._fitting.items() if size != self._planned.get(name)}


def limits_of(model: object) -> WindowLimits:
    """Return the limits of a model; one that has none, e.g. of a test, is not limited."""
    limits = getattr(model, "windows", None)
    return limits if isinstance(limits, WindowLimits) else WindowLimits()


def in_windows(
    counts: Sequence[int], limits: WindowLimits, kind: Pass, run: Callable[[Window], T], divide_clients: bool = True
) -> list[T]:
    """Call a function for every window; one that runs out of memory is halved and tried again, as are those after it.

    Args:
        counts: images of every client.
        limits: of the model.
        kind: of the passes in ``run``.
        run: works on one window.
        divide_clients: see `split_windows`.

    Returns:
        What ``run`` returned, in the order of the images.

    Raises:
        Exception: that of ``run``; out of memory, if it is so for a window that cannot be divided.
    """
    queue = deque(split_windows(counts, limits.of(kind), divide_clients))
    results: list[T] = []
    while queue:
        window = queue.popleft()
        limits.begin(kind, window.num_images, 1 if divide_clients else max(map(_length, window.pieces(counts))))
        try:
            results.append(run(window))
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            limits.halve(kind, window.num_images)
            parts = _divide(window, counts, limits.of(kind), divide_clients)
            if parts == [window]:
                raise
        release_memory()  # after the handler, which keeps the tensors of the failed attempt
        queue = deque(
            part for old in (*parts, *queue) for part in _divide(old, counts, limits.of(kind), divide_clients)
        )
    return results


def _length(piece: slice) -> int:
    """Return the images of a piece of a window."""
    return int(piece.stop - piece.start)


def _divide(window: Window, counts: Sequence[int], limit: int, divide_clients: bool) -> list[Window]:
    """Divide a window by a smaller limit."""
    first, own = window.clients.start, [_length(piece) for piece in window.pieces(counts)]
    return [
        Window(
            slice(window.rows.start + part.rows.start, window.rows.start + part.rows.stop),
            slice(first + part.clients.start, first + part.clients.stop),
        )
        for part in split_windows(own, limit, divide_clients)
    ]


def joined(parts: Sequence[Any]) -> torch.Tensor:
    """Concatenate per-image tensors of windows; a single one is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
