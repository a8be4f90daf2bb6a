from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from clip_rd_edge.contract.bundle import read_manifest, write_manifest
from clip_rd_edge.contract.preprocess import preprocess
from clip_rd_edge.convert.immich import write_immich
from clip_rd_edge.errors import UsageError
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load


def test_immich_gets_the_same_embeddings(fp32_bundle: Path, tmp_path: Path) -> None:
    folder, bundle = tmp_path / "immich", load(fp32_bundle)
    write_immich(fp32_bundle, folder)
    config = json.loads((folder / "config.json").read_text())
    preprocessing = json.loads((folder / "visual" / "preprocess_cfg.json").read_text())
    assert (config["embed_dim"], config["text_cfg"]["context_length"]) == (32, 16)
    assert preprocessing["size"] == [32, 32]
    assert preprocessing["interpolation"] == "bicubic"
    assert preprocessing["resize_mode"] == "shortest"
    assert preprocessing["mode"] == "RGB"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    pixels = preprocess(image, read_manifest(fp32_bundle).preprocessing)[None]
    (embedding,) = open_session(str(folder / "visual" / "model.onnx")).run(None, {"image": pixels})
    np.testing.assert_allclose(embedding, bundle.encode_images([image]), atol=1e-6)
    # The steps of immich's OpenClipTextualEncoder.
    tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    pad = json.loads((folder / "textual" / "tokenizer_config.json").read_text())["pad_token"]
    tokenizer.enable_padding(length=16, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=16)
    session = open_session(str(folder / "textual" / "model.onnx"))
    for text in ("a Red House!", "two dogs " * 30):
        ids = np.asarray([tokenizer.encode(" ".join(text.split())).ids], dtype=np.int32)
        (embedding,) = session.run(None, {"text": ids})
        np.testing.assert_allclose(embedding, bundle.encode_texts([text]), atol=1e-6)


def test_preprocessing_that_immich_does_not_support_is_refused(colour_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(colour_bundle)
    padded = msgspec.structs.replace(manifest.preprocessing, resize_mode="longest")
    write_manifest(colour_bundle, msgspec.structs.replace(manifest, preprocessing=padded))
    with pytest.raises(UsageError, match="takes 8 × 8 with resize mode longest"):
        write_immich(colour_bundle, tmp_path / "immich")
    assert not (tmp_path / "immich").exists()
