"""`evaluate` and `benchmark` with an encoder that is at hand."""

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
from support import CommandLine

from clip_rd_edge.bundle.encoder import Description
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.utils.outputs import exclusive_writer

SUITE = """
name: two
root: {root}
tasks: [task]
rounds: 2
rows:
  - {{label: Good, model: good, role: teacher}}
  - {{label: Gone, model: gone, role: student}}
"""


class BlackAndWhite:
    """An encoder that distinguishes black images and white ones."""

    def describe(self) -> Description:
        preprocessing = Preprocessing(size=(2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
        return Description(
            name="bw", runtime="numpy", precision="fp32", embedding_size=1, preprocessing=preprocessing, logit_scale=1
        )

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        return np.asarray([[1.0 if np.asarray(image).mean() > 127 else -1.0] for image in images], dtype=np.float32)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.asarray([[1.0 if "white" in text else -1.0] for text in texts], dtype=np.float32)

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        return np.ones((len(pixels), 1), dtype=np.float32)

    def tokenize(self, texts: list[str]) -> np.ndarray:
        return np.zeros((len(texts), 4), dtype=np.int64)

    def encode_ids(self, ids: np.ndarray) -> np.ndarray:
        return np.ones((len(ids), 1), dtype=np.float32)


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What was opened, and how; each is the encoder above."""
    opened: list[tuple[str, dict[str, Any]]] = []

    def open_encoder(spec: str, **options: Any) -> BlackAndWhite:
        opened.append((spec, options))
        return BlackAndWhite()

    for module in ("models", "measuring"):
        monkeypatch.setattr(f"clip_rd_edge.api.{module}.open_encoder", open_encoder)
    exit_at_once = [sys.executable, "-S", "-c", ""]  # in place of the process that times a cold start
    monkeypatch.setattr("clip_rd_edge.api.measuring.first_answer", lambda *_: exit_at_once)
    return opened


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task with two black images and a white one."""
    for name, colour in (("black/1", 0), ("black/2", 20), ("white/1", 255)):
        path = tmp_path / "task" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (colour,) * 3).save(path)
    return tmp_path / "task"


def test_scores_are_a_table_or_json(
    command_line: CommandLine, task: Path, opened: list[tuple[str, dict[str, Any]]]
) -> None:
    code, out, err = command_line("evaluate", "some/model", "--task", task, "--threads", "2")
    assert (code, err) == (0, "· starting evaluate\n")
    assert "43.9 to 100.0" in out
    ((spec, options),) = opened
    assert (spec, options["threads"], options["force"]) == ("some/model", 2, False)
    code, out, _ = command_line("evaluate", "m", "--task", task, "--json")
    (score,) = json.loads(out)["scores"]
    shown = [score[name] for name in ("kind", "images", "classes", "top1", "top5")]
    assert shown == ["zero-shot", 3, 2, 1.0, None]
    assert '"per_class"' not in out
    opened.clear()
    assert command_line("evaluate", "m", "--task", "emoji:unseen-styl")[0] == 2
    assert opened == []  # a mistyped name is reported at once


def test_accuracy_per_class_and_the_confusion_matrix(command_line: CommandLine, task: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255,) * 3).save(task / "black" / "3.png")  # taken for white
    (task / "grey").mkdir()
    confusion = tmp_path / "new folder" / "confusion.csv"
    command = ("evaluate", "m", "--task", task, "--confusion", confusion)
    assert command_line(*command, "--per-class")[0] == 0
    assert confusion.read_text() == (
        "task,class,predicted,images\ntask,black,black,2\ntask,black,white,1\ntask,white,white,1\n"
    )
    _, out, _ = command_line(*command, "--json")
    assert json.loads(out)["scores"][0]["per_class"][0] == {
        "label": "black", "images": 3, "recall": 2 / 3, "precision": 1.0, "predicted": {"black": 2, "white": 1},
    }  # fmt: skip
    (task / "classnames.txt").write_text("white\ngrey\nblack\n")  # the first and the last in the wrong order
    code, _, error = command_line(*command)
    assert (code, "names the folders: black → white, " in error) == (0, True)
    header, first, *_ = confusion.read_text().splitlines()
    assert (header, first.rpartition(",")[2]) == ("task,class,predicted,images,folder", "black")


def test_the_confusion_matrix_replaces_only_an_earlier_one_and_comes_last(
    command_line: CommandLine, task: Path, tmp_path: Path, opened: list[Any]
) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\na.jpg,a cat\n")
    command = ("evaluate", "m", "--task", task, "--confusion", table)
    assert command_line(*command)[0] == 2
    assert (table.read_text(), opened) == ("image,caption\na.jpg,a cat\n", [])
    table.unlink()
    for _ in range(2):
        assert command_line(*command)[0] == 0
    impossible = task / "black" / "1.png" / "confusion.csv"
    code, out, err = command_line("evaluate", "m", "--task", task, "--confusion", impossible)
    assert (code, "100.0" in out, "confusion.csv" in err) == (2, True, True)


