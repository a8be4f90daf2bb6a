"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clip_rd_edge.utils.shared_block import SharedBlock

# Parameters of glibc's `mallopt`. Once one is set, glibc adapts its thresholds no more: in the end they get the values
# that it reaches by itself in a process with large tensors.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_ADAPTED = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65_536}


@contextmanager
def _kept() -> Iterator[None]:
    glibc = _glibc()
    if glibc is not None:
        glibc.mallopt(_MMAP_MAX, 0)
        glibc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        return_freed_memory()


# Within the block, memory that is freed stays with the process. A training step frees tens of megabytes, and each of
# their pages costs an interruption and a page of zeros when the next step asks for it again. The C library alone
# decides so: with another than glibc, or another allocator, nothing changes.
FREED_MEMORY_KEPT = SharedBlock(_kept)


def return_freed_memory() -> None:
    """Give memory that is free back to the system, from now on, too: for a process forked from one that keeps it."""
    glibc = _glibc()
    if glibc is not None:
        for parameter, value in _ADAPTED.items():
            glibc.mallopt(parameter, value)
        glibc.malloc_trim(0)


def _glibc() -> Any:
    """Return the C library if it is glibc, whose `mallopt` counts its parameters from -1; None for others."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
