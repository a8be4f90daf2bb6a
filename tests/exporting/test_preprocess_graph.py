from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image
from support import onnx_model

from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.graph import with_preprocessing
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle

_MEAN, _STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(autouse=True)
def columns_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make PIL resize columns first, as up to Pillow 12.

    Pillow 13 resizes some tall images by rows first. Between the passes it clips overshoot to bytes, so on hard edges
    the two orders differ by more than PIL differs from the graph.
    """
    original = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], resample: int, box: Any = None) -> Image.Image:
        left, top, right, bottom = box or (0, 0, *image.size)
        columns = original(image, (size[0], image.height), resample, (left, 0, right, image.height))
        return original(columns, size, resample, (0, top, size[0], bottom))

    monkeypatch.setattr(Image.Image, "resize", resize)


def _preprocessing(size: tuple[int, int], mode: str = "shortest", interpolation: str = "bicubic") -> Preprocessing:
    return Preprocessing(
        size=size,
        mean=_MEAN,
        std=_STD,
        resize_mode=mode,  # type: ignore[arg-type]
        interpolation=interpolation,  # type: ignore[arg-type]
        fill_color=7,
    )


def _images(count: int, max_edge: int) -> list[Image.Image]:
    """Images of odd sizes with hard edges and noise, larger and smaller than any model's input."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        height, width = rng.integers(5, max_edge, 2)
        rows, columns = np.mgrid[:height, :width]
        checkerboard = 255 * ((rows // 7 + columns // 5) % 2)
        noise = rng.integers(0, 256, (height, width, 3))
        pixels = np.where(rng.random((height, width, 1)) < 0.3, noise, checkerboard[..., None])
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    return images


def _identity(size: tuple[int, int]) -> onnx.ModelProto:
    """A tower whose embeddings are the pixels."""
    shape = [1, 3, *size]
    return onnx_model([helper.make_node("Identity", ["pixels"], ["same"])], {"pixels": shape}, {"same": shape}, {})


def _max_difference(preprocessing: Preprocessing, images: list[Image.Image]) -> float:
    """Return the max difference between the graph and PIL, in grey levels."""
    model = with_preprocessing(_identity(preprocessing.size), preprocessing)
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString(), threads=1)
    difference = 0.0
    for image in images:
        (pixels,) = session.run(None, {"image": np.asarray(image)[None]})
        assert pixels.shape == (1, 3, *preprocessing.size)
        grey_levels = (
            (pixels[0] - preprocess(image, preprocessing)) * np.asarray(preprocessing.std)[:, None, None] * 255
        )
        difference = max(difference, float(np.abs(grey_levels).max()))
    return difference


@pytest.mark.parametrize(
    "preprocessing",
    [
        _preprocessing((224, 224)),
        _preprocessing((64, 64), interpolation="bilinear"),
        _preprocessing((48, 64)),
        _preprocessing((64, 64), "longest"),
        _preprocessing((64, 48), "squash"),
    ],
    ids=lambda p: f"{p.resize_mode} {p.size[0]}x{p.size[1]} {p.interpolation}",
)
def test_the_graph_is_within_one_grey_level_of_pil(preprocessing: Preprocessing) -> None:
    assert _max_difference(preprocessing, _images(12, 300)) <= 1.001


def test_a_bundle_with_preprocessing_takes_images_of_any_size(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(
        student, bundle, Plan(precision="fp16", preprocess_in_graph=True, labels=("cat",)), source=fp32_bundle
    )
    manifest = read_manifest(bundle)
    assert (manifest.image.preprocesses, manifest.image.input_name) == (True, "image")
    (graph_input,) = onnx.load(bundle / "image.onnx").graph.input
    assert graph_input.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    encoder, reference = load(bundle), load(fp32_bundle)
    images = _images(6, 90)
    np.testing.assert_allclose(encoder.encode_images(images), reference.encode_images(images), atol=0.01)
    # Pixels that are already preprocessed, as by the index and the benchmark, give the same embeddings.
    pixels = np.stack([preprocess(image, manifest.preprocessing) for image in images])
    np.testing.assert_allclose(encoder.encode_pixels(pixels), reference.encode_pixels(pixels), atol=2e-3)
    assert all(check.passed for check in verify_bundle(bundle))
