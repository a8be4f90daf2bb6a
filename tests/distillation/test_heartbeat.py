"""A process that is stopped, and so neither ends nor answers, ends the others in bounded time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support import PATIENCE_S, wait_until

from clip_rd_edge.distillation import processes as heartbeat
from clip_rd_edge.distillation.processes import Heartbeat, _store_after_restart, silence_error

INTERVAL_S = 0.03  # times MAX_MISSED: longer than a busy machine keeps one thread waiting


class Numbers:
    """The shared numbers, in this process."""

    def __init__(self) -> None:
        self._lock, self._numbers = threading.Lock(), Counter[str]()
        self.frozen = threading.Event()
        self.thawed = threading.Event()

    def add(self, key: str, amount: int) -> int:
        if self.frozen.is_set():
            self.thawed.wait()
        with self._lock:
            self._numbers[key] += amount
            return self._numbers[key]


class Member:
    """One process of a run, whose beats can be stopped, or are from the start."""

    def __init__(
        self, rank: int, count: int, numbers: Numbers, holder: int | None = None, *, frozen: bool = False
    ) -> None:
        self.silent: list[int] = []
        self.own = type(numbers).__new__(type(numbers))
        self.own.__dict__ = {**numbers.__dict__, "frozen": threading.Event(), "thawed": threading.Event()}
        if frozen:
            self.own.frozen.set()
        self.beats = Heartbeat(
            rank, count, self.own, holder=holder, on_silence=self.silent.append, interval_s=INTERVAL_S
        )
        self.beats.start()


@pytest.fixture(autouse=True)
def _few_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "MAX_MISSED", 20)


def test_processes_that_run_or_have_ended_are_not_silent() -> None:
    numbers = Numbers()
    members = [Member(rank, 3, numbers) for rank in range(3)]
    time.sleep(60 * INTERVAL_S)
    members[1].beats.stop()
    time.sleep(60 * INTERVAL_S)
    assert [member.silent for member in members] == [[], [], []]
    for member in members:
        member.beats.stop()


def test_a_process_that_no_longer_beats_is_named_by_the_one_before_it() -> None:
    numbers = Numbers()
    members = [Member(rank, 3, numbers) for rank in range(3)]
    time.sleep(5 * INTERVAL_S)
    members[2].own.frozen.set()
    wait_until(lambda: members[1].silent)
    assert members[1].silent == [2]
    assert members[0].silent == []
    members[2].own.thawed.set()
    for member in members:
        member.beats.stop()


def test_a_process_is_named_by_one_whose_own_beats_come_late() -> None:
    """On a busy machine a beat takes longer than an interval, so that some intervals see none."""

    class Slow(Numbers):
        def add(self, key: str, amount: int) -> int:
            time.sleep(INTERVAL_S)
            return super().add(key, amount)

    numbers = Slow()
    watchers = [Member(0, 2, numbers) for _ in range(4)]  # the second process never starts
    wait_until(lambda: all(watcher.silent for watcher in watchers))
    assert [watcher.silent for watcher in watchers] == [[1]] * 4
    for watcher in watchers:
        watcher.beats.stop()


@pytest.mark.parametrize(("holder", "named"), [(0, [0]), (None, [])])
def test_a_store_that_does_not_answer_stands_for_the_process_that_holds_it(
    holder: int | None, named: list[int]
) -> None:
    member = Member(2, 3, Numbers(), holder, frozen=True)  # before it beats: a busy machine might let it beat twice
    wait_until(lambda: member.silent or not member.beats._watching.is_alive())
    assert member.silent == named
    member.own.thawed.set()
    member.beats.stop()


def test_a_store_that_is_gone_is_left_to_the_connections_to_notice() -> None:
    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Connection reset by peer")

    silent: list[int] = []
    beats = Heartbeat(0, 2, Gone(), holder=0, on_silence=silent.append, interval_s=INTERVAL_S)
    beats.start()
    time.sleep(40 * INTERVAL_S)
    assert silent == []
    beats.stop()


def test_the_error_says_which_process_and_what_to_do() -> None:
    assert str(silence_error(3)).startswith("Process 3 of the run has not answered for ")
    assert "resume" in silence_error(3).hint


SCRIPT = """
    import sys, time
    from clip_rd_edge.distillation import processes as heartbeat
    heartbeat.INTERVAL_S, heartbeat.MAX_MISSED = 0.1, 60
    from clip_rd_edge.distillation.processes import join_processes
    with join_processes() as processes:
        print("joined", processes.rank, flush=True)
        time.sleep(1)
        while True:
            processes.sum(1)
            time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_the_others_end_when_a_process_is_stopped(tmp_path: Path, stopped: int) -> None:
    """Started without torchrun, which would end the others: the first process holds the store."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("joined")
        time.sleep(2)
        os.kill(processes[stopped].pid, signal.SIGSTOP)
        other = processes[1 - stopped]
        _, error = other.communicate(timeout=PATIENCE_S)
        assert other.returncode == 1
        assert f"Process {stopped} of the run has not answered" in error
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_processes_that_torchrun_starts_again_do_not_meet_those_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "1", "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _store_after_restart() == {}
    server.set("address", "of a process that ended")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    arguments = _store_after_restart()
    assert (arguments["rank"], arguments["world_size"]) == (1, 2)
    assert not arguments["store"].check(["address"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # machines may count restarts differently
    assert _store_after_restart() == {}


def test_the_store_is_reached_by_a_pytorch_without_libuv(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its wheel for Windows is."""

    def without_libuv(*arguments: Any, use_libuv: bool = True, **options: Any) -> dist.TCPStore:
        if use_libuv:
            raise RuntimeError("use_libuv was requested but PyTorch was built without libuv support")
        return dist.TCPStore(*arguments, use_libuv=use_libuv, **options)

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(heartbeat, "TCPStore", without_libuv)
    assert heartbeat.open_store(PATIENCE_S).add("beats", 2) == 2
    assert server.add("beats", 1) == 3
