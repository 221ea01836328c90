"""Arrays in safetensors files that may be larger than the memory: written row by row, mapped where they are large."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from sylva_ray.core.errors import UserError, reason_of
from sylva_ray.core.files import read_regular_file
from sylva_ray.storage.atomic import replaced

MIN_MAPPED_BYTES = 2**24
"""Files from this size on are mapped into memory, so that the system reads what is used and drops it again."""

TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The types of the format that NumPy has, too."""

Content = bytes | mmap.mmap
"""Of a file: read, or mapped."""


def write_rows(path: Path, rows: Mapping[str, Sequence[np.ndarray]]) -> str:
    """Write ``{name: n arrays of equal shape}`` as ``{name: [n, ...]}``, durably, in one step and without a copy.

    Returns:
        The SHA-256 of the file.

    Raises:
        OSError: it cannot be written; nothing stays beside the old content.
    """
    codes = {np.dtype(dtype): code for code, dtype in TYPES.items()}
    names = sorted((name for name in rows if rows[name]), key=lambda name: (-rows[name][0].itemsize, name))
    header, offset = {}, 0
    for name in names:
        first, count = rows[name][0], len(rows[name])
        end = offset + count * first.nbytes
        header[name] = {"dtype": codes[first.dtype], "shape": [count, *first.shape], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replaced(path, durable=True) as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for row in (row for name in names for row in rows[name]):
            content = np.ascontiguousarray(row).data
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def read_content(path: Path, key: str) -> Content:
    """Return the content of a file; a large one is mapped, read-only.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not a regular file, or cannot be read.
    """
    if not path.is_file() or path.stat().st_size < MIN_MAPPED_BYTES:
        return read_regular_file(path, key)
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(key, str(path), f"cannot be read ({reason_of(error)})") from None


def arrays_in(path: Path, content: Content) -> dict[str, np.ndarray]:
    """Return the arrays of a safetensors file, by name in ascending order; those of a mapped file are views of it.

    Raises:
        UserError: it is not such a file, or holds a type that NumPy does not have.
    """
    try:
        arrays = load(content) if isinstance(content, bytes) else _views(content)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:  # KeyError: a type that NumPy does not have
        raise UserError("checkpoint", str(path), f"is not a safetensors file ({reason_of(error)})") from None
    return dict(sorted(arrays.items()))


def forget_pages(content: Content) -> None:
    """Tell the system that the pages of a mapped file which were read are not needed in memory."""
    if isinstance(content, mmap.mmap):
        content.madvise(mmap.MADV_DONTNEED)


def _views(content: mmap.mmap) -> dict[str, np.ndarray]:
    length = int.from_bytes(content[:8], "little")
    if length > len(content) - 8:
        raise ValueError("the header is longer than the file")
    arrays = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        dtype, shape, (first, end) = np.dtype(TYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if min([0, first, *shape]) < 0 or end - first != count * dtype.itemsize or 8 + length + end > len(content):
            raise ValueError(f"the place of {name[:80]!r} does not fit the file")
        arrays[name] = np.frombuffer(content, dtype, count, 8 + length + first).reshape(shape)
    return arrays
