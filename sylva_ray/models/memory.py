"""Measure the memory of a pass through a model: so many bytes whatever is passed, and so many more per image.

On a GPU the allocator counts. On a CPU `LiveBytes` counts the bytes of all tensors that exist at once, which is a
function of the computation and not of the machine; what kernels allocate inside themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MEASURED_IMAGES = (1, 4)
"""Numbers of images in the two measurements of a pass."""


@dataclass(frozen=True)
class PassCost:
    """The memory of a pass.

    Attributes:
        fixed: bytes for any number of images.
        per_image: bytes for every image.
    """

    fixed: int
    per_image: int

    def num_bytes(self, num_images: int) -> int:
        """Return the bytes of a pass of ``num_images`` images."""
        return self.fixed + num_images * self.per_image

    def num_images(self, available: int) -> int:
        """Return how many images fit ``available`` bytes, at least 0."""
        return max(0, (available - self.fixed) // max(1, self.per_image))

    def __or__(self, other: PassCost) -> PassCost:
        """Return a cost that is enough for either pass."""
        return PassCost(max(self.fixed, other.fixed), max(self.per_image, other.per_image))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the ``with`` block, also by the backward pass on a CPU.

    Attributes:
        live: bytes that exist now.
        peak: the most that existed at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._releases: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: True, the default, wraps `__torch_dispatch__` in a function that imports the compiler."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count the storages of its results that are not those of its arguments."""
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((*args, *kwargs.values()))}
        result = func(*args, **kwargs)
        for storage in _storages((result,)):
            key = storage._cdata
            if key not in given and key not in self._releases:
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                self._releases[key] = weakref.ref(storage, partial(self._release, key, storage.nbytes()))
        return result

    def _release(self, key: int, size: int, _: object) -> None:
        del self._releases[key]
        self.live -= size


def _storages(values: Iterable[object]) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors among the arguments or results of an operation, and in lists of these."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
        elif isinstance(value, list | tuple):
            yield from _storages(value)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes more than before exist at once while ``run`` runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak - before
    counter = LiveBytes()
    with counter:
        run()
    return counter.peak


def measure_pass(run: Callable[[int], object], device: torch.device) -> PassCost:
    """Measure a pass with one image and with four.

    Args:
        run: passes that many images.
        device: of the pass.
    """
    few, many = MEASURED_IMAGES
    first, second = (peak_bytes(lambda n=n: run(n), device) for n in (few, many))  # type: ignore[misc]
    per_image = max(0, -(-(second - first) // (many - few)))
    return PassCost(max(0, first - few * per_image), per_image)
