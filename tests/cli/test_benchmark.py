from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.bundle.encoder import Description
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.cli import main as cli_main
from clip_rd_edge.utils.outputs import exclusive_writer

Run = Callable[..., int]
SUITE = """
name: two
root: {root}
tasks: [task]
rounds: 2
rows:
  - {{label: Good, model: good, role: teacher}}
  - {{label: Gone, model: gone, role: student}}
"""


class AlwaysWhite:
    """An encoder that classifies every image as white."""

    def describe(self) -> Description:
        preprocessing = Preprocessing(size=(2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
        return Description(
            name="white",
            runtime="numpy",
            precision="fp32",
            embedding_size=1,
            preprocessing=preprocessing,
            logit_scale=1,
        )

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        return np.ones((len(images), 1), dtype=np.float32)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.asarray([[1.0 if "white" in text else -1.0] for text in texts], dtype=np.float32)

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        return np.ones((len(pixels), 1), dtype=np.float32)

    def tokenize(self, texts: list[str]) -> np.ndarray:
        return np.zeros((len(texts), 4), dtype=np.int64)

    def encode_ids(self, ids: np.ndarray) -> np.ndarray:
        return np.ones((len(ids), 1), dtype=np.float32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the command line and returns its exit code."""
    opened: list[tuple[str, dict[str, Any]]] = []

    def open_encoder(spec: str, **options: Any) -> AlwaysWhite:
        opened.append((spec, options))
        return AlwaysWhite()

    monkeypatch.setattr("clip_rd_edge.api.measuring.open_encoder", open_encoder)
    monkeypatch.setattr("clip_rd_edge.api.models.open_encoder", open_encoder)

    exit_at_once = [sys.executable, "-S", "-c", ""]  # in place of the process that times a cold start
    monkeypatch.setattr("clip_rd_edge.api.measuring.first_answer", lambda *_: exit_at_once)

    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["clip-rd-edge", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli_main.main()
        return int(caught.value.code or 0)

    call.opened = opened  # type: ignore[attr-defined]
    return call


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite with one existing and one missing model."""
    (tmp_path / "good").mkdir()
    for name, colour in (("black", 0), ("white", 255)):
        (tmp_path / "task" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (colour,) * 3).save(tmp_path / "task" / name / "1.png")
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.format(root=tmp_path))
    return path


def test_the_report_is_written_and_the_table_printed(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "report"
    assert run("benchmark", str(suite), "-o", str(output)) == 0
    names = {"results.json", "report.md", "report.html", "accuracy-latency.png"}
    assert {path.name for path in output.iterdir()} == names
    out, err = capsys.readouterr()
    assert "Good" in out
    assert "50.0" in out
    assert f"Gone was skipped: There is no model folder {tmp_path / 'gone'}." in err
    assert f"The report is {output / 'report.html'}" in err
    assert run.opened == [(str(tmp_path / "good"), {"threads": 1})]


def test_a_folder_in_use_is_refused_unless_forced(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    assert run("benchmark", str(suite), "-o", str(tmp_path / "report")) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert run.opened == []
    for name in ("report.md", "results.json"):
        (tmp_path / "report" / name).write_text("mine")
        assert run("benchmark", str(suite), "-o", str(tmp_path / "report"), "--force") == 2
        assert f"{name} is not replaced" in " ".join(capsys.readouterr().err.split())
        assert (tmp_path / "report" / name).read_text() == "mine"
        (tmp_path / "report" / name).unlink()
    assert run.opened == []
    for _ in range(2):
        assert run("benchmark", str(suite), "-o", str(tmp_path / "report"), "--force") == 0
    assert (tmp_path / "report" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tasks: [task]", "tasks: [emoji:unseen-stile]", "No task named 'emoji:unseen-stile'"),
        ("rounds:", "round:", "unknown field `round`. Did you mean 'rounds'"),
        ("rows:", "rows: [", "is not valid YAML"),
    ],
)
def test_an_invalid_suite_is_reported_in_one_line_with_exit_code_2(
    run: Any, suite: Path, tmp_path: Path, capsys: Any, old: str, new: str, message: str
) -> None:
    suite.write_text(suite.read_text().replace(old, new))
    assert run("benchmark", str(suite), "-o", str(tmp_path / "report")) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("· starting benchmark\nerror: ")
    assert "Traceback" not in err
    assert out == ""
    assert run.opened == []
    assert not (tmp_path / "report").exists()


def test_a_missing_suite_is_refused(run: Any, tmp_path: Path, capsys: Any) -> None:
    assert run("benchmark", "nowhere.yaml", "-o", str(tmp_path / "report")) == 2
    assert "There is no suite 'nowhere.yaml': neither a file nor one of" in capsys.readouterr().err


def test_the_paper_suite_runs_the_available_tasks(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "task").rename(tmp_path / "wds_vtab-cifar10")
    options = ("--root", str(tmp_path), "--model", f"student={tmp_path / 'good'}", "-o", str(tmp_path / "report"))
    assert run("benchmark", "paper", *options) == 0
    out, err = capsys.readouterr()
    assert "Cifar10" in out
    assert err.count(" is missing: ") == 13
    assert f"imagenet1k is missing: {tmp_path} has no folder imagenet1k" in err
    assert "**flickr30k** is missing" in (tmp_path / "report" / "report.md").read_text()


def test_the_paper_suite_needs_a_model(run: Any, tmp_path: Path, capsys: Any) -> None:
    assert run("benchmark", "paper", "--root", str(tmp_path), "-o", str(tmp_path / "report")) == 2
    assert "hint: name some: --model student=" in capsys.readouterr().err


def test_the_same_command_resumes_an_interrupted_run(run: Any, suite: Path, tmp_path: Path, monkeypatch: Any) -> None:
    output = tmp_path / "report"
    with monkeypatch.context() as patch:
        patch.setattr("clip_rd_edge.benchmarking.run.measure_latencies", interrupt)
        assert run("benchmark", str(suite), "-o", str(output)) == 130
    assert [path.name for path in output.iterdir()] == ["parts"]
    embedded: list[int] = []
    monkeypatch.setattr(AlwaysWhite, "encode_texts", lambda self, texts: embedded.append(len(texts)))
    assert run("benchmark", str(suite), "-o", str(output)) == 0
    assert embedded == []
    assert (output / "results.json").is_file()
    assert not (output / "parts").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux alone")
def test_what_was_measured_in_a_folder_whose_name_is_not_utf_8_is_written(
    run: Any, suite: Path, tmp_path: Path, capfdbinary: Any
) -> None:
    root = tmp_path / os.fsdecode(b"caf\xe9")
    (tmp_path / "task").rename(root)
    suite.write_text(suite.read_text().replace("[task]", "[.]"))
    assert run("benchmark", str(suite), "--root", str(root), "-o", str(tmp_path / "report")) == 0
    for name in ("report.md", "report.html"):
        assert r"caf\udce9" in (tmp_path / "report" / name).read_text()
    assert (
        json.loads((tmp_path / "report" / "results.json").read_text())["rows"][0]["scores"][0]["task"] == r"caf\udce9"
    )
    capfdbinary.readouterr()
    assert run("evaluate", str(tmp_path / "good"), "--task", str(root), "--json") == 0
    assert json.loads(capfdbinary.readouterr().out)["scores"][0]["task"] == r"caf\udce9"


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_two_runs_cannot_write_to_one_folder(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    with exclusive_writer(tmp_path / "report"):
        assert run("benchmark", str(suite), "-o", str(tmp_path / "report")) == 2
    assert "report is being written by another run, process " in capsys.readouterr().err
    assert run.opened == []


def test_a_model_named_on_the_command_line_is_not_skipped(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    options = ("--model", "student=nowhere", "-o", str(tmp_path / "report"))
    assert run("benchmark", str(suite), *options) == 2
    assert capsys.readouterr().err == "· starting benchmark\nerror: There is no model folder nowhere.\n"
    assert not (tmp_path / "report").exists()


def test_compare_reports_changes(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "report"
    assert run("benchmark", str(suite), "-o", str(output)) == 0
    path = output / "results.json"
    quiet = json.loads(path.read_text()) | {"other_load": 0.0}  # other processes may run during this test
    quiet["reference"] = {timed: [1.0] * len(blocks) for timed, blocks in quiet["reference"].items()}
    for timed in ("image", "text", "end_to_end"):
        latency = quiet["rows"][0]["latency"][timed]
        latency["blocks"] = [1.0] * len(latency["blocks"])
    path.write_text(json.dumps(quiet))
    capsys.readouterr()
    assert run("benchmark", "--compare", str(output), str(path)) == 0
    assert capsys.readouterr().out.endswith("No regression.\n")
    slow = json.loads(path.read_text())
    slow["rows"][0]["latency"]["text"]["blocks"] = [1e3] * len(slow["reference"]["text"])
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    assert run("benchmark", "--compare", str(path), str(tmp_path / "slow.json")) == 1
    out = capsys.readouterr().out
    assert re.search(r"Good, text tower .* regression *\n", out)
    assert out.endswith("1 regression.\n")
    assert run("benchmark", "--compare", str(path), str(tmp_path / "slow.json"), "--json") == 1
    assert json.loads(capsys.readouterr().out)["regressions"] == 1
    path.write_text(json.dumps(quiet | {"other_load": 0.9}))
    assert run("benchmark", "--compare", str(path), str(path)) == 3
    assert capsys.readouterr().out.endswith("No regression in accuracy; not compared: latencies.\n")
    assert run("benchmark", "--compare", str(path), str(path), "--allow-busy") == 0
    capsys.readouterr()
    assert run("benchmark", str(output), "--min-accuracy", "0") == 0  # from the finished report
    assert capsys.readouterr().out.startswith("For at least 0.0 % top-1")
    assert run("benchmark", str(output), "--budget-ms", "1e6") == 0
    out = capsys.readouterr().out
    assert out.startswith("For at most 1e+06 ms from image file to answer")
    assert "The machine was busy" in out


def test_accuracies_that_cannot_be_compared_do_not_pass(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "report"
    assert run("benchmark", str(suite), "-o", str(output)) == 0
    old = json.loads((output / "results.json").read_text()) | {"other_load": 0.9}
    for name, key, changes, code, last in (
        (
            "renewed",
            "correctness",
            {"images": "others"},
            3,
            "Nothing was compared.",
        ),
        ("lost", "scores", {"task": "another"}, 1, "1 regression."),
    ):
        new = json.loads(json.dumps(old))
        new["rows"][0][key][0] |= changes
        for stem, content in (("old", old), (name, new)):
            (tmp_path / f"{stem}.json").write_text(json.dumps(content))
        capsys.readouterr()
        comparison = ("--compare", str(tmp_path / "old.json"), str(tmp_path / f"{name}.json"))
        assert run("benchmark", *comparison, "--allow-busy") == code
        assert capsys.readouterr().out.endswith(f"{last}\n")


def test_compare_refuses_a_damaged_result(run: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "results.json").write_text("{")
    assert run("benchmark", "--compare", str(tmp_path), str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'results.json'} is not valid JSON")


def test_an_output_folder_is_required(run: Any, capsys: Any) -> None:
    assert run("benchmark", "quickstart") == 2
    assert capsys.readouterr().err.startswith("error: -o FOLDER is missing.")


def test_a_folder_called_parts_of_the_users_own_is_not_deleted(
    run: Any, suite: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "project"
    (output / "parts").mkdir(parents=True)
    (output / "parts" / "engine.step").write_text("mine")
    assert run("benchmark", str(suite), "-o", str(output)) == 2
    assert f"The output {output} already exists and is not empty." in capsys.readouterr().err
    assert run("benchmark", str(suite), "-o", str(output), "--force") == 0
    assert [path.name for path in (output / "parts").iterdir()] == ["engine.step"]
