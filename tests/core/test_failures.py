"""Errors of the memory, which smaller windows mend, are told from those of a GPU, which ends its process."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sylva_ray.core.failures import is_device_failure, is_out_of_memory

FULL: list[BaseException] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ..."),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:81] DefaultCPUAllocator: not enough memory: you tried to ..."),
    RuntimeError("unable to mmap 512 bytes from file <x>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("float64")),  # type: ignore[attr-defined]
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
BROKEN: list[BaseException] = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA driver error: unknown error"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
UNCLEAR: list[BaseException] = [
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
]


def has_failed() -> tuple[int, int]:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], tuple[int, int]]], None]:
    """A GPU of this machine that answers with what a function returns or raises."""

    def answer(memory: Callable[[], tuple[int, int]]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)

    return answer


@pytest.mark.parametrize("error", FULL, ids=str)
def test_what_says_that_memory_is_used_up_is_no_failed_gpu(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_device_failure(error)


@pytest.mark.parametrize("error", BROKEN, ids=str)
def test_what_says_that_a_gpu_has_failed_is_not_for_want_of_memory(error: BaseException) -> None:
    assert is_device_failure(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("error", UNCLEAR, ids=str)
def test_the_gpu_itself_tells_what_an_unclear_status_means(
    error: BaseException, card: Callable[[Callable[[], tuple[int, int]]], None]
) -> None:
    card(lambda: (200 * 2**20, 24 * 2**30))
    assert is_out_of_memory(error)
    assert not is_device_failure(error)
    for healthy_or_failed in (lambda: (20 * 2**30, 24 * 2**30), has_failed):
        card(healthy_or_failed)
        assert is_device_failure(error)
        assert not is_out_of_memory(error)


def test_other_errors_are_neither() -> None:
    for error in (
        None,
        ValueError("out of memory"),
        RuntimeError("shapes do not match"),
        OSError(errno.ENOSPC, "full"),
    ):
        assert not is_out_of_memory(error)
        assert not is_device_failure(error)


def test_an_error_that_hides_another_is_what_the_other_is() -> None:
    """Code of a user's own may wrap what it catches."""
    error = ValueError("the teacher failed")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(error)
    assert not is_device_failure(error)


def test_a_failed_gpu_behind_another_error_is_a_failed_gpu() -> None:
    hidden = ValueError("the loss is not a number")
    hidden.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert is_device_failure(hidden)
    assert not is_device_failure(ValueError("CUDA error"))
