"""Sentences on results with known latencies; sizes are 6, 2, 4, 4 and 3 MB, top-1 is 100, 50, 67, 67 and 50 %."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clip_rd_edge.benchmarking.findings import headline, recommendation
from clip_rd_edge.benchmarking.metrics import Interval
from clip_rd_edge.benchmarking.report import page
from clip_rd_edge.benchmarking.results import Results, RowResult
from clip_rd_edge.benchmarking.tables import differences

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


def test_unreachable_requirements_are_explained(timed: Results) -> None:
    suite = replace(timed.suite, budget_ms=1, min_accuracy=0.9)
    assert recommendation(replace(timed, suite=suite)) == (
        "No model meets at most 1 ms from image file to answer (95th percentile) and at least 90.0 % top-1: "
        "the fastest, INT8, takes 2.00 ms at 50.0 %, and the most accurate, Teacher, takes 20.0 ms at 100.0 %."
    )


def test_headline_leads_with_the_shipped_model_against_the_teacher(timed: Results) -> None:
    shipped, student, quantised, distilled = headline(timed)
    assert shipped == (
        "INT8 keeps **50\u00a0%** of the teacher's top-1 on task (50.0 % vs 100.0 %), "
        "is **8.0× faster** end to end (3.00 ms vs 24.0 ms from image file to label) "
        "and **2.0× smaller** (3.0 MB vs 6.0 MB)."
    )
    assert student == (
        "The student before export keeps **67\u00a0%** of the teacher's top-1 on task (66.7 % vs 100.0 %), "
        "is **1.5× smaller**, and its image tower is **2.0× faster**."
    )
    assert quantised.startswith("Compared with FP32, INT8 loses 16.7 points of top-1 (95 % confidence interval ")
    assert quantised.endswith(", so this may be chance), is **1.3× smaller**, and its image tower is **3.0× faster**.")
    assert distilled.startswith("Distillation changes top-1 by +16.7 points compared with the same student trained")
    other = replace(timed.rows[-1], label="INT8 per tensor")
    assert headline(replace(timed, rows=(*timed.rows, other)))[0].startswith("INT8 per tensor keeps")
    openvino = replace(timed_row(timed.rows[3], 3.0, 48.0, 48.0), label="OpenVINO")  # no quantised one
    first, *_ = headline(replace(timed, rows=(*timed.rows[:-1], openvino)))
    assert first.startswith("OpenVINO keeps **67\u00a0%** of the teacher's top-1 on task")
    assert "is **2.0× slower** end to end (48.0 ms vs 24.0 ms from image file to label)" in first


def test_headline_of_a_busy_machine_says_so_first_and_stresses_no_speed(timed: Results) -> None:
    busy, shipped, student, quantised, _ = headline(replace(timed, other_load=0.96))
    assert busy.startswith("The machine was busy: other processes used 96\u00a0% of it while the models were timed.")
    assert "is 8.0× faster end to end" in shipped
    assert student.endswith("is **1.5× smaller**, and its image tower is 2.0× faster.")
    assert quantised.endswith("and its image tower is 3.0× faster.")
    somewhat = replace(timed, other_load=0.1)  # as on a desktop; comparisons are made, too
    assert headline(somewhat) == headline(timed)
    report = page(somewhat)
    assert report.count("The machine was busy: other processes used 10") == 1
    assert report.index("The machine was busy") < report.index("Noise: ")


def test_a_difference_of_a_few_answers_may_be_chance_though_its_interval_leaves_out_zero(timed: Results) -> None:
    comparison = replace(timed.comparisons[0], interval=Interval(-0.016, -0.002), p_value=0.125)
    for changes, verdict in (
        ({}, "not significant (exact sign test: p = 0.12)"),
        ({"interval": Interval(-0.016, 0.002)}, "not significant"),
        ({"p_value": 0.01}, ""),
    ):
        shown = replace(timed, comparisons=(replace(comparison, **changes),))
        assert differences(shown)[0].verdict == verdict
    int8 = replace(comparison, label="INT8", reference="FP32")
    sentence = headline(replace(timed, comparisons=(int8,)))[-1]
    assert "(95 % confidence interval 0.2 to 1.6; exact sign test: p = 0.12, so this may be chance)" in sentence
