"""What several tests use."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import pytest

from clip_rd_edge.cli.main import cli
from clip_rd_edge.data.pairs import Pairs
from clip_rd_edge.utils.reporting import Reporter

# Seconds that a test waits for what an idle machine does in one: others may need the processor more.
PATIENCE_S = 120.0


def wait_until(condition: Callable[[], object], *, seconds: float = PATIENCE_S, pause: float = 0.01) -> bool:
    """Wait until a condition holds; return whether it does."""
    end = time.monotonic() + seconds
    while not (holds := bool(condition())) and time.monotonic() < end:
        time.sleep(pause)
    return holds


_PATIENT = """
import sys
from clip_rd_edge.cli.main import main
from clip_rd_edge.web import app, limits
limits.MAX_CONNECTIONS, limits.REQUEST_TIMEOUT_S, app.BODY_TIMEOUT_S = int(sys.argv.pop(1)), 10_000, 10_000
main()
"""


def patient_server(*arguments: object, connections: int) -> list[str]:
    """Return the command of a server that gives up no client because of time: what has to help is its other limits."""
    return [sys.executable, "-c", _PATIENT, str(connections), *map(str, arguments)]


def share_in_threads(block: Callable[[], AbstractContextManager[object]], inside: Callable[[], object]) -> object:
    """Let two threads be in a block at once, the first of which leaves first; return what the second then finds."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with block():
            first_in.set()
            assert second_in.wait(PATIENCE_S)
        first_out.set()

    def second() -> object:
        assert first_in.wait(PATIENCE_S)
        with block():
            second_in.set()
            assert first_out.wait(PATIENCE_S)
            return inside()

    with ThreadPoolExecutor(2) as threads:
        leaving, staying = threads.submit(first), threads.submit(second)
        leaving.result()
        return staying.result()


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield each command with its name, in one or two words."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


class Watch(Reporter):
    """Calls a function at each step of a stage, and keeps what it is told."""

    def __init__(self, stage: str = "training", on_step: Callable[[int], None] = lambda step: None) -> None:
        self.stage, self.on_step = stage, on_step
        self.updates, self.said = list[tuple[str, int, int | None]](), list[str]()

    def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
        self.updates.append((stage, step, total))
        if stage == self.stage:
            self.on_step(step)

    def say(self, message: str) -> None:
        self.said.append(message)


def contents(pairs: Pairs) -> list[tuple[bytes, tuple[str, ...]]]:
    """Return the pixels and the captions of all pairs."""
    return [(pairs.open(i).tobytes(), pairs.captions(i)) for i in range(len(pairs))]


def other_clock(offset: str) -> dict[str, str]:
    """Return the environment variables of a process whose clock differs, by such as `+40d` or `-3h`.

    Skips the test where libfaketime is missing: `apt install faketime`, or the path of the library in LIBFAKETIME.
    """
    paths = [os.environ.get("LIBFAKETIME", ""), *map(str, Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))]
    library = next((path for path in paths if Path(path).is_file()), None)
    if library is None:
        pytest.skip("needs libfaketime")
    return {"LD_PRELOAD": library, "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants; torchrun puts its workers into separate process groups."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [pid, *(descendant for child in children for descendant in process_tree(child))]


def one_worker(address: str, make: Callable[[], Callable[[Any], Any]], items: Iterable[Any]) -> Iterator[Any]:
    """A cluster with one worker, in this process, for `utils.cluster.map_on_cluster`."""
    call = pickle.loads(pickle.dumps(make))()
    for item in items:
        yield pickle.loads(pickle.dumps(call(pickle.loads(pickle.dumps(item)))))
