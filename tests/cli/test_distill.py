from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_rd_edge.utils.text import as_word

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--student", "test_resnet", "--image-size", "48", "--text", "64x1", "--context-length", "12")


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


@pytest.fixture
def unpaired(pairs_csv: Path, tmp_path: Path) -> tuple[str | Path, ...]:
    """The options of a run on 24 images and a list of labels."""
    import torch

    from clip_rd_edge.models.load import save_clip
    from clip_rd_edge.models.students import build_student, student_config

    torch.manual_seed(1)
    config = student_config("test_resnet", embedding_size=16, image_size=48, text="tiny", context_length=12)
    save_clip(tmp_path / "teacher", build_student(config, name="teacher"), provenance={})
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\nyellow\n")
    data = ("--images", pairs_csv.parent / "pictures", "--texts", tmp_path / "labels.txt", "--template", "a {} picture")
    size = ("--batch-size", "6", "--steps", "2", "--precision", "fp32", "--workers", "0")
    return "--teacher", tmp_path / "teacher", *data, *SMALL, *size


def test_after_texts_alone_int8_is_advised_with_what_calibrates_it(
    command_line: Run, unpaired: tuple[str | Path, ...], tmp_path: Path
) -> None:
    options = dict(zip(unpaired[::2], unpaired[1::2], strict=True))
    without_images = [part for name, value in options.items() if name != "--images" for part in (name, value)]
    size = ("--batch-size", "4")
    code, _, error = command_line("distill", *without_images, *size, "-o", tmp_path / "run")
    assert code == 0, error
    assert "--precision int8 --calibration pairs.csv -o" in error


def test_frames_and_a_list_of_labels_give_a_student_and_a_bundle(
    command_line: Run, unpaired: tuple[str | Path, ...], pairs_csv: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, output, error = command_line("distill", *unpaired, "-o", run)
    assert (code, output.strip()) == (0, str(run / "student"))
    assert "24 images without captions and 4 texts" in error
    assert "cannot tell how often the student is right" in error
    labels = ("--labels", tmp_path / "labels.txt")
    assert command_line("export", run, "-o", tmp_path / "bundle", "--precision", "fp32", *labels)[0] == 0
    image = pairs_csv.parent / "pictures" / "0.png"
    code, output, _ = command_line("classify", tmp_path / "bundle", image, "--json")
    assert code == 0
    assert json.loads(output.splitlines()[0])["predictions"][0]["label"] in {"red", "green", "blue", "yellow"}


def test_embeddings_of_frames_and_labels_are_computed_once(
    command_line: Run, unpaired: tuple[str | Path, ...], tmp_path: Path
) -> None:
    options = dict(zip(unpaired[::2], unpaired[1::2], strict=True))
    data = [part for name in ("--teacher", "--images", "--texts", "--template") for part in (name, options[name])]
    cache = tmp_path / "cache"
    code, output, error = command_line("embed", *data, "--views", "2", "--workers", "0", "-o", cache)
    assert (code, output) == (0, f"{cache}\n")
    assert f"--store {as_word(cache)}" in error
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    code, _, _ = command_line("distill", *unpaired, "--store", cache, "--views", "2", "-o", tmp_path / "run")
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == written


@pytest.mark.parametrize(
    ("left_out", "added", "message"),
    [
        (("--images", "--texts", "--template"), (), "There are no training data"),
        (("--texts", "--template"), (), "There are images, but no captions to train on"),
        (
            ("--images", "--teacher"),
            ("--batch-size", "4", "--recipe", "clip"),
            "The recipe clip trains on images, of which there are none",
        ),
        (
            ("--images",),
            ("--batch-size", "4", "--store", "c", "--views", "2"),
            "There are texts alone, but a teacher's store",
        ),
        (("--texts",), (), "There are templates, but no texts to put into them"),
        ((), ("--images", "nowhere"), "nowhere does not exist"),
        ((), ("--texts", "nowhere.txt"), "Cannot read nowhere.txt"),
        ((), ("--template", "a picture"), "has no {} for the label's name"),
        ((), ("--batch-size", "25"), "has only 24 samples"),
        (("--teacher",), ("--recipe", "clip"), "The recipe clip trains on pairs of images and captions alone"),
        ((), ("--train-data-upsampling-factors", "1::2"), "apply only to shards"),
    ],
)
def test_what_is_missing_without_pairs_is_said_in_one_line(
    command_line: Run,
    unpaired: tuple[str | Path, ...],
    tmp_path: Path,
    left_out: tuple[str, ...],
    added: tuple[str, ...],
    message: str,
) -> None:
    options = dict(zip(unpaired[::2], unpaired[1::2], strict=True))
    kept = [part for name, value in options.items() if name not in left_out for part in (name, value)]
    code, _, error = command_line("distill", *kept, *added, "-o", tmp_path / "run")
    assert (code, message in error) == (2, True), error
    assert error.startswith("· starting distill\nerror: ")
    assert not (tmp_path / "run").exists()
