"""The commands that make models, and what the quickstart says at its end."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from support import CommandLine, save_tiny_teacher

from clip_rd_edge.benchmarking.suite import EXAMPLE, read_suite
from clip_rd_edge.cli import build as quickstart
from clip_rd_edge.cli import train
from clip_rd_edge.data.tasks import ZeroShotTask
from clip_rd_edge.distillation.config import load_recipe, recipe_names
from clip_rd_edge.utils.text import as_word

ROOT = Path(__file__).parents[2]
SMALL = ("--student", "test_resnet", "--image-size", "48", "--text", "64x1", "--context-length", "12")
FAST = ("--precision", "fp32", "--workers", "0")


def test_a_run_on_pairs_with_tasks_of_one_file_name(command_line: CommandLine, pairs_csv: Path, tmp_path: Path) -> None:
    lines = pairs_csv.read_text().splitlines()
    for folder, count in (("a", 1), ("b", 20)):  # a single image is always found
        (pairs_csv.parent / folder).mkdir()
        rows = [f"../{line}" for line in lines[1 : count + 1]]
        (pairs_csv.parent / folder / "val.csv").write_text("\n".join([lines[0], *rows]))
    tasks = [argument for folder in "ab" for argument in ("--task", pairs_csv.parent / folder / "val.csv")]
    run = tmp_path / "run"
    arguments = ("--data", pairs_csv, *SMALL, *FAST, "--recipe", "clip", "--batch-size", "6", "--epochs", "1", *tasks)
    code, output, _ = command_line("distill", *arguments, "-o", run)
    assert (code, output.strip()) == (0, str(run / "student"))
    assert (run / "student" / "open_clip_model.safetensors").is_file()
    line = json.loads((run / "metrics.jsonl").read_text())  # of 4 steps, the last is logged
    assert line["evaluation/a/val.csv"] == 1.0
    assert line["evaluation/b/val.csv"] < 1.0
    code, _, error = command_line("distill", *arguments, "-o", pairs_csv.parent)
    assert (code, "already exists and is not empty" in error) == (2, True)


def test_frames_and_a_list_of_labels_give_a_student(command_line: CommandLine, pairs_csv: Path, tmp_path: Path) -> None:
    """From stored embeddings, which are computed once."""
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\nyellow\n")
    images, teacher = ("--images", pairs_csv.parent / "pictures"), save_tiny_teacher(tmp_path / "teacher")
    texts = ("--texts", tmp_path / "labels.txt", "--template", "a {} picture", "--teacher", teacher)
    store, run = tmp_path / "store", tmp_path / "run"
    code, output, error = command_line("embed", *images, *texts, "--views", "2", "--workers", "0", "-o", store)
    assert (code, output) == (0, f"{store}\n"), error
    assert f"--store {as_word(store)}" in error
    written = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    steps = (*SMALL, *FAST, "--steps", "2")
    options = (*images, *texts, *steps, "--batch-size", "6", "--store", store, "--views", "2")
    code, output, error = command_line("distill", *options, "-o", run)
    assert (code, output.strip()) == (0, str(run / "student")), error
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == written
    assert "24 images without captions and 4 texts" in error


@pytest.mark.parametrize("name", recipe_names())
def test_a_printed_recipe_is_the_recipe_with_a_comment_on_every_key(
    command_line: CommandLine, tmp_path: Path, name: str
) -> None:
    code, output, error = command_line("recipe", name)
    assert (code, error) == (0, "")
    (tmp_path / "mine.yaml").write_text(output)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe(name)
    lines = output.splitlines()
    keys = [i for i, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
    uncommented = [lines[i].split(":")[0] for i in keys if not lines[i - 1].lstrip().startswith("#")]
    assert uncommented == ["epsilon"]  # explained together with betas
    assert max(map(len, lines)) <= 80  # as many as a terminal has at least


def test_recipes_are_listed_and_a_printed_suite_can_be_read(command_line: CommandLine, tmp_path: Path) -> None:
    code, output, _ = command_line("recipe")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == recipe_names()
    assert max(map(len, output.splitlines())) <= 80
    code, output, error = command_line("benchmark", "--init")
    assert (code, error) == (0, "")
    (tmp_path / "suite.yaml").write_text(output)
    suite = read_suite(tmp_path / "suite.yaml")
    assert (suite.rows, suite.tasks) == (EXAMPLE.rows, EXAMPLE.tasks)


def unseen(*names: str) -> ZeroShotTask:
    """Two images of each concept, as in the two art styles."""
    images = tuple(Path(f"/emoji of mine/{style}/{name}.png") for name in names for style in ("a", "b"))
    return ZeroShotTask(
        name="unseen", images=images, targets=tuple(i // 2 for i in range(2 * len(names))), labels=names
    )


def test_the_quickstart_ends_with_commands_that_work_when_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "_unseen_concepts", lambda: unseen("arrow", "square", "circle", "line", "x"))
    shown = quickstart._next_steps(Path("my runs/quickstart")).replace("\\\n", " ")
    arguments = shlex.split(next(line for line in shown.splitlines() if " classify " in line))
    split = arguments.index("--labels")
    assert arguments[split - 2] == "my runs/quickstart/bundles/int8"
    labels = arguments[split + 1 :]
    assert labels == ["arrow", "square", "circle", "line"]
    assert Path(arguments[split - 1]).stem in labels
    example = re.sub(r"[\\\s]+", " ", f"clip-rd-edge {train.OWN_DATA_EXAMPLE}")
    for text in (train.distill.help or "", (ROOT / "docs" / "data.md").read_text()):
        assert example in re.sub(r"[\\\s]+", " ", text)
