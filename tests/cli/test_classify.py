from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import CommandLine, rewrite

from clip_rd_edge.bundle.labels import LabelBank, write_labels
from clip_rd_edge.bundle.manifest import BACKGROUND
from clip_rd_edge.cli.output import json_line

LABELS = ("--labels", "red", "green", "blue", "yellow")


def test_a_broken_image_in_a_folder_is_reported_and_skipped(
    command_line: CommandLine, colour_bundle: Path, colour_images: Path
) -> None:
    (colour_images / "broken.png").write_bytes(b"not an image")
    code, output, error = command_line("classify", colour_bundle, colour_images, *LABELS, "--top", "1", "--json")
    assert code == 2
    labels = {
        Path(line["image"]).stem: line["predictions"][0]["label"] for line in map(json.loads, output.split("\n")[:-1])
    }
    assert labels == {name: name for name in ("red", "green", "blue", "yellow")}
    assert "broken.png" in error
    assert "1 image or folder could not be read; the others are classified." in error


def test_csv_output_and_images_without_a_likely_label(
    command_line: CommandLine, colour_bundle: Path, colour_images: Path
) -> None:
    grey = colour_images / 'a "grey", one.png'
    Image.new("RGB", (9, 9), (90, 90, 90)).save(grey)
    grey_nouns = np.full((4, 3), 3**-0.5, np.float32)
    write_labels(colour_bundle, LabelBank(tuple("abcd"), grey_nouns), name=BACKGROUND)
    rewrite(colour_bundle)
    arguments = (colour_images / "*.png", "--labels", "red", "green", "blue", "--none", "--top", 1, "--csv")
    code, output, _ = command_line("classify", colour_bundle, *arguments)
    assert code == 0
    rows = [(Path(row["image"]).name, row["rank"], row["label"]) for row in csv.DictReader(io.StringIO(output))]
    assert rows == [(grey.name, "1", ""), ("green.png", "1", "green"), ("red.png", "1", "red")]
    code, output, error = command_line("classify", colour_bundle, grey, "--labels", "red", "blue", "--none")
    assert output == f"{grey}\tnone of these\n"
    assert "--calibration" in error
    assert command_line("classify", colour_bundle, grey, "--refuse-known", "1", "--labels", "red")[0] == 2


def test_a_list_on_stdin_may_be_of_windows(
    command_line: CommandLine, colour_bundle: Path, colour_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"{colour_images / name}\r\n" for name in ("red.png", "blue.jpg"))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\ufeff{lines}"))
    code, output, error = command_line("classify", colour_bundle, "-", *LABELS)
    assert code == 0, error
    assert len(output.splitlines()) == 2


def test_frames_of_a_camera_are_classified(
    command_line: CommandLine, colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    monkeypatch.setattr("clip_rd_edge.runtime.camera.frames", lambda source: iter(frames))
    code, output, error = command_line("classify", colour_bundle, "--camera", "0", *LABELS, "--top", "1", "--json")
    assert code == 0
    lines = [json.loads(line) for line in output.splitlines()]
    assert [(line["image"], line["predictions"][0]["label"]) for line in lines] == [
        ("frame 1", "red"),
        ("frame 2", "blue"),
    ]
    assert error.startswith("2 frames in ")
    _, output, _ = command_line("classify", colour_bundle, "--camera", "0", *LABELS, "--top", "1", "--null")
    assert [record.split("\t")[0] for record in output.split("\0")] == ["frame 1", "frame 2", ""]
    assert "\n" not in output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes file names of any bytes")
def test_any_path_and_label_goes_through_stdin_and_stdout_unchanged(colour_bundle: Path, colour_images: Path) -> None:
    path = os.fsencode(colour_images) + b"/caf\xe9.png"
    (colour_images / "red.png").rename(os.fsdecode(path))
    command = [sys.executable, "-m", "clip_rd_edge", "classify", str(colour_bundle), "-", "--labels", "red", "猫"]
    locale = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "", "LC_CTYPE": "C.UTF-8"}  # as of Windows
    done = subprocess.run(
        command,
        input=path + "\nnaïve 猫.png\n".encode(),
        capture_output=True,
        env={**os.environ, **locale},
        check=False,
    )
    assert done.stdout.startswith(path + b"\tred ")
    assert "猫".encode() in done.stdout
    assert "naïve 猫.png" in done.stderr.decode()
    line = json_line({"image": os.fsdecode(path)})
    assert os.fsencode(json.loads(line.encode())["image"]) == path


def test_a_single_label_is_answered_with_a_warning_and_its_cosine_similarity(
    command_line: CommandLine, colour_bundle: Path, colour_images: Path
) -> None:
    command = ("classify", colour_bundle, colour_images / "red.png", colour_images / "blue.jpg", "--labels", "red")
    code, output, error = command_line(*command)
    assert code == 0
    assert [line.split("\t")[1] for line in output.splitlines()] == [
        "red 100.0% (cosine 0.983)", "red 100.0% (cosine 0.134)",
    ]  # fmt: skip
    assert "the softmax over a single label is 100 % for every image" in error
    hint = error.partition("hint: ")[2]
    assert "--none" in hint
    _, output, _ = command_line(*command, "--json")
    assert [json.loads(line)["cosine"] > 0.5 for line in output.splitlines()] == [True, False]


@pytest.mark.parametrize("following", [("--refuse-known", "0.5"), ("--refuse-known=0.5",), ("--json",), ("-0",)])
def test_an_option_is_not_taken_as_a_label(
    command_line: CommandLine, colour_bundle: Path, colour_images: Path, following: tuple[str, ...]
) -> None:
    code, output, error = command_line("classify", colour_bundle, colour_images, "--labels", *following)
    assert (code, output) == (2, "")
    assert error.startswith("error: Option '--labels' requires an argument.")
    code, output, _ = command_line("classify", colour_bundle, colour_images / "red.png", "--labels", "-1", "red")
    assert code == 0
    assert "\tred " in output


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_a_newline_in_a_file_name_breaks_no_line_and_null_passes_it_on(
    command_line: CommandLine, colour_bundle: Path, colour_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = colour_images / "a\nred\tone\n"
    (colour_images / "red.png").rename(odd)
    labels = ("--labels", "red", "blue", "--top", "1")
    _, output, _ = command_line("classify", colour_bundle, odd, *labels)
    assert output.splitlines() == [rf"{colour_images}/a\nred\tone\n" + "\tred 100.0%"]
    broken = colour_images / "not\nan.png"
    broken.write_text("x")
    _, _, error = command_line("classify", colour_bundle, odd, broken, *labels)
    assert r"not\nan.png" in error
    _, _, error = command_line("classify", colour_bundle, broken, *labels)
    assert r"not\nan.png" in error
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{odd}\0{colour_images / 'blue.jpg'}\0"))
    code, output, _ = command_line("classify", colour_bundle, "-", *labels, "--null")
    assert code == 0
    assert [record.rpartition("\t")[0] for record in output.split("\0")[:-1]] == [str(odd), f"{colour_images}/blue.jpg"]
