"""Bundles without a text tower: `export --no-text-tower`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import NOT_ADAPTED

import clip_rd_edge as edge
from clip_rd_edge.benchmarking.accuracy import zero_shot
from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.data.tasks import ZeroShotTask
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.models.clip import ClipModel, parameter_count
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle

LABELS = ("cat", "dog")
WITHOUT = Plan(labels=LABELS, text_tower=False, provenance={"model": "tiny"})


@pytest.fixture(scope="module")
def without_text(student: ClipModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's float32 bundle without its text tower."""
    bundle = tmp_path_factory.mktemp("without-text") / "bundle"
    export_bundle(student, bundle, WITHOUT)
    return bundle


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, ...]:
    rng = np.random.default_rng(0)
    paths = tuple(tmp_path / f"{number}.png" for number in range(6))
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path)
    return paths


def test_it_has_the_image_tower_and_the_labels_of_the_complete_bundle(
    student: ClipModel, fp32_bundle: Path, without_text: Path
) -> None:
    manifest, complete = read_manifest(without_text), load(fp32_bundle)
    assert set(manifest.files) == {"background.npz", "image.onnx", "labels.npz", "reference.npz"}
    assert (manifest.text, manifest.precision, manifest.format_version) == (None, "fp32", 2)
    assert manifest.parameters == parameter_count(student.model.visual) < complete.manifest.parameters
    assert manifest.files["image.onnx"] == complete.manifest.files["image.onnx"]
    bank = load(without_text).label_bank
    assert bank is not None
    assert bank.names == LABELS
    np.testing.assert_allclose(bank.embeddings, complete.encode_texts(LABELS), atol=1e-6)
    checks = verify_bundle(without_text)
    assert all(check.passed for check in checks)
    assert [check.what for check in checks if check.agreement] == ["image tower"]
    assert read_manifest(fp32_bundle).format_version == 1  # which readers of older versions still open


def test_conversions_convert_the_image_tower_alone(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    request = replace(WITHOUT, precision="int8", fallback="fp16", search_minutes=0, provenance=NOT_ADAPTED)
    converted = export_bundle(student, tmp_path / "a", request, samples=calibration, source=fp32_bundle)
    assert {trial.tower for trial in converted.trials} <= {"image"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "background.npz", "image.onnx", "labels.npz", "manifest.json", "reference.npz"
    }  # fmt: skip
    assert converted.manifest.precision == converted.manifest.image.precision.split()[0]
    assert all(check.passed for check in verify_bundle(tmp_path / "a"))
    bank = load(tmp_path / "a").label_bank
    assert bank is not None
    np.testing.assert_allclose(bank.embeddings, load(fp32_bundle).encode_texts(LABELS), atol=5e-4)


def test_it_classifies_among_its_own_labels_as_the_complete_bundle_does(
    fp32_bundle: Path, without_text: Path, images: tuple[Path, ...]
) -> None:
    model, complete = edge.load(without_text), edge.load(fp32_bundle)
    for labels in (None, ["dog", "cat"], ["dog"]):
        assert model.classify(list(images), labels) == complete.classify(list(images), labels)
    classifier = ZeroShotClassifier(model, ["dog"])  # a `Model`, too, is an encoder
    assert classifier.labels == ("dog",)
    task = ZeroShotTask(name="noise", images=images, labels=LABELS, targets=(0, 1, 0, 1, 0, 1), templates=("{}",))
    assert zero_shot(load(without_text), task) == zero_shot(load(fp32_bundle), task)


def test_other_texts_are_refused_in_one_sentence(
    student: ClipModel, without_text: Path, images: tuple[Path, ...], tmp_path: Path
) -> None:
    model = edge.load(without_text)
    with pytest.raises(InputError):
        model.classify(images[0], ["cat", "dogs"])
    with pytest.raises(UsageError):
        model.classify(images[0], ["cat"], templates="a {}")
    with pytest.raises(InputError):
        model.encode_texts("a cat")
    edge.index(without_text, images[0].parent, output=tmp_path / "index")
    assert edge.search(tmp_path / "index", images[0], bundle=without_text)[0].path == images[0]
    with pytest.raises(InputError):
        edge.search(tmp_path / "index", "a cat", bundle=without_text)
    export_bundle(student, tmp_path / "without-labels", Plan(text_tower=False))
    without_labels = edge.load(tmp_path / "without-labels")
    np.testing.assert_array_equal(without_labels.encode_images(images[0]), model.encode_images(images[0]))
    with pytest.raises(InputError):
        without_labels.classify(images[0], ["cat"])
