"""Work on many shards or tables at once ends when it fails or is stopped."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from clip_rd_edge.data import shard_index as index_files
from clip_rd_edge.data.shard_index import ordered_map


def _work(seconds: float) -> float:
    time.sleep(seconds)
    if not seconds:
        raise OSError("damaged")
    return seconds


def _stop_after_the_first(first: float) -> None:
    with ordered_map(parallel=True) as in_order:
        next(in_order(_work, [first, 60]))
        raise KeyboardInterrupt


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.parametrize(("first", "error"), [(0, OSError), (0.01, KeyboardInterrupt)], ids=["failure", "stop"])
def test_processes_that_still_work_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, first: float, error: type[BaseException]
) -> None:
    monkeypatch.setattr(index_files, "usable_cores", lambda: 2)
    started = time.monotonic()
    with pytest.raises(error):
        _stop_after_the_first(first)
    assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()
