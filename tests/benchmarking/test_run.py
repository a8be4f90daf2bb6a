from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from clip_rd_edge.benchmarking.accuracy import RetrievalPredictions
from clip_rd_edge.benchmarking.metrics import Recall, RetrievalScore, ZeroShotScore
from clip_rd_edge.benchmarking.results import Results, read_results, this_environment, write_results
from clip_rd_edge.benchmarking.run import PredictionCache, run_suite
from clip_rd_edge.benchmarking.suite import Suite, SuiteRow
from clip_rd_edge.data.tasks import RetrievalTask
from clip_rd_edge.errors import ConfigError, InputError, MissingExtraError

Open = Callable[..., Any]


def test_results_have_rows_scores_latency_and_comparisons(results: Results, suite: Suite) -> None:
    assert [row.label for row in results.rows] == [row.label for row in suite.rows]
    teacher, alone, student, fp32, quantised = (row.scores[0] for row in results.rows)
    assert isinstance(teacher, ZeroShotScore)
    assert teacher.top1 == 1 > quantised.top1
    assert results.rows[0].description.size_bytes == 6_000_000
    assert results.rows[0].latency.image.p50 > 0
    pairs = [(comparison.label, comparison.reference) for comparison in results.comparisons]
    assert pairs == [
        ("Student", "Teacher"), ("Student", "Alone"), ("FP32", "Student"), ("INT8", "FP32"), ("INT8", "Teacher"),
    ]  # fmt: skip
    by_pair = dict(zip(pairs, results.comparisons, strict=True))
    assert by_pair["Student", "Teacher"].difference == pytest.approx(student.top1 - teacher.top1)
    assert by_pair["Student", "Alone"].difference == pytest.approx(student.top1 - alone.top1)
    same = by_pair["FP32", "Student"]
    assert (fp32.top1 - student.top1, same.difference, same.interval.low, same.interval.high) == (0, 0, 0, 0)


def test_samples_are_first_correct_then_wrong_and_worst_classes_those_with_errors(results: Results) -> None:
    correct = [sample.predictions[-1].right for sample in results.samples]
    assert set(correct) == {True, False}
    assert correct == sorted(correct, reverse=True)
    for sample in results.samples:
        assert all((each.label == sample.label) == each.right for each in sample.predictions)
    hits = results.rows[-1].correctness[0].hits().reshape(6, 2)  # two images per colour
    recalls = [worst.recall for worst in results.weakest if worst.recall is not None]
    assert len(recalls) == int((~hits.all(axis=1)).sum()) > 0
    assert recalls == sorted(recalls)


def test_models_that_cannot_be_opened_or_run_are_skipped_with_the_reason(suite: Suite, open_fake: Open) -> None:
    """One whose folder is missing, one that needs torch, and one whose runtime is missing."""

    def open_model(spec: str, **options: str) -> Any:
        if spec.endswith("student"):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        encoder = open_fake(spec)
        if options:
            assert options == {"runtime": "openvino"}
            encoder.encode_pixels = without_openvino  # a runtime is imported when a tower is first used
        return encoder

    def without_openvino(pixels: Any) -> Any:
        raise MissingExtraError("openvino", extra="openvino", purpose="Running a bundle in OpenVINO")

    (Path(suite.root or "") / "alone").rmdir()
    *others, int8 = suite.rows
    rows = (*others, replace(int8, runtime="openvino"))
    measured = run_suite(replace(suite, rows=rows), open_model)
    assert [row.label for row in measured.rows] == ["Teacher", "FP32"]
    reasons = {row.label: row.reason for row in measured.skipped}
    assert reasons.keys() == {"Alone", "Student", "INT8"}
    assert f"{suite.root}/alone" in reasons["Alone"]
    assert "'torch'" in reasons["Student"]
    assert "'openvino'" in reasons["INT8"]
    nowhere = replace(suite, rows=(SuiteRow(label="A", model="nowhere", role="student"),))
    with pytest.raises(InputError):
        run_suite(nowhere, open_fake)


@pytest.mark.parametrize(
    ("old", "new"),
    [("", "["), ('"format_version": 3', '"format_version": 9')],
)
def test_results_are_read_as_they_were_written_and_damaged_ones_are_an_error(
    results: Results, tmp_path: Path, old: str, new: str
) -> None:
    path = tmp_path / "out" / "results.json"
    write_results(path, results)
    assert read_results(path) == read_results(path.parent) == results
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        read_results(path)
    assert str(path) in str(caught.value)


@pytest.fixture
def cache(tmp_path: Path) -> PredictionCache:
    return PredictionCache(tmp_path / "parts", this_environment())


PREDICTIONS = RetrievalPredictions(
    score=RetrievalScore(
        task="t", images=1, captions=1, image_to_text=Recall(at1=1, at5=None, at10=None),
        text_to_image=Recall(at1=1, at5=None, at10=None),
    ),
    correctness=(),
)  # fmt: skip


def test_predictions_of_another_machine_are_not_taken(tmp_path: Path) -> None:
    task = RetrievalTask(name="t", images=(tmp_path / "a.png",), captions=("a",), caption_images=(0,))
    here = this_environment()
    PredictionCache(tmp_path, here).store("m", None, task, PREDICTIONS)
    assert PredictionCache(tmp_path, here).find("m", None, task) == PREDICTIONS
    for change in ({"machine": "Abacus, 2 cores"}, {"instruction_sets": ()}, {"accelerator": "NVIDIA L4"}):
        assert PredictionCache(tmp_path, replace(here, **change)).find("m", None, task) is None


def recording(open_fake: Open, evaluated: list[str]) -> Open:
    """Wrap `open_fake` to record which models embed the images of a task."""

    def open_recorded(spec: str) -> Any:
        encoder = open_fake(spec)
        plain = encoder.encode_images

        def encode(images: Any) -> Any:
            if len(images) > 1:  # latency is measured at batch 1
                evaluated.append(encoder.name)
            return plain(images)

        encoder.encode_images = encode
        return encoder

    return open_recorded


def test_an_interrupted_run_resumes_and_measures_again_what_has_changed(
    suite: Suite, open_fake: Open, cache: PredictionCache, results: Results
) -> None:
    def interrupted(spec: str) -> Any:
        if spec.endswith("fp32"):
            raise KeyboardInterrupt
        return open_fake(spec)

    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, interrupted, cache=cache)
    evaluated: list[str] = []
    resumed = run_suite(suite, recording(open_fake, evaluated), cache=cache)
    assert evaluated == ["fp32", "int8"]
    assert [row.scores for row in resumed.rows] == [row.scores for row in results.rows]
    assert resumed.comparisons == results.comparisons
    (Path(suite.root or "") / "student" / "weights").write_bytes(b"new")
    evaluated.clear()
    run_suite(suite, recording(open_fake, evaluated), cache=cache)
    assert evaluated == ["student"]
    image = Path(suite.root or "") / "task" / "red" / "16.png"
    image.write_bytes((image.parents[1] / "blue" / "24.png").read_bytes())
    evaluated.clear()
    run_suite(suite, recording(open_fake, evaluated), cache=cache)
    assert len(evaluated) == len(suite.rows)
    evaluated.clear()
    for path in cache.folder.iterdir():
        path.write_text("{")
    run_suite(suite, recording(open_fake, evaluated), cache=cache)
    assert len(evaluated) == len(suite.rows)
