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
from clip_rd_edge.exporting.plan import ResolvedTarget, read_target, require_precision, resolve_target, target_names
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
    with pytest.raises(InputError, match=r"renamed\.csv has no column 'filepath'") as refusal:
        named_pairs(typed(renamed), "ViT-B-32")
    assert refusal.value.hint.endswith(", or rename one to 'filepath'")  # alone where there is no such option


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


def test_a_target_sets_the_format_and_precision() -> None:
    assert resolve_target(None, format=None, precision=None) == ResolvedTarget("onnx", "fp32", None)
    assert resolve_target("cpu-x86", format=None, precision=None) == ResolvedTarget("onnx", "int8", None)
    assert resolve_target("cpu-arm", format=None, precision="fp32") == ResolvedTarget("onnx", "fp32", None, 8)
    # Only where no processor of the target saturates; a browser may run on any.
    with_8_bits = {name for name in target_names() if read_target(name).profile.weight_bits == 8}
    assert with_8_bits == {"cpu-arm", "android", "cpu-x86-vnni"}
    assert resolve_target("openvino", format=None, precision="bf16") == ResolvedTarget("openvino", "bf16", None)
    assert resolve_target("sm89", format="trt", precision=None) == ResolvedTarget("trt", "fp16", "sm89")
    assert resolve_target("jetson-orin", format=None, precision=None) == ResolvedTarget("trt", "fp16", "jetson-orin")
    assert resolve_target("nvidia-gpu", format=None, precision=None) == ResolvedTarget("trt", "fp16", "nvidia-gpu")


@pytest.mark.parametrize(
    ("capability", "jetson", "rtx", "target", "said"),
    [
        ("", "", True, "nvidia-gpu", "no NVIDIA GPU here: the folder builds its own engines on any; copy it there"),
        ("8.9", "", True, "sm89", "the engines are for the GPU here, sm89 (GeForce RTX 40"),
        ("8.9", "", False, "nvidia-gpu", "sm89: run the folder's build.sh or build.py next, which need TensorRT"),
        ("9.0", "", True, "nvidia-gpu", "the GPU here is sm90, for which TensorRT builds the engines"),
        ("", "jetson-orin", False, "jetson-orin", "for this Jetson Orin, compute capability 8.7"),
    ],
)
def test_engines_without_a_target_are_for_the_gpu_here_or_build_themselves(
    capability: str, jetson: str, rtx: bool, target: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "cuda_capability", lambda: capability)
    monkeypatch.setattr(targets, "jetson_name", lambda: jetson)
    monkeypatch.setattr(targets, "find_spec", lambda name: object() if rtx else None)
    resolved = resolve_target(None, format="trt", precision=None)
    assert (resolved.format, resolved.precision, resolved.engine_target) == ("trt", "fp16", target)
    assert said in resolved.note
    assert resolve_target(None, format="trt", precision="int8").precision == "int8"


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
    with pytest.raises(InputError, match="is not a bundle") as raised:
        read_manifest(output)
    assert str(output / "jetson-orin") in raised.value.hint
    for target, said in (
        ("cpu-x86,cpu-x86", "'cpu-x86' is named twice"),
        ("cpu-x86,browser", "The target browser cannot be exported for several targets at once"),
        ("cpu-x86,", "No target is named ''"),
        ("cpu-x86,sm99", "No target is named 'sm99'"),
    ):
        code, _, err = command_line("export", run_folder, "--target", target, "-o", tmp_path / "new")
        assert (code, said in err) == (2, True), err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [name for name in target_names() if name != "rtx"])
def test_every_device_supports_its_listed_precisions(name: str) -> None:
    profile = read_target(name).profile
    for precision in profile.precisions:
        require_precision(profile.format, precision)
        assert resolve_target(name, format=profile.format, precision=precision).precision == precision


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
