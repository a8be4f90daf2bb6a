"""Count the files of the package that a command enters, and its deepest call: what a reader has to follow.

    python -m benchmarks.robustness.flows

Calls are those of the package's own functions; what it calls elsewhere counts as no step. Models are tiny.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import clip_rd_edge as edge
from benchmarks.robustness.record import IMAGES, TABLE, TINY, make_data, trained

PACKAGE = f"{Path(edge.__file__).parent}{os.sep}"
_FUNCTION = 1  # flag of code that is neither a module nor a class: CO_OPTIMIZED
_SUITE = """
name: flows
rounds: 5
tasks: [pairs.csv]
rows:
  - {label: FP32, role: exported, model: fp32}
  - {label: INT8, role: quantised, model: int8}
"""
STUDENT = (
    f"--student {TINY['student']} --image-size {TINY['image_size']} --text {TINY['text']} --context-length 12 "
    "--steps 2 --batch-size 8 --workers 0"
)
COMMANDS = {
    "distill": f"distill --data {TABLE} --teacher runs/teacher {STUDENT} -o run",
    "export": "export run -o fp32",
    "export --precision int8": f"export run --precision int8 --calibration {TABLE} --fallback fp32 -o int8",
    "classify": f"classify fp32 {IMAGES}/00.png --labels red blue --no-cache",
    "benchmark": "benchmark suite.yaml -o report",
}


class Trace:
    """A profiler that notes the files whose functions are called, and how many own calls lie in one another."""

    def __init__(self) -> None:
        self.files, self.deepest = set[str](), 0
        self._thread = threading.local()

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE) or not code.co_flags & _FUNCTION:
            return
        depth = getattr(self._thread, "depth", 0) + (1 if event == "call" else -1)
        self._thread.depth = depth
        self.files.add(code.co_filename)
        self.deepest = max(self.deepest, depth)


def traced(call: Callable[[], object]) -> Trace:
    """Call a function, in this thread and in those that it starts, under a trace."""
    trace = Trace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return trace


def run(command: str) -> None:
    """Run a command in this process."""
    from clip_rd_edge.cli.main import main

    sys.argv = ["clip-rd-edge", *command.split()]
    try:
        main()
    except SystemExit as error:
        if error.code:
            raise RuntimeError(f"{command} ended with {error.code}") from error


def in_a_process(call: Callable[[], object]) -> None:
    """Call a function in a fork, so that each command begins without a module of the package."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def show(name: str, command: str) -> None:
    trace = traced(lambda: run(command))
    print(f"{name:25} {len(trace.files):4} files, deepest call {trace.deepest}", file=sys.stderr)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        make_data()
        Path("suite.yaml").write_text(_SUITE)
        in_a_process(lambda: trained("teacher"))
        for name, command in COMMANDS.items():
            in_a_process(lambda name=name, command=command: show(name, command))
        os.chdir("/")


if __name__ == "__main__":
    main()
