from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from clip_rd_edge.bundle.labels import read_labels
from clip_rd_edge.bundle.manifest import INSTRUCTION_SETS, read_manifest, write_manifest
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, InputError, UsageError
from clip_rd_edge.exporting.bundle import _finish, export_bundle, export_bundles
from clip_rd_edge.exporting.calibration import CalibrationSet, Samples
from clip_rd_edge.exporting.conversion import start_conversion
from clip_rd_edge.exporting.plan import ExportRequest
from clip_rd_edge.exporting.towers import export_image_tower, export_text_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.runtime.backends.onnxruntime import OrtEncoder
from clip_rd_edge.runtime.index import model_key
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle
from clip_rd_edge.utils.reporting import SILENT


def test_a_float32_bundle_gives_torchs_embeddings_of_images_and_texts(student: ClipModel, fp32_bundle: Path) -> None:
    encoder, torch_encoder = load(fp32_bundle), TorchEncoder(student)
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), Image.new("RGB", (20, 30), (200, 30, 30))]
    texts = ["a cat", "it's 2 dogs &amp; a house", "猫 👩‍🚀"]
    np.testing.assert_allclose(encoder.encode_images(images), torch_encoder.encode_images(images), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(texts), torch_encoder.encode_texts(texts), atol=1e-5)


def test_the_manifest_records_what_was_exported_and_measured(student: ClipModel, fp32_bundle: Path) -> None:
    manifest = read_manifest(fp32_bundle)
    assert manifest.name == "resnet10t"
    assert manifest.precision == manifest.image.precision == manifest.text.precision == "fp32"
    assert manifest.embedding_size == 32
    assert manifest.logit_scale == pytest.approx(student.logit_scale)
    assert manifest.preprocessing == student.preprocessing
    assert manifest.provenance == {"model": "tiny"}
    assert set(manifest.files) == {"image.onnx", "text.onnx", "tokenizer.json", "labels.npz", "reference.npz"}
    for tower in (manifest.image, manifest.text):
        assert tower.measured is not None
        assert tower.measured.latency_ms_p95 >= tower.measured.latency_ms_p50 > 0
        assert tower.measured.max_difference <= 1e-4
    assert all(check.passed for check in verify_bundle(fp32_bundle))


