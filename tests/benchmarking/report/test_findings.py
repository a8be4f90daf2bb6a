from __future__ import annotations

import msgspec
import pytest

from clip_rd_edge.benchmarking.report.findings import headline, recommendation
from clip_rd_edge.benchmarking.report.html import page
from clip_rd_edge.benchmarking.report.text import markdown
from clip_rd_edge.benchmarking.results import Results

P95 = {"Teacher": 20.0, "Alone": 9.0, "Student": 8.0, "FP32": 4.0, "INT8": 2.0}


@pytest.fixture
def timed(results: Results) -> Results:
    """With p95s of file to answer that the test knows; top-1 is 100, 33, 67, 67 and 50 %."""
    rows = []
    for row in results.rows:
        end_to_end = msgspec.structs.replace(row.latency.end_to_end, p95=P95[row.label])
        rows.append(msgspec.structs.replace(row, latency=msgspec.structs.replace(row.latency, end_to_end=end_to_end)))
    return msgspec.structs.replace(results, rows=tuple(rows))


def asked(results: Results, budget_ms: float | None, min_accuracy: float | None) -> str:
    suite = msgspec.structs.replace(results.suite, budget_ms=budget_ms, min_accuracy=min_accuracy)
    return recommendation(msgspec.structs.replace(results, suite=suite)) or ""


def test_nobody_asked(timed: Results) -> None:
    assert recommendation(timed) is None


def test_the_fastest_of_those_that_are_not_clearly_less_accurate(timed: Results) -> None:
    sentence = asked(timed, 10, 0.25)
    assert sentence.startswith(
        "For at most 10 ms from file to answer in 95 of 100 pictures and at least 25.0 % top-1, "
    )
    assert "take **INT8**: 2.00 ms and 50.0 % on task" in sentence
    assert sentence.endswith("the fastest of those not clearly less accurate than Student.")


def test_accuracy_that_only_one_has(timed: Results) -> None:
    assert "take **Teacher**" in asked(timed, None, 0.9)
    assert asked(timed, None, 0.9).endswith("the only one that fits.")
    assert "take **FP32**" in asked(timed, 10, 0.6)


def test_out_of_reach(timed: Results) -> None:
    assert asked(timed, 1, 0.9) == (
        "No model here takes at most 1 ms from file to answer in 95 of 100 pictures and at least 90.0 % top-1: "
        "the fastest, INT8, takes 2.00 ms at 50.0 %, and the most accurate, Teacher, 20.0 ms at 100.0 %."
    )


def test_it_stands_in_both_reports(timed: Results) -> None:
    suite = msgspec.structs.replace(timed.suite, budget_ms=10)
    advised = msgspec.structs.replace(timed, suite=suite)
    assert headline(advised)[1].startswith("For at most 10 ms")
    assert "take **INT8**" in markdown(advised, plot=False)
    assert "take <strong>INT8</strong>" in page(advised)
