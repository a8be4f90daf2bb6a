"""ONNX in FP32 equals torch for every student preset and for open_clip architectures, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.exporting.parity import Inputs, agreement, embed
from clip_rd_edge.exporting.towers import export_image_tower, export_text_tower
from clip_rd_edge.models.clip import ClipModel, evaluation_mode
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import preprocessing_of
from clip_rd_edge.models.names import preset_names
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.runtime.backends.onnxruntime import open_session

pytestmark = pytest.mark.slow
ARCHITECTURES = ("ViT-B-32", "RN50", "MobileCLIP-S1", "convnext_base", "ViT-B-16-SigLIP")


def check(path: Path, inputs: Inputs, encode: Callable[[Inputs], Embeddings]) -> None:
    """Compare a tower's file with torch at batch 1 and 8."""
    session = open_session(str(path))
    for batch in (inputs[:1], inputs):
        embeddings, expected = embed(session, batch, batch_size=8), encode(batch)
        assert np.isfinite(embeddings).all()
        assert np.abs(embeddings - expected).max() <= 1e-4
        assert np.sum(embeddings * expected, axis=1).min() >= 0.99999
    assert agreement(expected, embeddings).centred_cosine >= 0.999  # the embeddings differ from each other


def pixels_for(clip: ClipModel) -> Inputs:
    rng = np.random.default_rng(0)
    level = rng.uniform(-1, 1, (8, 3, 1, 1))
    pixels: Inputs = (level + rng.standard_normal((8, 3, *clip.preprocessing.size))).astype(np.float32)
    return pixels


def ids_for(clip: ClipModel, vocabulary: int) -> Inputs:
    """Texts of different lengths that end with the greatest id, as CLIP's end-of-text token, and are padded with 0."""
    rng = np.random.default_rng(0)
    ids = np.zeros((8, clip.context_length), dtype=np.int64)
    for row, length in zip(ids, np.linspace(2, clip.context_length, 8, dtype=int), strict=True):
        row[:length] = rng.integers(1, vocabulary - 1, length)
        row[length - 1] = vocabulary - 1
    return ids


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset(preset: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = build_student(student_config(preset, embedding_size=512, text="tiny"), name=preset)
    with evaluation_mode(clip.model):
        check(export_image_tower(clip, tmp_path), pixels_for(clip), TorchEncoder(clip).encode_pixels)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_of_open_clip(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    config = open_clip.get_model_config(name)
    length, vocabulary = config["text_cfg"]["context_length"], config["text_cfg"]["vocab_size"]
    # SigLIP's tokenizer is on the hub; this test only needs its tower, and any ids of its vocabulary.
    clip = ClipModel(
        name, model, lambda texts: torch.ones(len(texts), length, dtype=torch.int64), preprocessing_of(model), config
    )
    check(export_image_tower(clip, tmp_path), pixels_for(clip), TorchEncoder(clip).encode_pixels)
    check(export_text_tower(clip, tmp_path), ids_for(clip, vocabulary), TorchEncoder(clip).encode_ids)
