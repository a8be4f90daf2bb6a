"""Reference answers, and what rounding does to them."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import onnx
import pytest

from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.bundle.reference import Reference, read_reference, worst_agreement
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.graph import IMAGE, prepare_for_quantization, with_preprocessing
from clip_rd_edge.exporting.int8.methods import StaticQuantizer, quantize_dynamically
from clip_rd_edge.exporting.parity import NodeByNode, add_reference
from clip_rd_edge.runtime.load import load


@pytest.fixture(scope="module")
def int8_bundle(fp32_bundle: Path, calibration: CalibrationSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an image tower in static INT8 and a text tower in dynamic INT8, without reference embeddings."""
    scratch = tmp_path_factory.mktemp("reference")
    folder = Path(shutil.copytree(fp32_bundle, scratch / "int8"))
    (folder / "reference.npz").unlink()
    prepared = prepare_for_quantization(fp32_bundle / "image.onnx", scratch)
    quantizer = StaticQuantizer(prepared, calibration.calibrate.pixels)
    (folder / "image.onnx").write_bytes(quantizer.quantize("min-max", quantizer.layers))
    prepared = prepare_for_quantization(fp32_bundle / "text.onnx", scratch)
    content = quantize_dynamically(prepared, matrix_products=True, token_embeddings=True, per_token=False)
    (folder / "text.onnx").write_bytes(content)
    manifest = read_manifest(fp32_bundle)
    towers = {name: msgspec.structs.replace(tower, precision="int8") for name, tower in manifest.towers.items()}
    write_manifest(folder, msgspec.structs.replace(manifest, **towers))
    return folder


def _reference(folder: Path) -> Reference:
    manifest = read_manifest(folder)
    add_reference(folder, NodeByNode(folder, manifest))
    reference = read_reference(folder)
    assert reference is not None
    return reference


def test_rounding_moves_the_answers_of_int8_as_far_as_other_kernels_do(int8_bundle: Path) -> None:
    reference = _reference(int8_bundle)
    assert 0.9 < reference.image_rounding < 0.9999
    assert 0.9 < reference.text_rounding < 1
    encoder = load(int8_bundle, device="cpu")
    answers = encoder.encode_images(list(reference.images))
    assert worst_agreement(reference.image_embeddings, answers) > 1 - 1.5 * (1 - reference.image_rounding)
    assert _reference(int8_bundle).image_rounding == reference.image_rounding  # whenever it is exported


def test_preprocessing_in_the_graph_keeps_its_sizes_when_rounding_is_measured(
    int8_bundle: Path, tmp_path: Path
) -> None:
    bundle, manifest = Path(shutil.copytree(int8_bundle, tmp_path / "bundle")), read_manifest(int8_bundle)
    path = bundle / "image.onnx"
    path.write_bytes(with_preprocessing(onnx.load(path), manifest.preprocessing).SerializeToString())
    image = msgspec.structs.replace(manifest.image, input_name=IMAGE, preprocesses=True)
    write_manifest(bundle, msgspec.structs.replace(manifest, image=image))
    assert 0.9 < _reference(bundle).image_rounding < 0.9999
