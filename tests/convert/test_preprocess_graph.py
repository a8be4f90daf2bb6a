from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from clip_rd_edge.contract.bundle import read_manifest
from clip_rd_edge.contract.preprocess import Preprocessing, preprocess
from clip_rd_edge.convert.options import ExportRequest
from clip_rd_edge.convert.preprocess_graph import preprocessing_model
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporters.bundle import export_bundle
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle

_MEAN, _STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(autouse=True)
def columns_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """PIL's passes in the order that they had up to Pillow 12.

    Pillow 13 resizes some tall pictures by rows first. Between the passes it cuts to bytes what overshoots an edge, so
    that on hard edges the two orders differ by more than they differ from the graph.
    """
    original = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
        return original(original(image, (size[0], image.height), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", resize)


def _how(size: tuple[int, int], mode: str = "shortest", interpolation: str = "bicubic") -> Preprocessing:
    return Preprocessing(size=size, mean=_MEAN, std=_STD, resize_mode=mode, interpolation=interpolation, fill_color=7)  # type: ignore[arg-type]


def _pictures(count: int, largest: int) -> list[Image.Image]:
    """Pictures of odd sizes with hard edges and noise, larger and smaller than any model's input."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        height, width = rng.integers(5, largest, 2)
        rows, columns = np.mgrid[:height, :width]
        checks = 255 * ((rows // 7 + columns // 5) % 2)
        noise = rng.integers(0, 256, (height, width, 3))
        pixels = np.where(rng.random((height, width, 1)) < 0.3, noise, checks[..., None])
        pictures.append(Image.fromarray(pixels.astype(np.uint8)))
    return pictures


def _grey_levels_apart(how: Preprocessing, pictures: list[Image.Image]) -> float:
    model = preprocessing_model(how)
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model.SerializeToString(), threads=1)
    worst = 0.0
    for picture in pictures:
        (found,) = session.run(None, {"picture": np.asarray(picture)[None]})
        assert found.shape == (1, 3, *how.size)
        apart = (found[0] - preprocess(picture, how)) * np.asarray(how.std)[:, None, None] * 255
        worst = max(worst, float(np.abs(apart).max()))
    return worst


@pytest.mark.parametrize(
    "how",
    [
        _how((224, 224)),
        _how((64, 64), interpolation="bilinear"),
        _how((48, 64)),
        _how((64, 64), "longest"),
        _how((64, 48), "squash"),
    ],
    ids=lambda how: f"{how.resize_mode} {how.size[0]}x{how.size[1]} {how.interpolation}",
)
def test_it_is_within_one_grey_level_of_pil(how: Preprocessing) -> None:
    assert _grey_levels_apart(how, _pictures(12, 300)) <= 1.001


@pytest.mark.slow
def test_it_is_within_one_grey_level_of_pil_on_a_hundred_pictures() -> None:
    large = [picture.resize((3001, 1999), Image.Resampling.NEAREST) for picture in _pictures(2, 300)]
    assert _grey_levels_apart(_how((224, 224)), [*_pictures(98, 900), *large]) <= 1.001


def test_a_bundle_with_it_takes_pictures_of_any_size(student: ClipModel, fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export_bundle(
        student, bundle, ExportRequest(precision="fp16", preprocess_in_graph=True, labels=("cat",)), source=fp32_bundle
    )
    manifest = read_manifest(bundle)
    assert (manifest.image.preprocesses, manifest.image.input_name) == (True, "picture")
    (given,) = onnx.load(bundle / "image.onnx").graph.input
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    ours, plain = load(bundle), load(fp32_bundle)
    pictures = _pictures(6, 90)
    np.testing.assert_allclose(ours.encode_images(pictures), plain.encode_images(pictures), atol=0.01)
    # Who has preprocessed already, as the index and the benchmark do, gets the same.
    pixels = np.stack([preprocess(picture, manifest.preprocessing) for picture in pictures])
    np.testing.assert_allclose(ours.encode_pixels(pixels), plain.encode_pixels(pixels), atol=2e-3)
    assert all(check.passed for check in verify_bundle(bundle))


def test_engines_do_not_take_it(student: ClipModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="TensorRT takes no pictures"):
        export_bundle(
            student,
            tmp_path / "b",
            ExportRequest(precision="fp16", format="trt", target="sm86", preprocess_in_graph=True),
        )
