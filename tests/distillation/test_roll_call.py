"""A lost process is found by its number on this machine, and by a roll call on others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from clip_rd_edge.distillation import processes as roll_call
from clip_rd_edge.distillation.processes import Member, find_lost, lost_error, this_member

CONNECTION = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5000")


class FakeStore:
    def __init__(self, answered: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.numbers = {f"clip-rd-edge/roll-call/0/{rank}": 1 for rank in answered}

    def add(self, key: str, amount: int) -> int:
        self.numbers[key] = self.numbers.get(key, 0) + amount
        return self.numbers[key]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "LOCAL_WAIT_S", 0.3)
    monkeypatch.setattr(roll_call, "REMOTE_WAIT_S", 0.5)


@pytest.fixture
def ended() -> Member:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return Member(socket.gethostname(), process.pid)


def test_a_process_of_this_machine_that_ended_is_found(ended: Member) -> None:
    assert find_lost(0, [this_member(), this_member(), ended], None) == [2]


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="waits for a process without looking for it")
def test_one_that_its_launcher_has_not_looked_for_yet_is_found() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays listed
    assert find_lost(0, [this_member(), Member(socket.gethostname(), process.pid)], None) == [1]
    process.wait()


def test_on_other_machines_those_are_lost_that_do_not_answer() -> None:
    members = [this_member(), Member("b", 1), Member("b", 2), Member("c", 3)]
    store = FakeStore({1, 3})
    assert find_lost(0, members, store) == [2]
    assert store.numbers["clip-rd-edge/roll-call/0/0"] == 1  # this one has answered


class LostStore(FakeStore):
    """A store that ends with its machine, after the first call."""

    def add(self, key: str, amount: int) -> int:
        if self.numbers:
            raise RuntimeError("Connection reset by peer")
        return super().add(key, amount)


@pytest.mark.parametrize("store", [None, LostStore()])
def test_without_a_store_the_only_process_elsewhere_is_lost_and_no_other_is_accused(store: FakeStore | None) -> None:
    assert find_lost(0, [this_member(), Member("b", 1)], store) == [1]
    assert find_lost(0, [this_member(), Member("b", 1), Member("b", 2)], store) == []


def test_the_error_names_the_process_and_its_machine(ended: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "_connect", lambda: None)
    error = lost_error(CONNECTION, 0, [this_member(), ended])
    assert str(error) == f"Process 1 (on {ended.host}) of the run has ended."
    assert "resume" in error.hint
    elsewhere = lost_error(CONNECTION, 0, [this_member(), Member("b", 1)])
    assert str(elsewhere) == "Process 1 (on b) of the run has ended or cannot be reached."
    unknown = lost_error(CONNECTION, 0, [this_member(), Member("b", 1), Member("c", 1)])
    assert str(unknown).startswith("The connection to another process of the run failed: [gloo/transport")
    assert "see the output on b and c;" in unknown.hint


def test_errors_of_computations_are_no_lost_connections() -> None:
    assert roll_call.is_lost_connection(CONNECTION)
    assert not roll_call.is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
