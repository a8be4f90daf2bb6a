"""ONNX FP32 equal to torch for every preset of a student, and for architectures of open_clip, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.convert.parity import Inputs, agreement, embed
from clip_rd_edge.exporters.onnx import evaluating, export_image_tower, export_text_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import preprocessing_of
from clip_rd_edge.models.student import build_student, preset_names, student_config
from clip_rd_edge.runtime.backends.onnxruntime import open_session

pytestmark = pytest.mark.slow
ARCHITECTURES = ("ViT-B-32", "RN50", "MobileCLIP-S1", "convnext_base", "ViT-B-16-SigLIP")


def check(path: Path, inputs: Inputs, encode: Callable[[Inputs], Embeddings]) -> None:
    """Batch 1 and 8 of a tower's file beside torch's."""
    session = open_session(str(path))
    for batch in (inputs[:1], inputs):
        ours, theirs = embed(session, batch, batch_size=8), encode(batch)
        assert np.isfinite(ours).all()
        assert np.abs(ours - theirs).max() <= 1e-4
        assert np.sum(ours * theirs, axis=1).min() >= 0.99999
    assert agreement(theirs, ours).centred_cosine >= 0.999  # and not all the same


def pixels_for(clip: ClipModel) -> Inputs:
    rng = np.random.default_rng(0)
    level = rng.uniform(-1, 1, (8, 3, 1, 1))
    pixels: Inputs = (level + rng.standard_normal((8, 3, *clip.preprocessing.size))).astype(np.float32)
    return pixels


def ids_for(clip: ClipModel, vocabulary: int) -> Inputs:
    """Texts of different lengths, the greatest id last, as CLIP's end of text is, then padding of 0."""
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
    with evaluating(clip.model):
        check(export_image_tower(clip, tmp_path), pixels_for(clip), TorchEncoder(clip).encode_pixels)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_of_open_clip(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    config = open_clip.get_model_config(name)
    length, vocabulary = config["text_cfg"]["context_length"], config["text_cfg"]["vocab_size"]
    # SigLIP's tokenizer lies on the hub; here its tower is what counts, and ids are any of its vocabulary.
    clip = ClipModel(
        name, model, lambda texts: torch.ones(len(texts), length, dtype=torch.int64), preprocessing_of(model), config
    )
    check(export_image_tower(clip, tmp_path), pixels_for(clip), TorchEncoder(clip).encode_pixels)
    check(export_text_tower(clip, tmp_path), ids_for(clip, vocabulary), TorchEncoder(clip).encode_ids)


def test_a_text_tower_of_xlm_roberta(tmp_path: Path) -> None:
    """xlm-roberta-base as its published configuration has it, which lies on the hub, but for a smaller vocabulary."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vocabulary, length = 1000, 32
    transformers.XLMRobertaConfig(
        vocab_size=vocabulary, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    ).save_pretrained(tmp_path)
    config = open_clip.get_model_config("xlm-roberta-base-ViT-B-32")
    assert config["text_cfg"]["hf_model_name"] == "xlm-roberta-base"
    text_cfg = {**config["text_cfg"], "hf_model_name": str(tmp_path), "hf_model_pretrained": False}
    vision_cfg = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32, "head_width": 32}
    model = open_clip.CustomTextCLIP(embed_dim=512, vision_cfg=vision_cfg, text_cfg=text_cfg).eval()
    how = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    clip = ClipModel("xlm", model, lambda texts: torch.full((len(texts), length), 5), how, {"embed_dim": 512})
    ids = np.ones((8, length), dtype=np.int64)  # padding, which sets the positions of what stands before it
    for row, words in zip(ids, np.linspace(2, length, 8, dtype=int), strict=True):
        row[:words] = np.random.default_rng(words).integers(3, vocabulary, words)
        row[0], row[words - 1] = 0, 2
    check(export_text_tower(clip, tmp_path), ids, TorchEncoder(clip).encode_ids)
