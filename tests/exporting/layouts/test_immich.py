from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import pad_with_another_id
from text_towers import clip_that_reads_signs
from tokenizers import Tokenizer

from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.layouts import require_square
from clip_rd_edge.exporting.layouts.immich import immich_name, write_immich
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load


def test_immich_gets_the_same_embeddings(fp32_bundle: Path, tmp_path: Path) -> None:
    folder, bundle = tmp_path / "immich", load(fp32_bundle)
    write_immich(fp32_bundle, folder)
    config = json.loads((folder / "config.json").read_text())
    preprocessing = json.loads((folder / "visual" / "preprocess_cfg.json").read_text())
    assert (config["embed_dim"], config["text_cfg"]["context_length"]) == (32, 16)
    assert config["vision_cfg"]["image_size"] == 32
    assert preprocessing["size"] == [32, 32]
    assert preprocessing["interpolation"] == "bicubic"
    assert preprocessing["resize_mode"] == "shortest"
    assert preprocessing["mode"] == "RGB"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    pixels = preprocess(image, read_manifest(fp32_bundle).preprocessing)[None]
    (embedding,) = open_session(str(folder / "visual" / "model.onnx")).run(None, {"image": pixels})
    np.testing.assert_allclose(embedding, bundle.encode_images([image]), atol=1e-6)
    _require_texts(folder, bundle, length=16)


@pytest.mark.parametrize("kind", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_immich_reads_the_texts_of_a_text_tower_of_transformers(kind: str, tmp_path: Path) -> None:
    export_bundle(clip_that_reads_signs(kind, tmp_path / "encoder"), tmp_path / "bundle", Plan())
    write_immich(tmp_path / "bundle", tmp_path / "immich")
    assert json.loads((tmp_path / "immich" / "config.json").read_text())["text_cfg"] == {"context_length": 12}
    _require_texts(tmp_path / "immich", load(tmp_path / "bundle"), length=12)


def _text_embedding(folder: Path, text: str, *, length: int) -> np.ndarray:
    """Embed a text by the steps of immich's OpenClipTextualEncoder."""
    tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
    pad = json.loads((folder / "textual" / "tokenizer_config.json").read_text())["pad_token"]
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    ids = np.asarray([tokenizer.encode(" ".join(text.split())).ids], dtype=np.int32)
    (embedding,) = open_session(str(folder / "textual" / "model.onnx")).run(None, {"text": ids})
    return np.asarray(embedding)


def _require_texts(folder: Path, bundle: Any, *, length: int) -> None:
    # The last ones as a phone's keyboard, a Mac's file name and a PDF write them.
    for text in ("a Red House!", "two dogs " * 30, "the dog’s “bone”", "cafe\u0301", "ﬁve Cats", "a\x00 c\x7fat"):
        embedding = _text_embedding(folder, text, length=length)
        np.testing.assert_allclose(embedding, bundle.encode_texts([text]), atol=1e-6)


def test_texts_are_padded_with_the_models_own_id(colour_bundle: Path, tmp_path: Path) -> None:
    pad_with_another_id(colour_bundle)
    write_immich(colour_bundle, tmp_path / "immich")
    for text, expected in (("red", [1, 0, 0]), ("red blue", [0.5**0.5, 0, 0.5**0.5])):
        np.testing.assert_allclose(_text_embedding(tmp_path / "immich", text, length=6)[0], expected, atol=1e-6)


@pytest.mark.parametrize(("mode", "size"), [("longest", (8, 8)), ("squash", (8, 9)), ("shortest", (8, 9))])
def test_preprocessing_that_other_programs_cannot_do_is_refused(mode: Any, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(size=size, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode)
    with pytest.raises(UsageError):
        require_square(preprocessing, "student")
    if mode == "squash":
        require_square(preprocessing, "student", modes=("squash",))


def test_a_model_takes_the_place_of_one_with_embeddings_of_the_same_size() -> None:
    assert immich_name(None, embedding_size=512, model="student") == "ViT-B-32__openai"
    assert immich_name("RN50x16__openai", embedding_size=768, model="student") == "RN50x16__openai"
    for name, embedding_size in (("ViT-B-32__openai", 256), ("ViT-L-14__openai", 512), (None, 256), ("ViT-B-32", 512)):
        with pytest.raises(UsageError):
            immich_name(name, embedding_size=embedding_size, model="student")
