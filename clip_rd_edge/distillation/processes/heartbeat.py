"""Notice that a process of a run no longer runs although it is still there: stopped, or on a machine that is off.

A process that ends closes its connections, which the others notice at once. One that is stopped keeps them open, and
the others would wait for it for as long as indexing or an evaluation may take, which is days. So each process counts up
a number in the store that torchrun provides, and watches the number of the process after it. Reading a number means
nothing to the run: no step waits for it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from torch.distributed import TCPStore  # type: ignore[attr-defined,unused-ignore]

from clip_rd_edge.errors import ClipRdEdgeError

INTERVAL_S = 2.0
# A process counts its own ticks rather than seconds: while it is stopped itself, it does not miss others.
MAX_MISSED = 30
_LEFT = 1 << 40  # added to the number of a process that has ended as it should


class Store(Protocol):
    """Numbers that all processes share."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which is 0 at first; return the sum."""
        ...


def open_store(timeout_s: float) -> Store:
    """Connect to the store that torchrun provides.

    The connection is one of our own: torch's wait for others, and one that waits lets no other thread ask.
    """
    store: Store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        use_libuv=False,  # matters to the server alone, but PyTorch's wheel for Windows refuses it here, too
    )
    return store


def store_key(purpose: str, rank: int) -> str:
    """Return the key of a process's number, another one after each restart by torchrun."""
    return f"clip-rd-edge/{purpose}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


class Heartbeat:
    """Beats for one process, and watches the one after it.

    Args:
        rank, world_size: of this process.
        store: the shared numbers.
        holder: rank of the process that holds them, or None if none of the run's does. It is held silent when the store
            does not answer.
        on_silence: called once, in another thread, with the rank of a process that has been silent for MAX_MISSED
            intervals.
        interval_s: between two beats.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        *,
        holder: int | None,
        on_silence: Callable[[int], None],
        interval_s: float,
    ) -> None:
        self._rank, self._watched = rank, (rank + 1) % world_size
        self._store, self._holder, self._on_silence, self._interval_s = store, holder, on_silence, interval_s
        self._stopping = threading.Event()
        self._round, self._seen = 0, 0  # beats of this process that the store has taken, and the watched one's number
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._watching = threading.Thread(target=self._watch, name="heartbeat-watch", daemon=True)

    def start(self) -> None:
        """Start to beat and to watch."""
        self._beating.start()
        self._watching.start()

    def stop(self) -> None:
        """Stop; the process that watches this one takes no notice."""
        self._stopping.set()
        for thread in (self._watching, self._beating):
            thread.join(timeout=2 * self._interval_s)

    def _beat(self) -> None:
        try:
            while not self._stopping.is_set():
                self._store.add(_key(self._rank), 1)
                self._seen = self._store.add(_key(self._watched), 0)
                self._round += 1
                self._stopping.wait(self._interval_s)
            self._store.add(_key(self._rank), _LEFT)
        except RuntimeError:  # the store is gone, and with it the launcher or the first process: connections tell
            self._stopping.set()

    def _watch(self) -> None:
        missed, seen, round_then = 0, 0, 0
        while not self._stopping.wait(self._interval_s):
            round_now, seen_now = self._round, self._seen
            if seen_now >= _LEFT:
                return
            if seen_now != seen:
                missed, seen, round_then = 0, seen_now, round_now
                continue
            missed += 1
            if missed > MAX_MISSED:
                # Since then, and not in the last interval alone, in which a busy machine may be late with a beat. The
                # first one may have been on its way when the store fell silent.
                answers = round_now - round_then > 1
                silent = self._watched if answers else self._holder
                if silent is not None:
                    self._on_silence(silent)
                return


def _key(rank: int) -> str:
    return store_key("beats", rank)


@contextmanager
def heartbeat(rank: int, world_size: int) -> Iterator[None]:
    """Within the block, this process ends with exit code 1 if another one of the run is stopped."""
    store = open_store(INTERVAL_S * MAX_MISSED)
    holder = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
    beats = Heartbeat(rank, world_size, store, holder=holder, on_silence=_end, interval_s=INTERVAL_S)
    beats.start()
    try:
        yield
    finally:
        beats.stop()


def silence_error(rank: int) -> ClipRdEdgeError:
    """Return the error that names a process that is silent."""
    return ClipRdEdgeError(
        f"Process {rank} of the run has not answered for {INTERVAL_S * MAX_MISSED:.0f} s: it is stopped, or its "
        "machine is.",
        hint="end it, and resume with the same command and {resume}",
    )


def _end(rank: int) -> None:
    """End this process: its main thread waits for the silent one, inside of a library that nothing else can wake."""
    error = silence_error(rank)
    sys.stderr.write(f"error: {error}\nhint: {error.hint}\n")
    sys.stderr.flush()
    os._exit(error.exit_code)