@pytest.fixture
def suite(task: Path, tmp_path: Path) -> Path:
    """A suite with one existing and one missing model."""
    (tmp_path / "good").mkdir()
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.format(root=tmp_path))
    return path


def test_a_folder_in_use_is_refused_unless_forced(
    command_line: CommandLine, suite: Path, tmp_path: Path, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_rd_edge.benchmarking.report.draw", lambda *_, **__: b"a plot, in no time")
    report = tmp_path / "report"
    (report / "parts").mkdir(parents=True)
    (report / "parts" / "engine.step").write_text("mine")  # parts is also the name of what a benchmark keeps
    assert command_line("benchmark", suite, "-o", report)[0] == 2
    for name in ("report.html", "results.json"):
        (report / name).write_text("mine")
        code, _, err = command_line("benchmark", suite, "-o", report, "--force")
        assert (code, f"{name} is not replaced" in " ".join(err.split())) == (2, True)
        assert (report / name).read_text() == "mine"
        (report / name).unlink()
    with exclusive_writer(report):
        assert command_line("benchmark", suite, "-o", report, "--force")[0] == 2
    code, _, err = command_line("benchmark", suite, "--model", "student=nowhere", "-o", tmp_path / "other")
    assert (code, "error: There is no model folder nowhere." in err) == (2, True)  # it was named: it is not skipped
    assert opened == []
    for _ in range(2):
        assert command_line("benchmark", suite, "-o", report, "--force")[0] == 0
    assert [path.name for path in (report / "parts").iterdir()] == ["engine.step"]


@pytest.mark.parametrize("stage", ["run.measure_latencies", "report.write_report"])
def test_the_same_command_resumes_an_interrupted_run(
    command_line: CommandLine, suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "report"
    with monkeypatch.context() as patch:
        patch.setattr(f"clip_rd_edge.benchmarking.{stage}", interrupt)
        assert command_line("benchmark", suite, "-o", output)[0] == 130
    assert [path.name for path in output.iterdir()] == ["parts"]
    monkeypatch.setattr("clip_rd_edge.benchmarking.report.draw", lambda *_, **__: b"a plot, in no time")
    monkeypatch.setattr(BlackAndWhite, "encode_texts", lambda self, texts: pytest.fail("measured again"))
    assert command_line("benchmark", suite, "-o", output)[0] == 0
    assert (output / "results.json").is_file()
    assert not (output / "parts").exists()


def test_a_report_is_written_and_compared_with_others(
    command_line: CommandLine, suite: Path, tmp_path: Path, opened: list[Any]
) -> None:
    output, path = tmp_path / "report", tmp_path / "report" / "results.json"
    code, out, err = command_line("benchmark", suite, "-o", output)
    assert (code, "Good" in out, "100.0" in out) == (0, True, True)
    assert {path.name for path in output.iterdir()} == {"results.json", "report.html", "accuracy-latency.png"}
    assert f"Gone was skipped: There is no model folder {tmp_path / 'gone'}." in err
    assert opened == [(str(tmp_path / "good"), {"threads": 1})]
    quiet = json.loads(path.read_text()) | {"other_load": 0.0}  # other processes may run during this test
    quiet["reference"] = {timed: [1.0] * len(blocks) for timed, blocks in quiet["reference"].items()}
    for timed in ("image", "text", "end_to_end"):
        latency = quiet["rows"][0]["latency"][timed]
        latency["blocks"] = [1.0] * len(latency["blocks"])

    def saved(name: str, change: Callable[[dict[str, Any]], object] = lambda content: None) -> Path:
        content = json.loads(json.dumps(quiet))
        change(content)
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    def compared(new: Path, *options: str) -> tuple[int, str]:
        code, out, _ = command_line("benchmark", "--compare", saved("old.json"), new, *options)
        return code, out

    assert compared(saved("same.json"))[1].endswith("No regression.\n")
    count = len(quiet["reference"]["text"])
    slow = saved("slow.json", lambda each: each["rows"][0]["latency"]["text"].update(blocks=[1e3] * count))
    code, out = compared(slow)
    assert (code, out.endswith("1 regression.\n")) == (1, True)
    assert re.search(r"Good, text tower .* regression *\n", out)
    code, out = compared(slow, "--json")
    assert (code, json.loads(out)["regressions"]) == (1, 1)
    busy = saved("busy.json", lambda each: each.update(other_load=0.9))
    assert compared(busy) == (3, compared(busy)[1])
    assert compared(busy)[1].endswith("No regression; not compared: latencies.\n")
    assert compared(busy, "--allow-busy")[0] == 0
    renewed = saved("renewed.json", lambda each: each["rows"][0]["correctness"][0].update(images="others"))
    assert compared(renewed, "--allow-busy")[0] == 3
    lost = saved("lost.json", lambda each: each["rows"][0]["scores"][0].update(task="another"))
    assert compared(lost, "--allow-busy")[0] == 1
    code, out, _ = command_line("benchmark", busy, "--budget-ms", "1e6")  # from a finished report
    assert (code, out.startswith("For at most 1e+06 ms from image file to answer")) == (0, True)
    assert "The machine was busy" in out
