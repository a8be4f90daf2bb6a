"""Smaller text towers, with tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from support import tiny_clip
from text_towers import bert_clip, mt5_clip, roberta_clip

from clip_rd_edge.bundle.tokenizer import Tokenizer
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.clip import ClipModel, text_module
from clip_rd_edge.models.edit import trim_text_tower
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.tokenizers import export_tokenizer, most_used_tokens, needed_tokens, with_tokens

TEXTS = ["red cat", "red dog", "green cat", "a red tree"]


@pytest.fixture
def bert(tmp_path: Path) -> ClipModel:
    return bert_clip(tmp_path / "bert")


@pytest.fixture
def roberta(tmp_path: Path) -> ClipModel:
    return roberta_clip(tmp_path / "roberta")


@torch.no_grad()
def embed(clip: ClipModel, texts: list[str]) -> np.ndarray:
    rows: np.ndarray = clip.model.encode_text(clip.tokenizer(texts), normalize=True).numpy()  # type: ignore[operator]
    return rows


@pytest.fixture
def mt5(tmp_path: Path) -> ClipModel:
    return mt5_clip(tmp_path / "mt5")


@pytest.mark.parametrize("kind", ["bert", "roberta", "mt5"])
def test_texts_of_the_kept_tokens_have_the_same_embeddings(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    clip = request.getfixturevalue(kind)
    total = clip.model.text.vocab_size
    trimmed = trim_text_tower(clip, vocabulary=total - 3, texts=TEXTS)[0]
    assert np.array_equal(embed(trimmed, TEXTS), embed(clip, TEXTS))
    assert clip.model.text.vocab_size == total  # the original stays
    save_clip(tmp_path / "trimmed", trimmed, provenance={})
    for loaded in (load_clip(str(tmp_path / "trimmed")), plain(tmp_path / "trimmed", clip)):
        assert np.array_equal(embed(loaded, TEXTS), embed(clip, TEXTS))
        assert loaded.model.get_submodule("text.transformer").get_input_embeddings().num_embeddings == total - 3  # type: ignore[operator]
        # "nut" has no token any more, and is spelled.
        ids = loaded.tokenizer(["nut", "bolt"]).tolist()
        unknown = loaded.tokenizer.tokenizer.unk_token_id  # type: ignore[attr-defined]
        assert all(sum(n not in (0, 1) for n in row) > 3 and unknown not in row for row in ids), ids
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(trimmed.model.encode_image(pixels), clip.model.encode_image(pixels))


def test_tokens_before_the_padding_stay_for_the_positions_are_counted_from_its_number(tmp_path: Path) -> None:
    clip = roberta_clip(tmp_path / "roberta", before_padding=["▁never", "▁used"])
    config: Any = text_module(clip.model).config
    assert config.pad_token_id == 3
    trimmed = trim_text_tower(clip, vocabulary=clip.model.text.vocab_size - 7, texts=TEXTS)[0]
    assert (trimmed.tokenizer([""])[0, 2:] == 3).all()
    assert np.array_equal(embed(trimmed, ["red cat"]), embed(clip, ["red cat"]))


def plain(folder: Path, clip: ClipModel) -> ClipModel:
    """Load a model as any program with open_clip does."""
    name = f"local-dir:{folder}"
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    return ClipModel("plain", model, tokenizer, clip.preprocessing, clip.model_cfg)


def test_added_tokens_and_bytes_stay(bert: ClipModel, tmp_path: Path) -> None:
    tokenizer: Any = bert.tokenizer
    tokenizer.tokenizer.add_tokens(["newword"])
    transformer: Any = bert.model.get_submodule("text.transformer")
    transformer.resize_token_embeddings(46)
    trimmed = trim_text_tower(bert, vocabulary=42, texts=TEXTS)[0]
    assert np.array_equal(embed(trimmed, ["a newword"]), embed(bert, ["a newword"]))
    assert trimmed.tokenizer(["newword"])[0, 1] == 41
    pieces = ["<pad>", "<0x0A>", "<0xFF>", "▁bolt"]
    content = {"model": {"type": "Unigram", "byte_fallback": True}}
    assert needed_tokens(content, pieces, np.zeros(4, np.int64), {0}) == {0, 1, 2}


def test_evenly_spaced_layers_stay(bert: ClipModel, tmp_path: Path) -> None:
    trimmed, description = trim_text_tower(bert, layers=2)
    assert description.startswith("the text tower keeps layers 1, 4 of 4: 0.0 of")
    before, after = bert.model.state_dict(), trimmed.model.state_dict()
    prefix = "text.transformer.encoder.layer."
    assert {name.split(".")[4] for name in after if name.startswith(prefix)} == {"0", "1"}
    for name in [name for name in after if name.startswith(f"{prefix}1.")]:
        assert torch.equal(after[name], before[name.replace(f"{prefix}1.", f"{prefix}3.")])
    save_clip(tmp_path / "trimmed", trimmed, provenance={})
    assert np.array_equal(embed(load_clip(str(tmp_path / "trimmed")), TEXTS), embed(trimmed, TEXTS))
    config = json.loads((tmp_path / "trimmed" / "config.json").read_text())
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0


def test_clips_own_vocabulary_can_be_trimmed(tmp_path: Path) -> None:
    clip = tiny_clip(text="64x2", embedding_size=32, context_length=16)
    clip.model.eval()
    texts = ["red cat", "a photo of a green tortoise", "Überstraße!", "It's 1984 …", "猫と犬", "word " * 20, "", "!"]
    before = embed(clip, texts)
    trimmed = trim_text_tower(clip, vocabulary=620, texts=texts)[0]
    assert text_module(clip.model).token_embedding.num_embeddings == 49_408  # type: ignore[union-attr]
    save_clip(tmp_path / "trimmed", trimmed, provenance={})
    for loaded in (trimmed, load_clip(str(tmp_path / "trimmed")), plain(tmp_path / "trimmed", clip)):
        assert text_module(loaded.model).token_embedding.weight.shape == (620, 64)  # type: ignore[union-attr, operator]
        assert np.abs(embed(loaded, texts) - before).max() < 1e-6
        ids = loaded.tokenizer(["bicycle", "cat"])
        assert ids.max() == 619  # the end token is the last
        assert (ids.argmax(1) > 2).tolist() == [True, False]  # "bicycle" is spelled with shorter tokens
    device = Tokenizer(tmp_path / "tokenizer.json", export_tokenizer(trimmed.tokenizer, tmp_path))
    assert np.array_equal(device(texts), trimmed.tokenizer(texts))
    with pytest.raises(ConfigError):
        trim_text_tower(clip, vocabulary=513, texts=texts)
    clip.model.get_submodule("text").attn_mask = None  # type: ignore[assignment]
    with pytest.raises(ConfigError):  # its embeddings depend on the padding
        trim_text_tower(clip, vocabulary=620, texts=texts)


def test_merged_tokens_stay_with_their_parts(bert: ClipModel) -> None:
    pieces = ["a", "b", "c", "ab", "bc", "abc", "ca"]
    merges = [["a", "b"], "b c", ["ab", "c"], "c a"]
    model = {"type": "BPE", "vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": merges}
    content = {"model": model, "added_tokens": []}
    used = np.array([0, 0, 0, 0, 1, 9, 2])
    needed = needed_tokens(content, pieces, used, set())
    assert needed == {0, 1, 2}
    kept = most_used_tokens(content, used, needed, 5)
    assert [pieces[number] for number in kept] == ["a", "b", "c", "ab", "abc"]
    assert with_tokens(content, kept)["model"]["merges"] == [("a", "b"), ("ab", "c")]
    # Both parts of "abc" would be one too many.
    assert [pieces[number] for number in most_used_tokens(content, used, needed, 4)] == ["a", "b", "c", "ca"]
