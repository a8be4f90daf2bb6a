from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.contract.bundle import read_manifest, write_manifest
from clip_rd_edge.convert.graph import preprocessed
from clip_rd_edge.convert.int8.dynamic import quantize_dynamically, scales_by_batch
from clip_rd_edge.runtime.load import load


def test_a_text_has_one_embedding_whatever_it_is_embedded_with(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(fp32_bundle, tmp_path / "bundle"))
    source = preprocessed(bundle / "text.onnx", tmp_path)
    content = quantize_dynamically(source, products=True, table=True, per_channel=True)
    assert scales_by_batch(content)
    assert not scales_by_batch(source.read_bytes())
    (bundle / "text.onnx").write_bytes(content)
    manifest = read_manifest(bundle)
    together = {}
    for alone in (False, True):
        text = msgspec.structs.replace(manifest.text, one_at_a_time=alone)
        write_manifest(bundle, msgspec.structs.replace(manifest, text=text))
        encoder = load(bundle)
        together[alone] = encoder.encode_texts(["a red cat", "under a tree", "", "dog " * 20])
    single = load(bundle).encode_texts(["a red cat"])
    np.testing.assert_array_equal(together[True][:1], single)
    assert np.abs(together[False][:1] - single).max() > 1e-6  # which is what this is for
