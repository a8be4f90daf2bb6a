from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.errors import InputError
from clip_rd_edge.exporting import bundle as exporting
from clip_rd_edge.exporting import plan as targets
from clip_rd_edge.exporting.calibration import named_pairs
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.utils.paths import typed
from clip_rd_edge.utils.text import as_word

CommandLine = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tiny random student, whose recorded training pairs no longer exist."""
    folder = tmp_path_factory.mktemp("run")
    config = student_config("resnet10t", embedding_size=16, image_size=32, text="tiny", context_length=8)
    clip = build_student(config, name="tiny")
    save_clip(folder / "student", clip, provenance={"data": "gone.csv", "configuration": {"csv_img_key": "file"}})
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


@pytest.mark.slow
def test_int8_export_of_a_run_with_labels(
    run_folder: Path, pairs: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\n\n dog \n")
    bundle = tmp_path / "bundle"
    code, out, err = command_line(
        "export", run_folder, "--precision", "int8", "--calibration", pairs, "--labels", labels, "-o", bundle, "--json"
    )
    assert code == 0, err
    summary = json.loads(out)
    assert summary["bundle"] == str(bundle)
    assert {trial["tower"] for trial in summary["trials"]} == {"image", "text"}
    assert "INT8 trials, relative to float32" in err
    assert any(trial["name"].startswith("static, percentile") for trial in summary["trials"])
    manifest = read_manifest(bundle)
    assert manifest.precision == summary["precision"]
    assert manifest.provenance["model"] == str(run_folder)
    assert manifest.provenance["calibration"] == str(pairs)
    assert "labels.npz" in manifest.files
    code, out, err = command_line("verify", bundle)
    assert code == 0, err
    # The bundle's folder is in use now, and a bundle cannot be exported again.
    code, _, err = command_line("export", run_folder, "-o", bundle)
    assert (code, "--force" in err) == (2, True)
    code, _, err = command_line("export", bundle, "-o", tmp_path / "again")
    assert (code, "is already a bundle" in err) == (2, True)


def test_a_table_for_calibration_may_have_the_columns_of_the_training(
    run_folder: Path, pairs: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(pairs.read_text().replace("filepath,title", "file,title"))
    for table in (pairs, renamed):
        assert named_pairs(typed(table), str(run_folder)).read(3).captions == ("noise number 3",)
    with pytest.raises(InputError):
        named_pairs(typed(renamed), "ViT-B-32")


@pytest.mark.slow
def test_a_browser_page_is_exported_directly_from_a_run(
    run_folder: Path, node_modules: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    site = tmp_path / "site"
    code, out, err = command_line(
        "export", run_folder, "--target", "browser", "--node-modules", node_modules, "-o", site
    )
    assert (code, out) == (0, f"{site}\n"), err
    assert read_manifest(site / "bundle").provenance["model"] == str(run_folder)
    assert (site / "index.html").is_file()


def test_format_trt_alone_writes_the_folder_that_builds_its_engines_on_any_gpu(
    run_folder: Path, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "cuda_capability", lambda: "")
    code, out, err = command_line("export", run_folder, "--format", "trt", "-o", tmp_path / "bundle")
    assert (code, out) == (0, f"{tmp_path / 'bundle'}\n"), err
    assert "copy it there and run bash build.sh" in err
    script = tmp_path / "bundle" / "build.sh"
    assert script.is_file()
    assert f"next, on the device: bash {as_word(script)}; clip-rd-edge verify" in " ".join(err.split())
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.target == "tensorrt nvidia-gpu"
    assert "fp16" in manifest.precision


def test_several_targets_make_one_bundle_each_from_one_export_of_the_towers(
    run_folder: Path, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = []
    write_fp32 = exporting.write_fp32
    monkeypatch.setattr(exporting, "write_fp32", lambda *a, **k: exported.append(1) or write_fp32(*a, **k))
    output = tmp_path / "bundles"
    names = ("jetson-orin", "nvidia-gpu", "cpu-arm")
    arguments = ("--target", ",".join(names), "--precision", "fp16", "-o", output)
    code, out, err = command_line("export", run_folder, *arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["targets"].keys() == set(names) == {path.name for path in output.iterdir()}
    assert [read_manifest(output / name).target for name in names] == [
        "tensorrt jetson-orin",
        "tensorrt nvidia-gpu",
        "onnxruntime",
    ]
    assert read_manifest(output / "cpu-arm").provenance["device"] == "cpu-arm"
    assert "cpu-arm: image tower: " in err
    assert exported == [1]
    with pytest.raises(InputError) as raised:
        read_manifest(output)
    assert str(output / "jetson-orin") in raised.value.hint


def test_an_output_that_would_replace_what_is_read_is_refused(
    run_folder: Path, tmp_path: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for output in (run_folder, run_folder / "student", run_folder.parent):
        code, _, error = command_line("export", run_folder, "-o", output, "--force")
        assert code == 2
        assert f"The output {output} " in error
        assert "which it would replace" in error
    assert (run_folder / "student" / "open_clip_model.safetensors").is_file()
    monkeypatch.chdir(tmp_path)
    code, _, error = command_line("export", run_folder, "-o", ".")
    assert (code, "The output . is the working folder" in error) == (2, True)
