from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx

from clip_rd_edge.contract.bundle import read_manifest, write_manifest
from clip_rd_edge.convert.graph import prepare_for_quantization
from clip_rd_edge.convert.int8.dynamic import quantize_dynamically, scales_per_batch
from clip_rd_edge.runtime.load import load


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(fp32_bundle, tmp_path / "bundle"))
    source = prepare_for_quantization(bundle / "text.onnx", tmp_path)
    content = quantize_dynamically(source, matrix_products=True, token_embeddings=True, per_channel=True)
    assert scales_per_batch(content)
    quantized = onnx.load_from_string(content)
    onnx.checker.check_model(quantized, full_check=True)
    assert [opset.domain for opset in quantized.opset_import] == [""]
    assert not scales_per_batch(source.read_bytes())
    (bundle / "text.onnx").write_bytes(content)
    manifest = read_manifest(bundle)
    embeddings = {}
    for one_at_a_time in (False, True):
        text = msgspec.structs.replace(manifest.text, one_at_a_time=one_at_a_time)
        write_manifest(bundle, msgspec.structs.replace(manifest, text=text))
        encoder = load(bundle)
        embeddings[one_at_a_time] = encoder.encode_texts(["a red cat", "under a tree", "", "dog " * 20])
    single = load(bundle).encode_texts(["a red cat"])
    np.testing.assert_array_equal(embeddings[True][:1], single)
    assert np.abs(embeddings[False][:1] - single).max() > 1e-6  # the reason for one_at_a_time
