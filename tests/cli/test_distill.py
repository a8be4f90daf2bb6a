from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--student", "test_resnet", "--image-size", "48", "--text", "tiny", "--context-length", "12")


def test_a_run_on_a_csv_of_pairs(command_line: Run, pairs_csv: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("--data", pairs_csv, *SMALL, "--recipe", "clip", "--embedding-size", "16", "--batch-size", "6")
    code, output, _ = command_line("distill", *arguments, "--epochs", "1", "--precision", "fp32", "-o", run)
    assert code == 0
    assert output.strip() == str(run / "student")
    assert (run / "student" / "open_clip_model.safetensors").is_file()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1  # 4 steps: the last is logged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data", "nowhere.csv"), "data file nowhere.csv does not exist"),
        (("--csv-caption-key", "caption"), "no column 'caption'"),
        (("--student", "mobilevit_xx"), "Did you mean 'mobilevit_xxs'"),
        (("--recipe", "clip-rx"), "Did you mean 'clip-rd'"),
        (("--recipe", "clip-rd"), "needs a teacher"),
        (("--batch-size", "1"), "at least 2"),
        (("--batch-size", "100"), "has only 24 pairs"),
        (("--quantize", "int8"), "fine-tunes a trained student"),
        (("--recipe", "clip-rd", "--teacher", "ViT-B-61", "--teacher-pretrained", "openai"), "named 'ViT-B-61'"),
    ],
)
def test_invalid_input_is_reported_in_one_line_and_leaves_no_files(
    command_line: Run, pairs_csv: Path, tmp_path: Path, change: tuple[str, ...], message: str
) -> None:
    run = tmp_path / "run"
    arguments = ("--data", pairs_csv, *SMALL, "--recipe", "clip", "--batch-size", "6", "--steps", "1")
    code, _, error = command_line("distill", *arguments, *change, "-o", run)
    assert code == 2
    assert message in error
    assert error.startswith("· starting distill\nerror: ")
    assert error.count("\n") <= 3
    assert not run.exists()


def test_quantize_accepts_only_int8(command_line: Run, tmp_path: Path) -> None:
    arguments = ("--data", "emoji", "--student", "mobilevit_xxs", "--quantize", "int4", "-o", tmp_path / "run")
    code, _, error = command_line("distill", *arguments)
    assert (code, (tmp_path / "run").exists()) == (2, False)
    assert "'int4' is not 'int8'" in error


def test_a_folder_in_use_is_refused(command_line: Run, pairs_csv: Path, tmp_path: Path) -> None:
    code, _, error = command_line("distill", "--data", pairs_csv, *SMALL, "--recipe", "clip", "-o", tmp_path)
    assert code == 2
    assert "already exists and is not empty" in error


def test_a_run_on_shards_counts_bad_samples(
    command_line: Run, pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for i in range(12 * shard, 12 * shard + 12):
                archive.add(pairs_csv.parent / "pictures" / f"{i}.png", f"{i:04d}.png")
                (tmp_path / "caption.json").write_text(f'{{"captions": ["number {i}", "an image"]}}')
                archive.add(tmp_path / "caption.json", f"{i:04d}.json")
            archive.add(tmp_path / "caption.json", "alone.json")
    data = ("--data", f"{tmp_path}/0.tar::{tmp_path}/1.tar", "--train-data-upsampling-factors", "1::2")
    model = (*SMALL, "--recipe", "clip", "--embedding-size", "16", "--batch-size", "6", "--precision", "fp32")
    options = (*data, *model, "--json-caption-key", "captions", "--epochs", "1", "--workers", "0")
    code, _, error = command_line("distill", *options, "-o", tmp_path / "strict")
    assert code == 2
    assert "2 of 38 samples" in error
    assert "0.tar: alone has no image" in error
    assert not (tmp_path / "strict").exists()
    code, _, error = command_line("distill", *options, "--max-bad", "0.1", "-o", tmp_path / "run")
    assert code == 0
    assert "2 samples are not pairs and were skipped" in error
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert '"step":6' in line  # 12 + 2 · 12 pairs in batches of 6
    assert '"bad_samples":2' in line


def test_tasks_of_one_file_name_keep_their_own_figures(command_line: Run, pairs_csv: Path, tmp_path: Path) -> None:
    lines = pairs_csv.read_text().splitlines()
    for folder, count in (("a", 1), ("b", 20)):  # a single image is always found
        (pairs_csv.parent / folder).mkdir()
        rows = [f"../{line}" for line in lines[1 : count + 1]]
        (pairs_csv.parent / folder / "val.csv").write_text("\n".join([lines[0], *rows]))
    tasks = [argument for folder in "ab" for argument in ("--task", pairs_csv.parent / folder / "val.csv")]
    arguments = ("--data", pairs_csv, *SMALL, "--recipe", "clip", "--batch-size", "6", "--steps", "1")
    code, _, _ = command_line("distill", *arguments, *tasks, "--precision", "fp32", "-o", tmp_path / "run")
    assert code == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert line["evaluation/a/val.csv"] == 1.0
    assert line["evaluation/b/val.csv"] < 1.0