@pytest.mark.slow
def test_towers_above_2_gb_have_their_weights_in_a_file_of_their_own(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_rd_edge.exporting.towers.MAX_FILE_BYTES", 10_000)
    for export in (export_image_tower, export_text_tower):  # nothing that was exported as one file
        monkeypatch.setattr(f"clip_rd_edge.exporting.bundle.{export.__name__}", export)
    bundle = tmp_path / "large"
    export_bundle(student, bundle, ExportRequest())
    manifest = read_manifest(bundle)
    assert {"image.onnx.data", "text.onnx.data"} < set(manifest.files)
    assert (bundle / "text.onnx").stat().st_size < (bundle / "text.onnx.data").stat().st_size
    assert all(check.passed for check in verify_bundle(bundle))
    whole, pixels = load(fp32_bundle), np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(load(bundle).encode_pixels(pixels), whole.encode_pixels(pixels))
    assert load(bundle).text_key != whole.text_key
    assert model_key(manifest) != model_key(
        msgspec.structs.replace(manifest, files={**manifest.files, "image.onnx.data": "0"})
    )
    with pytest.raises(UsageError, match="GB of weights, and every conversion of float32 ONNX takes towers"):
        export_bundle(student, tmp_path / "fp16", ExportRequest(precision="fp16"), source=bundle)
    with pytest.raises(UsageError, match="preprocess_in_graph takes image towers of up to 2 GB"):
        export_bundle(student, tmp_path / "in-graph", ExportRequest(preprocess_in_graph=True))
    assert sorted(tmp_path.iterdir()) == [bundle]
    with (bundle / "image.onnx.data").open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(ConfigError, match=r"image\.onnx\.data has changed since the export"):
        load(bundle).encode_pixels(pixels)


@pytest.mark.slow
def test_the_manifest_counts_the_weights_of_merged_branches(
    make_student: Callable[..., ClipModel], tmp_path: Path
) -> None:
    export_bundle(make_student("mobileone_s0"), tmp_path / "bundle", ExportRequest())
    graphs = [onnx.load(tmp_path / "bundle" / name).graph for name in ("image.onnx", "text.onnx")]
    weights = sum(math.prod(tensor.dims) for graph in graphs for tensor in graph.initializer)
    assert read_manifest(tmp_path / "bundle").parameters == pytest.approx(weights, rel=0.02)


def test_the_label_bank_holds_the_text_towers_embeddings(fp32_bundle: Path) -> None:
    encoder = load(fp32_bundle)
    assert encoder.label_bank is not None
    assert encoder.label_bank.names == ("cat", "dog")
    np.testing.assert_allclose(encoder.label_bank.embeddings, encoder.encode_texts(["cat", "dog"]), atol=1e-6)


def test_a_label_bank_does_not_depend_on_a_processor_that_saturates_the_text_tower(
    fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, folder = load(fp32_bundle).encode_texts(["red", "blue"]), tmp_path / "bundle"
    shutil.copytree(fp32_bundle, folder)
    manifest = read_manifest(folder)
    text = msgspec.structs.replace(manifest.text, instruction_sets=("x86-64-vnni", "aarch64"))
    manifest = msgspec.structs.replace(manifest, text=text, templates=("{}",), files={})
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: True)
    encode = OrtEncoder.encode_ids
    monkeypatch.setattr(OrtEncoder, "encode_ids", lambda self, ids: encode(self, ids[::-1]))  # wrong answers
    _finish(folder, manifest, ExportRequest(labels=("red", "blue")), fp32_bundle, SILENT)
    bank = read_labels(folder)
    assert bank is not None
    np.testing.assert_allclose(bank.embeddings, expected, atol=1e-5)


def test_a_conversion_without_the_text_tower_takes_one_above_2_gb(fp32_bundle: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(fp32_bundle, tmp_path / "large"))
    (source / "text.onnx.data").write_bytes(b"weights")
    write_manifest(source, read_manifest(source))
    with pytest.raises(UsageError, match="GB of weights, and every conversion of float32 ONNX takes towers"):
        start_conversion(source, tmp_path, ExportRequest(precision="fp16"))
    assert start_conversion(source, tmp_path, ExportRequest(precision="fp16", text_tower=False)).text is None


def test_an_int8_bundle_is_smaller_runs_and_lists_its_trials(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    converted = export_bundle(
        student,
        tmp_path / "int8",
        ExportRequest(precision="int8", labels=("cat",), provenance={"model": "tiny"}),
        calibration=calibration,
        source=fp32_bundle,
    )
    manifest, trials = converted.manifest, converted.trials
    assert {trial.tower for trial in trials} == {"image", "text"}
    assert manifest == read_manifest(tmp_path / "int8")
    assert manifest.provenance == {"model": "tiny", "calibration": "noise"}
    for tower in (manifest.image, manifest.text):  # the choice depends on the machine, the note on the choice
        assert tower.measured is not None
        if tower.precision == "fp32":
            assert "none of" in tower.note
        else:
            assert tower.precision.startswith("int8 ")
            assert tower.instruction_sets in ((), INSTRUCTION_SETS)  # without a target: right on every processor
            assert tower.note == ""
            assert tower.measured.centred_cosine >= 0.99
            assert (tmp_path / "int8" / tower.file).stat().st_size < (fp32_bundle / tower.file).stat().st_size
    assert all(check.passed for check in verify_bundle(tmp_path / "int8"))


def test_an_interrupted_export_leaves_nothing(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: ClipModel, folder: Path) -> Path:
        (folder / "image.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_rd_edge.exporting.bundle.export_image_tower", interrupt)
    old = tmp_path / "out" / "bundle"
    shutil.copytree(fp32_bundle, old)
    for output in (tmp_path / "out" / "new", old):
        with pytest.raises(KeyboardInterrupt):
            export_bundle(student, output, ExportRequest(precision="fp32"), overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle"]
    assert all(check.passed for check in verify_bundle(old))  # the existing bundle is untouched


def test_int8_for_a_card_that_never_passes_the_check_of_its_engine_is_refused_before_anything_is_built(
    student: ClipModel, calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("clip_rd_edge.exporting.bundle.write_fp32")  # the first step of an export
    request = ExportRequest(format="trt", precision="int8", target="sm75")
    with pytest.raises(UsageError, match=r"does not compute the towers in INT8 on sm75 \(GeForce RTX 20, T4\)"):
        export_bundle(student, tmp_path / "bundle", request, calibration=calibration)
    with pytest.raises(UsageError, match="on sm75"):
        export_bundles(student, tmp_path / "bundles", {"a": request}, calibration=calibration)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", [(), ("red", " "), ("red", "\ud800"), ("red\0",), ("red", "a" * (1 << 26))])
def test_labels_that_cannot_be_stored_are_refused_before_anything_is_exported(
    student: ClipModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: tuple[str, ...]
) -> None:
    monkeypatch.delattr("clip_rd_edge.exporting.bundle.write_fp32")  # the first step of an export
    with pytest.raises(InputError):
        export_bundle(student, tmp_path / "bundle", ExportRequest(labels=labels))


def test_requests_that_cannot_be_met_are_refused(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="already exists"):
        export_bundle(student, fp32_bundle, ExportRequest(precision="fp32"))
    with pytest.raises(UsageError, match="INT8 needs a calibration set"):
        export_bundle(student, tmp_path / "a", ExportRequest(precision="int8"))
    other = Samples(calibration.held_out.pixels[:, :, :16, :16], calibration.held_out.ids)
    with pytest.raises(UsageError, match=r"images of size \(16, 16\) .* takes \(32, 32\) and 16"):
        export_bundle(
            student,
            tmp_path / "a",
            ExportRequest(precision="int8"),
            calibration=CalibrationSet("small", other, other),
            source=fp32_bundle,
        )
    assert not list(tmp_path.iterdir())


def test_int8_needs_different_captions_to_compare_the_text_tower_on(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    alike = Samples(calibration.held_out.pixels, np.repeat(calibration.held_out.ids[:1], 24, axis=0))
    with pytest.raises(UsageError, match="All captions from photos are alike"):
        export_bundle(
            student,
            tmp_path / "a",
            ExportRequest(precision="int8"),
            calibration=CalibrationSet("photos", calibration.calibrate, alike),
            source=fp32_bundle,
        )


def test_int8_needs_an_intact_float32_bundle(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(fp32_bundle, source)
    (source / "text.onnx").write_bytes(b"other")
    with pytest.raises(UsageError, match=r"damaged: text\.onnx"):
        export_bundle(student, tmp_path / "a", ExportRequest(precision="int8"), calibration=calibration, source=source)
    manifest = msgspec.structs.replace(read_manifest(source), precision="int8")
    (source / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(UsageError, match="is in int8"):
        export_bundle(student, tmp_path / "a", ExportRequest(precision="int8"), calibration=calibration, source=source)


def test_a_tokenizer_that_gives_other_ids_is_refused(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tower in ("image", "text"):
        monkeypatch.setattr(f"clip_rd_edge.exporting.bundle.export_{tower}_tower", lambda *_: None)
    monkeypatch.setattr("clip_rd_edge.bundle.tokenizer.clean_text", lambda text, _: text)
    with pytest.raises(ClipRdEdgeError, match="The exported tokenizer of resnet10t turns"):
        export_bundle(student, tmp_path / "a", ExportRequest(precision="fp32"))
