"""The share of messages that is hidden is that of their time in which gradients are computed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.training import messages
from benchmarks.training.messages import Interval, intersection, summarise, union


def event(name: str, start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_times_that_overlap_count_once() -> None:
    assert union([Interval(5, 7), Interval(0, 2), Interval(1, 3), Interval(3, 4)]) == [(0, 4), (5, 7)]
    assert intersection([Interval(0, 4), Interval(5, 7)], [Interval(3, 6), Interval(6.5, 9)]) == [
        (3, 4),
        (5, 6),
        (6.5, 7),
    ]


def test_a_summary_counts_messages_and_their_hidden_time_per_step() -> None:
    gradients = f"{messages.GRADIENTS}: AddmmBackward0"
    events = [
        event("gloo:broadcast", 0, 1000),
        event("aten::mm", 1000, 9000),
        event(gradients, 2000, 4000),
        event("gloo:all_reduce", 3000, 5000),
        event("gloo:all_reduce", 3500, 5500),
    ]
    figures = summarise(events, steps=2)
    assert figures["messages_per_step"] == {"all_reduce": 1.0, "broadcast": 0.5}
    assert figures["messages_ms"] == pytest.approx(3.5 / 2)
    assert figures["hidden_ms"] == pytest.approx(1 / 2)
    assert figures["backward_ms"] == pytest.approx(2 / 2)


@pytest.mark.slow
def test_a_run_of_resnet50_sends_at_most_twelve_messages_a_step() -> None:
    arguments = SimpleNamespace(batch_size=4, image_size=64, steps=2, processes=2)
    figures = messages.watch("resnet50", arguments)  # type: ignore[arg-type]
    counts = figures["messages_per_step"]
    assert counts["broadcast"] == 2  # buffers, by dtype
    assert sum(counts.values()) <= 12
    assert figures["hidden_ms"] > 0
