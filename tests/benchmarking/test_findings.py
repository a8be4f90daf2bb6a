"""Sentences on results with known latencies; sizes are 6, 2, 4, 4 and 3 MB, top-1 is 100, 50, 67, 67 and 50 %."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clip_rd_edge.benchmarking.findings import headline, recommendation
from clip_rd_edge.benchmarking.metrics import Interval
from clip_rd_edge.benchmarking.results import Results, RowResult
from clip_rd_edge.benchmarking.tables import chance_verdict

# Image tower, p50 and p95 of end to end, in ms.
LATENCIES = {
    "Teacher": (20.0, 24.0, 20.0), "Alone": (8.0, 9.0, 9.0), "Student": (10.0, 12.0, 8.0), "FP32": (6.0, 8.0, 4.0),
    "INT8": (2.0, 3.0, 2.0),
}  # fmt: skip


def timed_row(row: RowResult, image_ms: float, p50: float, p95: float) -> RowResult:
    image = replace(row.latency.image, p50=image_ms)
    end_to_end = replace(row.latency.end_to_end, p50=p50, p95=p95)
    return replace(row, latency=replace(row.latency, image=image, end_to_end=end_to_end))


@pytest.fixture
def timed(results: Results) -> Results:
    return replace(results, rows=tuple(timed_row(row, *LATENCIES[row.label]) for row in results.rows))


@pytest.mark.parametrize(
    ("budget_ms", "min_accuracy", "model", "end"),
    [
        (10, 0.25, "INT8", "the fastest model that is not significantly less accurate than Student."),
        (None, 0.9, "Teacher", "the only model that meets this."),
        (10, 0.6, "FP32", "the fastest model that is not significantly less accurate than Student."),
    ],
)
def test_the_fastest_model_that_is_not_significantly_less_accurate_is_recommended(
    timed: Results, budget_ms: float | None, min_accuracy: float | None, model: str, end: str
) -> None:
    suite = replace(timed.suite, budget_ms=budget_ms, min_accuracy=min_accuracy)
    sentence = recommendation(replace(timed, suite=suite)) or ""
    assert f"choose **{model}**: " in sentence
    assert sentence.endswith(end)
    assert headline(replace(timed, suite=suite))[1] == sentence
    assert recommendation(timed) is None  # there is no budget


def test_a_difference_of_a_few_answers_may_be_chance_though_its_interval_leaves_out_zero(timed: Results) -> None:
    comparison = replace(timed.comparisons[0], interval=Interval(-0.016, -0.002), p_value=0.125)
    for changes, verdict in (
        ({}, "not significant (exact sign test: p = 0.12)"),
        ({"interval": Interval(-0.016, 0.002)}, "not significant"),
        ({"p_value": 0.01}, ""),
    ):
        assert chance_verdict(replace(comparison, **changes)) == verdict
    int8 = replace(comparison, label="INT8", reference="FP32")
    sentence = headline(replace(timed, comparisons=(int8,)))[-1]
    assert "(95 % confidence interval 0.2 to 1.6; exact sign test: p = 0.12, so this may be chance)" in sentence
