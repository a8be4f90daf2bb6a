from __future__ import annotations

import msgspec
import pytest

from clip_rd_edge.benchmarking.findings import headline, recommendation
from clip_rd_edge.benchmarking.report import markdown, page
from clip_rd_edge.benchmarking.results import Results

P95 = {"Teacher": 20.0, "Alone": 9.0, "Student": 8.0, "FP32": 4.0, "INT8": 2.0}


@pytest.fixture
def timed(results: Results) -> Results:
    """Return the results with known p95s from file to answer; top-1 is 100, 50, 67, 67 and 50 %."""
    rows = []
    for row in results.rows:
        end_to_end = msgspec.structs.replace(row.latency.end_to_end, p95=P95[row.label])
        rows.append(msgspec.structs.replace(row, latency=msgspec.structs.replace(row.latency, end_to_end=end_to_end)))
    return msgspec.structs.replace(results, rows=tuple(rows))


def recommend(results: Results, budget_ms: float | None, min_accuracy: float | None) -> str:
    suite = msgspec.structs.replace(results.suite, budget_ms=budget_ms, min_accuracy=min_accuracy)
    return recommendation(msgspec.structs.replace(results, suite=suite)) or ""


def test_there_is_no_recommendation_without_a_budget(timed: Results) -> None:
    assert recommendation(timed) is None


def test_the_fastest_model_that_is_not_significantly_less_accurate_is_recommended(timed: Results) -> None:
    sentence = recommend(timed, 10, 0.25)
    assert sentence.startswith(
        "For at most 10 ms from image file to answer (95th percentile) and at least 25.0 % top-1, "
    )
    assert "choose **INT8**: 2.00 ms and 50.0 % on task" in sentence
    assert sentence.endswith("the fastest model that is not significantly less accurate than Student.")


def test_a_single_suitable_model_is_recommended(timed: Results) -> None:
    assert "choose **Teacher**" in recommend(timed, None, 0.9)
    assert recommend(timed, None, 0.9).endswith("the only model that meets this.")
    assert "choose **FP32**" in recommend(timed, 10, 0.6)


def test_unreachable_requirements_are_explained(timed: Results) -> None:
    assert recommend(timed, 1, 0.9) == (
        "No model meets at most 1 ms from image file to answer (95th percentile) and at least 90.0 % top-1: "
        "the fastest, INT8, takes 2.00 ms at 50.0 %, and the most accurate, Teacher, takes 20.0 ms at 100.0 %."
    )


def test_the_recommendation_is_in_both_reports(timed: Results) -> None:
    suite = msgspec.structs.replace(timed.suite, budget_ms=10)
    with_budget = msgspec.structs.replace(timed, suite=suite)
    assert headline(with_budget)[1].startswith("For at most 10 ms")
    assert "choose **INT8**" in markdown(with_budget, plot=False)
    assert "choose <strong>INT8</strong>" in page(with_budget)
