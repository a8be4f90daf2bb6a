from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import CommandLine

from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.errors import InputError
from clip_rd_edge.exporting import bundle as exporting
from clip_rd_edge.exporting.calibration import named_pairs
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.utils.paths import typed


@pytest.fixture(scope="module")
def run_folder(student: ClipModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tiny random student, whose recorded training pairs no longer exist."""
    folder = tmp_path_factory.mktemp("run")
    save_clip(folder / "student", student, provenance={"data": "gone.csv", "configuration": {"csv_img_key": "file"}})
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A CSV of 36 noise images with captions."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(36):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
        rows.append((path, f"noise number {i}"))
    table = tmp_path / "pairs.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return table


def test_a_table_for_calibration_may_have_the_columns_of_the_training(
    run_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(pairs.read_text().replace("filepath,title", "file,title"))
    for table in (pairs, renamed):
        assert named_pairs(typed(table), str(run_folder)).read(3).captions == ("noise number 3",)
    with pytest.raises(InputError):
        named_pairs(typed(renamed), "ViT-B-32")


def test_several_targets_make_one_bundle_each_from_one_export_of_the_towers(
    run_folder: Path, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = []
    write_fp32 = exporting.write_fp32
    monkeypatch.setattr(exporting, "write_fp32", lambda *a, **k: exported.append(1) or write_fp32(*a, **k))
    output = tmp_path / "bundles"
    names = ("jetson-orin", "cpu-arm")
    arguments = ("--target", ",".join(names), "--precision", "fp16", "-o", output)
    code, out, err = command_line("export", run_folder, *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["targets"].keys() == set(names) == {path.name for path in output.iterdir()}
    assert [read_manifest(output / name).target for name in names] == [
        "tensorrt jetson-orin",
        "onnxruntime",
    ]
    assert read_manifest(output / "cpu-arm").provenance["device"] == "cpu-arm"
    assert "cpu-arm: image tower: " in err
    assert exported == [1]
    with pytest.raises(InputError) as raised:
        read_manifest(output)
    assert str(output / "jetson-orin") in raised.value.hint


def test_an_output_that_would_replace_what_is_read_is_refused(run_folder: Path, command_line: CommandLine) -> None:
    for output in (run_folder, run_folder / "student", run_folder.parent):
        code, _, error = command_line("export", run_folder, "-o", output, "--force")
        assert code == 2
        assert f"The output {output} " in error
        assert "which it would replace" in error
    assert (run_folder / "student" / "open_clip_model.safetensors").is_file()
