"""Find out which process of a run is lost, when a message to it fails."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from clip_rd_edge.distillation.processes.heartbeat import Store, open_store, store_key
from clip_rd_edge.errors import LostProcessError, first_line
from clip_rd_edge.utils.host import is_running

_POLL_S = 0.2
LOCAL_WAIT_S = 2.0  # until the launcher has noticed that a process ended
REMOTE_WAIT_S = 10.0
RESUME_HINT = "its own output says why; resume with the same command and {resume}"


class Member(NamedTuple):
    """A process of a run, by its machine and its number there."""

    host: str
    pid: int


def this_member() -> Member:
    """Return this process."""
    return Member(socket.gethostname(), os.getpid())


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error is that of a message between processes, rather than of a computation."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


def find_lost(rank: int, members: Sequence[Member], store: Store | None) -> list[int]:
    """Return the ranks of the processes that have ended, empty if that cannot be told.

    Those on this machine are looked for by their numbers. Those on others had a message fail, too, and answer a roll
    call unless they are lost themselves. Without a store to answer in, the only one on another machine is lost: the
    launcher that had the store ends with its processes.

    Args:
        members: all processes, by rank.
        store: None if it is gone.
    """
    store = store if store is not None and _answer(store, _key(rank)) else None
    here = [other for other, member in enumerate(members) if member.host == members[rank].host]
    deadline = time.monotonic() + LOCAL_WAIT_S
    while time.monotonic() < deadline:
        if ended := [other for other in here if is_running(members[other].pid) is False]:
            return ended
        time.sleep(_POLL_S)
    elsewhere = [other for other in range(len(members)) if other not in here]
    deadline = time.monotonic() + REMOTE_WAIT_S
    while store and elsewhere and time.monotonic() < deadline:
        try:
            elsewhere = [other for other in elsewhere if not store.add(_key(other), 0)]
        except RuntimeError:  # it ended with its machine
            store = None
        time.sleep(_POLL_S)
    return elsewhere if store or len(elsewhere) == 1 else []


def lost_error(error: RuntimeError, rank: int, members: Sequence[Member]) -> LostProcessError:
    """Return the error that names the processes that are lost."""
    lost = find_lost(rank, members, _connect())
    own = members[rank].host
    if not lost:
        hosts = dict.fromkeys(member.host for member in members if member.host != own)
        return LostProcessError(
            f"The connection to another process of the run failed: {first_line(error)}.",
            hint=f"see the output on {' and '.join(hosts) or own}; resume with the same command and {{resume}}",
        )
    names = " and ".join(f"{other} (on {members[other].host})" for other in lost)
    verb = "has ended" if len(lost) == 1 else "have ended"
    if any(members[other].host != own for other in lost):
        verb += " or cannot be reached"
    return LostProcessError(f"Process {names} of the run {verb}.", hint=RESUME_HINT)


def _connect() -> Store | None:
    try:
        return open_store(REMOTE_WAIT_S)
    except (RuntimeError, KeyError):
        return None


def _answer(store: Store, key: str) -> bool:
    try:
        store.add(key, 1)
    except RuntimeError:
        return False
    return True


def _key(rank: int) -> str:
    return store_key("roll-call", rank)
