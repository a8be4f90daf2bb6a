from __future__ import annotations

import subprocess
import sys

import pytest

from clip_rd_edge.utils.host import _glibc

# In a process of its own: in one whose heap cannot grow, the C library asks the system anyhow.
PROGRAM = """
import resource
from pathlib import Path
from clip_rd_edge.utils.host import FREED_MEMORY_KEPT

def page_faults() -> int:
    text = b"x" * 80_000_000  # numpy would ask for huge pages
    del text
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    text = b"x" * 80_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

before = resident()
with FREED_MEMORY_KEPT:
    kept = page_faults()
    assert resident() > before + 60_000_000, "nothing was kept"
assert resident() < before + 20_000_000, "it was not returned"
assert kept < page_faults() / 10, "pages were asked for again"
"""


@pytest.mark.skipif(_glibc() is None, reason="another C library decides for itself")
def test_freed_memory_is_kept_within_the_block_and_returned_after_it() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
