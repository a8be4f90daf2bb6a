from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import Watch

from clip_rd_edge.benchmarking.metrics import ZeroShotScore
from clip_rd_edge.benchmarking.report import markdown, page
from clip_rd_edge.benchmarking.results import Results, read_results, write_results
from clip_rd_edge.benchmarking.run import run_suite
from clip_rd_edge.benchmarking.suite import Suite, SuiteRow
from clip_rd_edge.errors import ConfigError, InputError, MissingExtraError


def test_results_have_rows_scores_and_latency(results: Results, suite: Suite) -> None:
    assert [row.label for row in results.rows] == [row.label for row in suite.rows]
    teacher, *_, quantised = results.rows
    assert isinstance(teacher.scores[0], ZeroShotScore)
    assert teacher.scores[0].top1 == 1
    assert quantised.scores[0].top1 < 1
    assert teacher.description.size_bytes == 6_000_000
    assert teacher.latency.image.p50 > 0
    assert results.environment.packages["numpy"]


def test_each_role_is_compared_with_what_it_was_made_from(results: Results) -> None:
    pairs = [(comparison.label, comparison.reference) for comparison in results.comparisons]
    assert pairs == [
        ("Student", "Teacher"),
        ("Student", "Alone"),
        ("FP32", "Student"),
        ("INT8", "FP32"),
        ("INT8", "Teacher"),
    ]
    by_pair = dict(zip(pairs, results.comparisons, strict=True))
    teacher, alone, student, fp32, _ = (row.scores[0].top1 for row in results.rows)
    assert by_pair["Student", "Teacher"].difference == pytest.approx(student - teacher)
    assert by_pair["Student", "Alone"].difference == pytest.approx(student - alone)
    same = by_pair["FP32", "Student"]
    assert (fp32 - student, same.difference, same.interval.low, same.interval.high) == (0, 0, 0, 0)


def test_samples_are_first_correct_then_wrong_for_the_last_row(results: Results) -> None:
    correct = [sample.predictions[-1].right for sample in results.samples]
    assert set(correct) == {True, False}
    assert correct == sorted(correct, reverse=True)
    for sample in results.samples:
        assert [answer.row for answer in sample.predictions] == ["Teacher", "INT8"]
        assert sample.png.startswith(b"\x89PNG")
        for answer in sample.predictions:
            assert (answer.label == sample.label) == answer.right


def test_a_missing_model_is_skipped_with_its_reason(
    suite: Suite, open_fake: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / "models" / "alone").rmdir()
    measured = run_suite(suite, open_fake)
    assert [row.label for row in measured.rows] == ["Teacher", "Student", "FP32", "INT8"]
    (skipped,) = measured.skipped
    assert skipped.label == "Alone"
    assert skipped.reason == f"There is no model folder {tmp_path / 'models' / 'alone'}."


def test_a_row_that_needs_torch_is_skipped_without_torch(suite: Suite, open_fake: Callable[[str], Any]) -> None:
    def without_torch(spec: str) -> Any:
        if spec.endswith(("teacher", "student", "alone")):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return open_fake(spec)

    measured = run_suite(suite, without_torch)
    assert [row.label for row in measured.rows] == ["FP32", "INT8"]
    assert {row.reason for row in measured.skipped} == {"It needs the package 'torch', which is not installed."}


def test_a_row_is_skipped_if_its_runtime_is_missing(suite: Suite, open_fake: Callable[[str], Any]) -> None:
    runtimes: list[str] = []

    def with_runtime(spec: str, **options: str) -> Any:
        encoder = open_fake(spec)
        if options:
            runtimes.append(options["runtime"])
            encoder.encode_pixels = without_openvino  # a runtime is imported when a tower is first used
        return encoder

    def without_openvino(pixels: Any) -> Any:
        raise MissingExtraError("openvino", extra="openvino", purpose="Running a bundle in OpenVINO")

    *others, int8 = suite.rows
    rows = (*others, msgspec.structs.replace(int8, runtime="openvino"))
    measured = run_suite(msgspec.structs.replace(suite, rows=rows), with_runtime)
    assert runtimes == ["openvino"]
    assert [row.label for row in measured.rows] == [row.label for row in others]
    assert (
        measured.skipped[0].reason
        == "Running a bundle in OpenVINO needs the package 'openvino', which is not installed."
    )


def test_a_suite_without_any_usable_model_is_an_error(suite: Suite, open_fake: Callable[[str], Any]) -> None:
    nowhere = msgspec.structs.replace(suite, rows=(SuiteRow(label="A", model="nowhere", role="student"),))
    with pytest.raises(InputError, match=r"None of the models of the suite colours could be measured\. A: .*nowhere"):
        run_suite(nowhere, open_fake)


def test_an_unknown_task_is_an_error_before_any_model_is_opened(suite: Suite) -> None:
    def open_nothing(spec: str) -> Any:
        raise AssertionError(f"{spec} was opened")

    with pytest.raises(InputError, match="Did you mean 'emoji:unseen-style'"):
        run_suite(msgspec.structs.replace(suite, tasks=("emoji:unsen-style",)), open_nothing)


def test_progress_names_the_row_and_the_task(suite: Suite, open_fake: Callable[[str], Any]) -> None:
    watch = Watch()
    run_suite(suite, open_fake, watch)
    updates = watch.updates
    assert updates[0] == ("Teacher: task", 12, 12)
    assert ("Latency", 5, 5) in updates
    assert updates[-1] == ("Throughput", 1, 1)


def test_results_are_read_as_they_were_written(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.json"
    write_results(path, results)
    assert read_results(path) == results


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: text.replace('"environment"', '"machine"'), "missing required field `environment`"),
        (lambda text: text.replace('"format_version": 3', '"format_version": 9'), "has format version 9; .* up to 3"),
        (lambda text: text.replace('"role": "teacher"', '"role": "pupil"'), "Invalid enum value 'pupil'"),
    ],
)
def test_damaged_results_are_an_error(
    results: Results, tmp_path: Path, damage: Callable[[str], str], message: str
) -> None:
    path = tmp_path / "results.json"
    write_results(path, results)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


def test_missing_results_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot read .*results\.json: No such file"):
        read_results(tmp_path / "results.json")


def test_missing_data_sets_are_reported_and_the_others_measured(
    suite: Suite, open_fake: Callable[[str], Any], tmp_path: Path
) -> None:
    wider = msgspec.structs.replace(suite, tasks=("sun397", "task"), missing_tasks="skip")
    measured = run_suite(wider, open_fake)
    assert [score.task for score in measured.rows[0].scores] == ["task"]
    assert [task.name for task in measured.missing] == ["sun397"]
    assert f"{tmp_path / 'models'} has no folder sun397" in measured.missing[0].reason
    assert "- **sun397** is missing: " in markdown(measured, plot=False)
    assert "<strong>sun397</strong>: " in page(measured)


def test_the_report_names_the_prompt_templates(suite: Suite, open_fake: Callable[[str], Any]) -> None:
    (Path(suite.root or "") / "task" / "zeroshot_classification_templates.txt").unlink()
    measured = run_suite(
        suite,
        open_fake,
    )
    assert measured.rows[0].scores[0].templates == "80, CLIP's for ImageNet"
    assert "Prompt templates: task: 80, CLIP's for ImageNet." in markdown(measured, plot=False)
