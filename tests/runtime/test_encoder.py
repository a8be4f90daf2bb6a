from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


FORKED = """\
import copy, gc, os, sys, time
from pathlib import Path
from clip_rd_edge.runtime.load import load

folder, runtime = sys.argv[1:]
encoder = load(Path(folder), threads=2, runtime=runtime)
encoder = copy.copy(encoder)  # of which __init__ knows nothing
expected = encoder.encode_texts(["red", "blue"]).tolist()
encoder.encode_texts(["red"])
time.sleep(0.5)  # threads that still look for work, rather than sleep, are not waited for

if child := os.fork():
    limit = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > limit:
            os.kill(child, 9)
            sys.exit("the child hangs")
        time.sleep(0.05)
    assert encoder.encode_texts(["red", "blue"]).tolist() == expected
    sys.exit(ended[1] and f"the child ended with {ended[1]}")
assert encoder.encode_texts(["red", "blue"]).tolist() == expected
encoder = load(Path(folder), threads=2, runtime=runtime)
gc.collect()
assert encoder.encode_texts(["red", "blue"]).tolist() == expected
os._exit(0)  # as multiprocessing ends its workers
"""


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_forked_process_neither_uses_nor_closes_its_parents_sessions(colour_bundle: Path, runtime: str) -> None:
    """As a server does that loads the model before it forks workers: the sessions' threads are the parent's alone."""
    if importlib.util.find_spec(runtime) is None:
        pytest.skip(f"needs the extra {runtime}")
    # From Python 3.12 on, a fork beside threads is warned of.
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, str(colour_bundle), runtime]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
