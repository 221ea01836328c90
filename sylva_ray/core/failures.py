"""What an exception says of memory and of GPUs: the memory is used up, or the GPU has failed.

PyTorch has a type for each, ``torch.OutOfMemoryError`` and ``torch.AcceleratorError``, but much arrives as something
else: the CUDA runtime's own "out of memory" (a pinned copy, the context) is an ``AcceleratorError``, and what the
libraries of NVIDIA and the allocator of the CPU say is a plain ``RuntimeError`` with a status in its text. The statuses
of `UNCLEAR` have two causes. cuBLAS and cuDNN report them where they find no memory for a handle or for their kernels
(pytorch/pytorch#81620), and also on a GPU that has failed; which one it is, the GPU itself tells.
"""

from __future__ import annotations

import errno
import gc
import re

from sylva_ray.core.lazy import torch

OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc"
    r"|ALLOC_FAILED|ALLOCATION_FAILED|STATUS_INSUFFICIENT_RESOURCES"
    r"|unable to find an engine to execute|unable to find a valid cuDNN algorithm",
    re.IGNORECASE,
)
"""Texts of errors for want of memory. cuDNN has no engine for a convolution where none of them finds a workspace."""

UNCLEAR = re.compile(r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR)")
"""Texts of errors for want of memory, or of a GPU that has failed."""

DEVICE_FAILURE = re.compile(
    r"CUDA error|CUDA driver error|HIP error|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS|device-side assert"
)
"""Texts of errors of a GPU, unless they are for want of memory."""

SCARCE_BYTES = 2**30
"""Free memory of a GPU below which a library may have found too little: cuDNN loads kernels of up to 500 MB."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or what caused it, says that memory is used up: a GPU's, or the machine's."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError):
            text = str(error)
            if OUT_OF_MEMORY.search(text) or (UNCLEAR.search(text) and _memory_is_scarce()):
                return True
        error = error.__cause__
    return False


def is_device_failure(error: BaseException | None) -> bool:
    """Return whether an exception, or its cause, says that a GPU has failed; the process cannot use it any more."""
    if is_out_of_memory(error):
        return False
    while error is not None:
        is_of_torch = isinstance(error, RuntimeError)
        if is_of_torch and (isinstance(error, torch.AcceleratorError) or DEVICE_FAILURE.search(str(error))):
            return True
        error = error.__cause__
    return False


def release_memory() -> None:
    """Return what is not used to the system, where a new attempt needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory_is_scarce() -> bool:
    """Return whether the GPU answers and has little free memory; one that has failed answers with its error."""
    if not torch.cuda.is_available():
        return False
    try:
        free, _ = torch.cuda.mem_get_info()
    except RuntimeError:
        return False
    return free < SCARCE_BYTES
