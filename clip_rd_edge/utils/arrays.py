"""NumPy files: their bytes, and reading them from any thread and from unknown origins, without pickles."""

from __future__ import annotations

import io
import math
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from clip_rd_edge.errors import ConfigError, in_one_line

MAX_ARRAYS = 16  # of an archive
_COMPRESSIONS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # by NumPy

# NumPy reads a header by ast.parse, whose depth Python 3.11 counts for all threads together: two that read at once can
# end with a SystemError (https://github.com/python/cpython/issues/106905).
HEADERS = threading.Lock()


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """Return the content of an .npy file; raise ValueError for Python objects."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npz_bytes(*, compressed: bool = False, **arrays: npt.NDArray[Any]) -> bytes:
    """Return the content of an .npz file with these arrays by name."""
    buffer = io.BytesIO()
    # Not with allow_pickle=False, which NumPy before 2.1 takes for one more array.
    write: Any = np.savez_compressed if compressed else np.savez
    write(buffer, **arrays)
    return buffer.getvalue()


def load_array(source: Path | IO[bytes], *, memory_mapped: bool = False) -> npt.NDArray[Any]:
    """Return the array of an .npy file of our own, or map it into memory; any number of threads may do so at once."""
    try:
        with HEADERS:
            array: npt.NDArray[Any] = np.load(source, mmap_mode="r" if memory_mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise
    except Exception as error:  # NumPy evaluates a header as Python, and ends with whatever that raises
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error
    return array


def read_npz(
    source: Path | IO[bytes], *, max_bytes: int, hint: str = "", name: str = ""
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an .npz file by name.

    Args:
        max_bytes: limit on the size of each array; checked before it is decompressed.
        name: of the file in messages; by default its path.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.infolist()
            if len(members) > MAX_ARRAYS or not {member.compress_type for member in members} <= _COMPRESSIONS:
                raise ValueError(f"it has more than {MAX_ARRAYS} arrays, or is compressed in another way than NumPy's")
            for member in members:
                with archive.open(member) as file:
                    arrays[member.filename.removesuffix(".npy")] = _read_array(file, member.filename, max_bytes)
    except Exception as error:  # NumPy evaluates a header as Python, and ends with whatever that raises
        raise ConfigError(f"{name or source} could not be read: {in_one_line(error)}.", hint=hint) from error
    return arrays


def require_arrays(
    arrays: Mapping[str, npt.NDArray[Any]], expected: Mapping[str, str], *, source: Path, hint: str
) -> None:
    """Raise ConfigError if an array is missing, or its type or shape is not the expected one.

    Args:
        expected: by name, the kinds of NumPy's types and the axes, such as `iu N T`; axes of one name have one length,
            those named 1 have the length 1, and only those whose names end in `?` may be empty.
    """
    lengths = {"1": 1}
    for name, text in expected.items():
        kinds, *axes = text.split()
        found = arrays.get(name)
        if (
            found is None
            or (found.dtype.kind not in kinds or found.ndim != len(axes))
            or any(lengths.setdefault(axis, length) != length for axis, length in zip(axes, found.shape, strict=True))
            or not all(length or axis.endswith("?") for axis, length in zip(axes, found.shape, strict=True))
        ):
            shown = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise ConfigError(f"{source} is damaged: {name} is {shown}; expected ({', '.join(axes)}).", hint=hint)


def _read_array(file: Any, name: str, max_bytes: int) -> npt.NDArray[Any]:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    with HEADERS:
        shape, fortran, dtype = readers[npy.read_magic(file)](file)
    # True is an int to NumPy's check.
    is_odd = dtype.hasobject or dtype.itemsize == 0 or any(type(length) is not int or length < 0 for length in shape)
    if is_odd or max(size := dtype.itemsize * math.prod(shape), *shape, 0) > max_bytes:
        raise ValueError(f"{name} has the type {dtype} and the shape {shape}; the limit is {max_bytes:,} bytes")
    content = file.read(size)
    if len(content) != size or file.read(1):
        raise ValueError(f"{name} does not have the {size:,} bytes of its shape {shape}")
    array = np.frombuffer(content, dtype=dtype)
    if dtype.kind == "U" and not _are_characters(array):
        raise ValueError(f"{name} has a text with a code that is not a character")
    return array.reshape(shape, order="F" if fortran else "C")


def _are_characters(texts: npt.NDArray[Any]) -> bool:
    """Return whether all texts are of Unicode characters: NumPy keeps any 32 bits, and Python refuses some."""
    codes = np.frombuffer(texts.astype(texts.dtype.newbyteorder("=")).tobytes(), np.uint32)
    is_surrogate = (codes >= 0xD800) & (codes <= 0xDFFF)
    return not bool((is_surrogate | (codes > 0x10FFFF)).any())
