from __future__ import annotations

import subprocess
import sys

import pytest

from clip_rd_edge.utils.memory import FREED_MEMORY_KEPT, _glibc

resource = pytest.importorskip("resource")


def page_faults() -> int:
    """Return how many pages the system has to give for 80 MB that are freed and asked for again.

    Not with numpy, which asks for huge pages.
    """
    _ = b"x" * 80_000_000
    del _
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _ = b"x" * 80_000_000
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(_glibc() is None, reason="another C library decides for itself")
def test_freed_memory_is_kept_within_the_block_and_returned_after_it() -> None:
    with FREED_MEMORY_KEPT:
        kept = page_faults()
    assert kept < page_faults() / 10


@pytest.mark.skipif(_glibc() is None, reason="another C library decides for itself")
def test_the_block_returns_what_it_has_kept() -> None:
    program = """
from pathlib import Path
from clip_rd_edge.utils.memory import FREED_MEMORY_KEPT

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

before = resident()
with FREED_MEMORY_KEPT:
    _ = b"x" * 200_000_000
    del _
    assert resident() > before + 150_000_000, "nothing was kept"
assert resident() < before + 50_000_000, "it was not returned"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
