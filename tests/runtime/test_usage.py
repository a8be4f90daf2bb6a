from __future__ import annotations

import time

import pytest

from clip_rd_edge.runtime import usage
from clip_rd_edge.runtime.usage import OtherLoad, peak_memory_bytes


def test_own_work_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = usage.os.sysconf("SC_CLK_TCK")
    # Two cores for ten seconds; twelve seconds of work, of which nine are this process's.
    states = iter([(0, 0), (12 * ticks, 20 * ticks)])
    own = iter([100.0, 109.0])
    monkeypatch.setattr(usage, "_jiffies", lambda: next(states))
    monkeypatch.setattr(time, "process_time", lambda: next(own))
    assert OtherLoad().share() == pytest.approx(3 / 20)


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "_jiffies", lambda: (0, 0))
    assert OtherLoad().share() is None


def test_peak_memory_is_this_process_s() -> None:
    before = peak_memory_bytes()
    assert before is not None
    assert before > 5e6
    held = bytearray(40_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert (peak_memory_bytes() or 0) >= before
