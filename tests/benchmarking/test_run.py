from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import Watch

from clip_rd_edge.benchmarking.metrics import ZeroShotScore
from clip_rd_edge.benchmarking.report.html import page
from clip_rd_edge.benchmarking.report.text import markdown
from clip_rd_edge.benchmarking.results import Results, read_results, write_results
from clip_rd_edge.benchmarking.run import run_suite
from clip_rd_edge.benchmarking.suite import Suite, SuiteRow
from clip_rd_edge.data.clip_benchmark import Templates
from clip_rd_edge.errors import ConfigError, InputError, MissingExtraError


def test_rows_scores_and_latency(results: Results, suite: Suite) -> None:
    assert [row.label for row in results.rows] == [row.label for row in suite.rows]
    teacher, *_, quantised = results.rows
    assert isinstance(teacher.scores[0], ZeroShotScore)
    assert teacher.scores[0].top1 == 1
    assert quantised.scores[0].top1 < 1
    assert teacher.description.size_bytes == 6_000_000
    assert teacher.latency.image.p50 > 0
    assert results.environment.packages["numpy"]


def test_comparisons_are_with_what_each_role_comes_from(results: Results) -> None:
    pairs = [(found.label, found.reference) for found in results.comparisons]
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


def test_samples_are_right_ones_then_wrong_ones_of_the_last_row(results: Results) -> None:
    rights = [sample.answers[-1].right for sample in results.samples]
    assert set(rights) == {True, False}
    assert rights == sorted(rights, reverse=True)
    for sample in results.samples:
        assert [answer.row for answer in sample.answers] == ["Teacher", "INT8"]
        assert sample.png.startswith(b"\x89PNG")
        for answer in sample.answers:
            assert (answer.label == sample.label) == answer.right


def test_a_missing_model_is_skipped_with_its_reason(
    suite: Suite, open_fake: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / "models" / "alone").rmdir()
    found = run_suite(suite, open_fake)
    assert [row.label for row in found.rows] == ["Teacher", "Student", "FP32", "INT8"]
    (skipped,) = found.skipped
    assert skipped.label == "Alone"
    assert skipped.reason == f"There is no model folder {tmp_path / 'models' / 'alone'}."


def test_a_row_that_needs_torch_is_skipped_where_there_is_none(suite: Suite, open_fake: Callable[[str], Any]) -> None:
    def without_torch(spec: str) -> Any:
        if spec.endswith(("teacher", "student", "alone")):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return open_fake(spec)

    found = run_suite(suite, without_torch)
    assert [row.label for row in found.rows] == ["FP32", "INT8"]
    assert {row.reason for row in found.skipped} == {"It needs the package 'torch', which is not installed."}


def test_a_row_names_its_runtime_and_is_skipped_where_that_is_missing(
    suite: Suite, open_fake: Callable[[str], Any]
) -> None:
    asked: list[str] = []

    def with_runtime(spec: str, **options: str) -> Any:
        encoder = open_fake(spec)
        if options:
            asked.append(options["runtime"])
            encoder.encode_pixels = without_openvino  # a runtime is imported when a tower is first asked for
        return encoder

    def without_openvino(pixels: Any) -> Any:
        raise MissingExtraError("openvino", extra="openvino", purpose="Running a bundle in OpenVINO")

    *others, int8 = suite.rows
    rows = (*others, msgspec.structs.replace(int8, runtime="openvino"))
    found = run_suite(msgspec.structs.replace(suite, rows=rows), with_runtime)
    assert asked == ["openvino"]
    assert [row.label for row in found.rows] == [row.label for row in others]
    assert (
        found.skipped[0].reason == "Running a bundle in OpenVINO needs the package 'openvino', which is not installed."
    )


def test_no_model_at_all(suite: Suite, open_fake: Callable[[str], Any]) -> None:
    nowhere = msgspec.structs.replace(suite, rows=(SuiteRow(label="A", model="nowhere", role="student"),))
    with pytest.raises(InputError, match=r"None of the models of the suite colours could be measured\. A: .*nowhere"):
        run_suite(nowhere, open_fake)


def test_an_unknown_task_is_refused_before_a_model_is_opened(suite: Suite) -> None:
    def open_nothing(spec: str) -> Any:
        raise AssertionError(f"{spec} was opened")

    with pytest.raises(InputError, match="Did you mean 'emoji:unseen-style'"):
        run_suite(msgspec.structs.replace(suite, tasks=("emoji:unsen-style",)), open_nothing)


def test_progress_names_row_and_task(suite: Suite, open_fake: Callable[[str], Any]) -> None:
    watch = Watch()
    run_suite(suite, open_fake, watch)
    told = watch.updates
    assert told[0] == ("Teacher: task", 12, 12)
    assert ("Latency", 5, 5) in told
    assert told[-1] == ("Throughput", 1, 1)


def test_results_survive_their_file(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.json"
    write_results(path, results)
    assert read_results(path) == results


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: text.replace('"environment"', '"machine"'), "missing required field `environment`"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 9'), "has format version 9; .* up to 2"),
        (lambda text: text.replace('"role": "teacher"', '"role": "pupil"'), "Invalid enum value 'pupil'"),
    ],
)
def test_damaged_results(results: Results, tmp_path: Path, damage: Callable[[str], str], message: str) -> None:
    path = tmp_path / "results.json"
    write_results(path, results)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match=message) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


def test_results_of_format_version_1_are_still_read() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "epyc-zen4-2-cores" / "quickstart-seed-0.json"
    found = read_results(path)
    assert found.format_version == 1
    text = markdown(found, plot=False)
    assert "From a picture's file to its embedding" in text
    assert "Peak memory" not in text


def test_missing_results(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot read .*results\.json: No such file"):
        read_results(tmp_path / "results.json")


def test_missing_data_sets_are_said_and_the_others_measured(
    suite: Suite, open_fake: Callable[[str], Any], tmp_path: Path
) -> None:
    wider = msgspec.structs.replace(suite, tasks=("sun397", "task"), missing_tasks="skip")
    found = run_suite(wider, open_fake)
    assert [score.task for score in found.rows[0].scores] == ["task"]
    assert [task.name for task in found.missing] == ["sun397"]
    assert f"{tmp_path / 'models'} has no folder sun397" in found.missing[0].reason
    assert "- **sun397** is missing: " in markdown(found, plot=False)
    assert "<strong>sun397</strong>: " in page(found)


def test_the_report_says_which_templates_labels_were_put_into(suite: Suite, open_fake: Callable[[str], Any]) -> None:
    (Path(suite.root or "") / "task" / "zeroshot_classification_templates.txt").unlink()
    found = run_suite(suite, open_fake, fallback=lambda: Templates(("{}", "{}"), "of the test"))
    assert found.rows[0].scores[0].templates == "2, of the test"
    assert "Templates: task: 2, of the test." in markdown(found, plot=False)
