from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from support import NOT_ADAPTED

from clip_rd_edge.bundle.labels import read_labels
from clip_rd_edge.bundle.manifest import INSTRUCTION_SETS, read_manifest, write_manifest
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, UsageError
from clip_rd_edge.exporting.bundle import _write_bundle, export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats import Job
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.exporting.towers import export_image_tower, export_text_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.runtime.backends.onnxruntime import OrtEncoder
from clip_rd_edge.runtime.index import model_key
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle


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
    assert set(manifest.files) == {
        "image.onnx", "text.onnx", "tokenizer.json", "labels.npz", "background.npz", "reference.npz"
    }  # fmt: skip
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
    export_bundle(student, bundle, Plan())
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
    with pytest.raises(UsageError):
        export_bundle(student, tmp_path / "fp16", Plan(precision="fp16"), source=bundle)
    with pytest.raises(UsageError):
        export_bundle(student, tmp_path / "in-graph", Plan(preprocess_in_graph=True))
    assert sorted(tmp_path.iterdir()) == [bundle]
    with (bundle / "image.onnx.data").open("r+b") as file:
        file.write(b"damage")
    with pytest.raises(ConfigError, match=r"image\.onnx\.data has changed since the export"):
        load(bundle).encode_pixels(pixels)


def test_an_int8_bundle_is_smaller_runs_and_lists_its_trials(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    converted = export_bundle(
        student,
        tmp_path / "int8",
        Plan(precision="int8", labels=("cat",), provenance=NOT_ADAPTED, search_minutes=0),
        samples=calibration,
        source=fp32_bundle,
    )
    manifest, trials = converted.manifest, converted.trials
    assert {trial.tower for trial in trials} == {"image", "text"}
    assert manifest == read_manifest(tmp_path / "int8")
    assert manifest.provenance == {**NOT_ADAPTED, "calibration": "noise"}
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


def test_a_tokenizer_that_gives_other_ids_is_refused(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tower in ("image", "text"):
        monkeypatch.setattr(f"clip_rd_edge.exporting.bundle.export_{tower}_tower", lambda *_: None)
    monkeypatch.setattr("clip_rd_edge.bundle.tokenizer.clean_text", lambda text, _: text)
    with pytest.raises(ClipRdEdgeError):
        export_bundle(student, tmp_path / "a", Plan(precision="fp32"))


def test_a_label_bank_does_not_depend_on_a_processor_that_saturates_the_text_tower(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, manifest = load(fp32_bundle).encode_texts(["red", "blue"]), read_manifest(fp32_bundle)
    text = msgspec.structs.replace(manifest.text, instruction_sets=("x86-64-vnni", "aarch64"))
    manifest = msgspec.structs.replace(manifest, text=text, templates=("{}",), files={})
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: True)
    encode = OrtEncoder.encode_ids
    monkeypatch.setattr(OrtEncoder, "encode_ids", lambda self, ids: encode(self, ids[::-1]))  # wrong answers
    plan = Plan(labels=("red", "blue"))
    _write_bundle(Job(plan=plan, clip=student, source=fp32_bundle, fp32=manifest, folder=tmp_path))
    bank = read_labels(tmp_path)
    assert bank is not None
    np.testing.assert_allclose(bank.embeddings, expected, atol=1e-5)


@pytest.mark.parametrize("damage", ["text.onnx", "precision", "text.onnx.data"])
def test_only_an_intact_float32_bundle_whose_towers_are_whole_is_converted(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path, damage: str
) -> None:
    source = shutil.copytree(fp32_bundle, tmp_path / "source")
    if damage == "precision":
        manifest = msgspec.structs.replace(read_manifest(source), precision="int8")
        (source / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    else:
        (source / damage).write_bytes(b"other")
    if damage.endswith(".data"):  # as of a tower above 2 GB
        write_manifest(source, read_manifest(source))
    with pytest.raises(UsageError):
        export_bundle(student, tmp_path / "a", Plan(precision="fp16"), source=source)
    assert not (tmp_path / "a").exists()
