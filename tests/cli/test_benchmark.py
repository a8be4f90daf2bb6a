from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.cli import main as cli_main
from clip_rd_edge.contract.encoder import Description
from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.utils.lock import only_writer

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


class Grey:
    """Says white to everything."""

    def describe(self) -> Description:
        preprocessing = Preprocessing(size=(2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
        return Description(
            name="grey", runtime="numpy", precision="fp32", embedding_size=1, preprocessing=preprocessing, logit_scale=1
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
    """Runs the command line as a user does; returns its exit code."""
    opened: list[tuple[str, dict[str, Any]]] = []

    def open_encoder(spec: str, **options: Any) -> Grey:
        opened.append((spec, options))
        return Grey()

    monkeypatch.setattr("clip_rd_edge.api.open_encoder", open_encoder)

    ends = [sys.executable, "-S", "-c", ""]  # what would answer once for a cold start
    monkeypatch.setattr("clip_rd_edge.api.first_answer", lambda *_: ends)

    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["clip-rd-edge", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli_main.main()
        return int(caught.value.code or 0)

    call.opened = opened  # type: ignore[attr-defined]
    return call


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite with a model that is there and one that is not."""
    (tmp_path / "good").mkdir()
    for name, colour in (("black", 0), ("white", 255)):
        (tmp_path / "task" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (colour,) * 3).save(tmp_path / "task" / name / "1.png")
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.format(root=tmp_path))
    return path


def test_report_and_table(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
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


def test_a_full_folder_is_refused_unless_forced(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    assert run("benchmark", str(suite), "-o", str(tmp_path / "report")) == 2
    assert "exists already and is not empty" in capsys.readouterr().err
    assert run.opened == []
    assert run("benchmark", str(suite), "-o", str(tmp_path / "report"), "--force") == 0
    assert (tmp_path / "report" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tasks: [task]", "tasks: [emoji:unseen-stile]", "There is no task 'emoji:unseen-stile'"),
        ("rounds:", "round:", "unknown field `round`. Did you mean 'rounds'"),
        ("rows:", "rows: [", "is not valid YAML"),
    ],
)
def test_misuse_is_one_sentence_and_exit_code_2(
    run: Any, suite: Path, tmp_path: Path, capsys: Any, old: str, new: str, message: str
) -> None:
    suite.write_text(suite.read_text().replace(old, new))
    assert run("benchmark", str(suite), "-o", str(tmp_path / "report")) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert out == ""
    assert run.opened == []
    assert not (tmp_path / "report").exists()


def test_a_suite_that_is_not_there(run: Any, tmp_path: Path, capsys: Any) -> None:
    assert run("benchmark", "nowhere.yaml", "-o", str(tmp_path / "report")) == 2
    assert "There is no suite 'nowhere.yaml': neither a file nor one of" in capsys.readouterr().err


def test_the_papers_tasks_as_far_as_they_are_here(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "task").rename(tmp_path / "wds_vtab-cifar10")
    options = ("--root", str(tmp_path), "--model", f"student={tmp_path / 'good'}", "-o", str(tmp_path / "report"))
    assert run("benchmark", "paper", *options) == 0
    out, err = capsys.readouterr()
    assert "Cifar10" in out
    assert err.count(" is missing: ") == 13
    assert f"imagenet1k is missing: {tmp_path} has no folder imagenet1k" in err
    assert "**flickr30k** is missing" in (tmp_path / "report" / "report.md").read_text()


def test_the_papers_suite_needs_a_model(run: Any, tmp_path: Path, capsys: Any) -> None:
    assert run("benchmark", "paper", "--root", str(tmp_path), "-o", str(tmp_path / "report")) == 2
    assert "hint: name some: --model student=" in capsys.readouterr().err


def test_interrupted_it_goes_on_by_the_same_command(run: Any, suite: Path, tmp_path: Path, monkeypatch: Any) -> None:
    output = tmp_path / "report"
    with monkeypatch.context() as patched:
        patched.setattr("clip_rd_edge.benchmarking.run.measure_latencies", interrupt)
        assert run("benchmark", str(suite), "-o", str(output)) == 130
    assert [path.name for path in output.iterdir()] == ["parts"]
    embedded: list[int] = []
    monkeypatch.setattr(Grey, "encode_texts", lambda self, texts: embedded.append(len(texts)))
    assert run("benchmark", str(suite), "-o", str(output)) == 0
    assert embedded == []
    assert (output / "results.json").is_file()
    assert not (output / "parts").exists()


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_two_runs_in_one_folder(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    with only_writer(tmp_path / "report"):
        assert run("benchmark", str(suite), "-o", str(tmp_path / "report")) == 2
    assert "report is being written by another run, process " in capsys.readouterr().err
    assert run.opened == []


def test_a_model_named_on_the_command_line_is_not_skipped(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    options = ("--model", "student=nowhere", "-o", str(tmp_path / "report"))
    assert run("benchmark", str(suite), *options) == 2
    assert capsys.readouterr().err == "error: There is no model folder nowhere.\n"
    assert not (tmp_path / "report").exists()


def test_compare_says_what_has_changed(run: Any, suite: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "report"
    assert run("benchmark", str(suite), "-o", str(output)) == 0
    path = output / "results.json"
    quiet = json.loads(path.read_text()) | {"other_load": 0.0}  # whatever else runs beside this test
    path.write_text(json.dumps(quiet))
    capsys.readouterr()
    assert run("benchmark", "--compare", str(output), str(path)) == 0
    assert capsys.readouterr().out.endswith("No regression.\n")
    slow = json.loads(path.read_text())
    slow["rows"][0]["latency"]["text"]["sittings"] = [1e3] * len(slow["reference"]["text"])
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    assert run("benchmark", "--compare", str(path), str(tmp_path / "slow.json")) == 1
    out = capsys.readouterr().out
    assert re.search(r"Good, text tower .* regression *\n", out)
    assert out.endswith("1 regression.\n")
    assert run("benchmark", "--compare", str(path), str(tmp_path / "slow.json"), "--json") == 1
    assert json.loads(capsys.readouterr().out)["regressions"] == 1


def test_compare_of_what_is_no_result(run: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "results.json").write_text("{")
    assert run("benchmark", "--compare", str(tmp_path), str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'results.json'} is not valid JSON")


def test_neither_suite_nor_comparison(run: Any, capsys: Any) -> None:
    assert run("benchmark", "quickstart") == 2
    assert capsys.readouterr().err.startswith("error: -o FOLDER is missing.")
