from __future__ import annotations

import json
import shutil
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

Run = Callable[..., int]


class BlackAndWhite:
    """An encoder that tells black images from white ones."""

    def describe(self) -> Description:
        preprocessing = Preprocessing(size=(2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
        return Description(
            name="bw", runtime="numpy", precision="fp32", embedding_size=1, preprocessing=preprocessing, logit_scale=1
        )

    def encode_images(self, images: list[Image.Image]) -> np.ndarray:
        return np.asarray([[1.0 if np.asarray(image).mean() > 127 else -1.0] for image in images], dtype=np.float32)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.asarray([[1.0 if "white" in text else -1.0] for text in texts], dtype=np.float32)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the command line and returns its exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["clip-rd-edge", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli_main.main()
        return int(caught.value.code or 0)

    return call


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task with two black images and a white one."""
    for name, colour in (("black/1", 0), ("black/2", 20), ("white/1", 255)):
        path = tmp_path / "task" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (colour,) * 3).save(path)
    return tmp_path / "task"


def test_the_table_is_printed_to_stdout(run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    opened: list[tuple[str, dict[str, Any]]] = []

    def open_encoder(spec: str, **options: Any) -> BlackAndWhite:
        opened.append((spec, options))
        return BlackAndWhite()

    monkeypatch.setattr("clip_rd_edge.api.models.open_encoder", open_encoder)
    assert run("evaluate", "some/model", "--task", str(task), "--threads", "2") == 0
    out, err = capsys.readouterr()
    assert "43.9 to 100.0" in out
    assert err == "· starting evaluate\n"
    assert opened == [
        ("some/model", {"pretrained": None, "threads": 2, "runtime": None, "device": "auto", "force": False})
    ]


def test_json_is_printed_to_stdout(run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("clip_rd_edge.api.models.open_encoder", lambda spec, **options: BlackAndWhite())
    assert run("evaluate", "m", "--task", str(task), "--json") == 0
    output = json.loads(capsys.readouterr().out)
    (score,) = output["scores"]
    assert (score["kind"], score["images"], score["classes"], score["top1"], score["top5"]) == (
        "zero-shot", 3, 2, 1.0, None,
    )  # fmt: skip
    assert output["model"]["name"] == "bw"


def test_an_unknown_task_is_refused_before_the_model_is_opened(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("clip_rd_edge.api.models.open_encoder", lambda spec, **options: pytest.fail("opened"))
    assert run("evaluate", "m", "--task", "emoji:unseen-styl") == 2
    assert "error: No task named 'emoji:unseen-styl'" in capsys.readouterr().err


def test_a_task_is_required(run: Run, capsys: Any) -> None:
    assert run("evaluate", "m") == 2
    assert "--task" in capsys.readouterr().err


def test_the_table_shows_which_templates_were_used(
    run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("clip_rd_edge.api.models.open_encoder", lambda spec, **options: BlackAndWhite())
    assert run("evaluate", "m", "--task", str(task)) == 0
    output = capsys.readouterr().out
    assert "80, CLIP's for ImageNet" in output
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as if it were not installed
    assert run("evaluate", "m", "--task", str(task)) == 0
    assert capsys.readouterr().out == output
    assert run("evaluate", "m", "--task", str(task), "--template", "a {} square") == 0
    assert "a {} square" in capsys.readouterr().out
    assert run("evaluate", "m", "--task", str(task), "--template", "a {} square", "--template", "{}") == 0
    assert "2, given" in capsys.readouterr().out
    assert run("evaluate", "m", "--task", str(task), "--template", "a square") == 2
    error = capsys.readouterr().err
    assert "The template 'a square' has no {}" in error
    assert '--template "a square {}"' in error


def test_accuracy_per_class_and_the_confusion_matrix(
    run: Run, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("clip_rd_edge.api.models.open_encoder", lambda spec, **options: BlackAndWhite())
    Image.new("RGB", (4, 4), (255,) * 3).save(task / "black" / "3.png")  # taken for white
    (task / "grey").mkdir()
    confusion = tmp_path / "new folder" / "confusion.csv"
    command = ("evaluate", "m", "--task", str(task), "--confusion", str(confusion))
    assert run(*command, "--per-class") == 0
    table = capsys.readouterr().out.partition("Recall")[2]
    black, white = (line.split() for line in table.splitlines() if "00" in line)
    assert black == ["black", "3", "66.7", "100.0", "white", "(1)"]
    assert white == ["white", "1", "100.0", "50.0"]
    assert confusion.read_text() == (
        "task,class,predicted,images\ntask,black,black,2\ntask,black,white,1\ntask,white,white,1\n"
    )
    assert run(*command, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["scores"][0]["per_class"]
    assert rows[0] == {
        "label": "black", "images": 3, "recall": 2 / 3, "precision": 1.0, "predicted": {"black": 2, "white": 1},
    }  # fmt: skip
    assert run("evaluate", "m", "--task", str(task), "--json") == 0
    assert '"per_class"' not in capsys.readouterr().out


def test_folders_are_shown_beside_the_names_that_a_file_gives_them(
    run: Run, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("clip_rd_edge.api.models.open_encoder", lambda spec, **options: BlackAndWhite())
    for name in ("xeric", "yellow"):
        shutil.copytree(task / "white", task / name)
    (task / "classnames.txt").write_text("white\nblack\na cat\na dog\n")  # the first two in the wrong order
    confusion = tmp_path / "confusion.csv"
    command = ("evaluate", "m", "--task", str(task), "--confusion", str(confusion))
    for _ in range(2):  # the second replaces it
        assert run(*command, "--per-class") == 0
    out, err = capsys.readouterr()
    said = "· task: classnames.txt names the folders: black → white, white → black, …, yellow → a dog\n"
    assert err.count(said) == 2
    row = next(line for line in out.splitlines() if line.strip().startswith("white "))
    assert row.split() == ["white", "black", "2", "0.0", "0.0", "black", "(2)"]
    header, first, *_ = confusion.read_text().splitlines()
    assert (header, first) == ("task,class,predicted,images,folder", "task,white,black,2,black")
    assert run(*command, "--json") == 0
    out, err = capsys.readouterr()
    assert [row["folder"] for row in json.loads(out)["scores"][0]["per_class"]] == ["black", "white", "xeric", "yellow"]
    assert said in err
    (task / "classnames.txt").write_text("black\nwhite\nxeric\nyellow\n")
    assert run(*command) == 0
    assert "names the folders" not in capsys.readouterr().err
    assert confusion.read_text().startswith("task,class,predicted,images\n")


def test_the_confusion_matrix_replaces_only_an_earlier_one(
    run: Run, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    opened = list[str]()
    monkeypatch.setattr(
        "clip_rd_edge.api.models.open_encoder", lambda spec, **options: opened.append(spec) or BlackAndWhite()
    )
    table = tmp_path / "pairs.csv"
    table.write_text("image,caption\na.jpg,a cat\n")
    command = ("evaluate", "m", "--task", str(task), "--confusion", str(table))
    assert run(*command) == 2
    assert "pairs.csv is not replaced: it exists, and is not an earlier table" in capsys.readouterr().err
    assert (table.read_text(), opened) == ("image,caption\na.jpg,a cat\n", [])
    table.unlink()
    for _ in range(2):
        assert run(*command) == 0


def test_the_scores_are_printed_even_if_the_confusion_matrix_cannot_be_written(
    run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("clip_rd_edge.api.models.open_encoder", lambda spec, **options: BlackAndWhite())
    impossible = str(task / "black" / "1.png" / "confusion.csv")
    for option in ("--json", "--per-class"):
        assert run("evaluate", "m", "--task", str(task), "--confusion", impossible, option) == 2
        out, err = capsys.readouterr()
        assert "100.0" in out or '"top1": 1.0' in out
        assert "confusion.csv" in err
