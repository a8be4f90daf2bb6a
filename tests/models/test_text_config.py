"""The text towers of open_clip, in small: the student starts with the teacher's own features, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.clip import ClipModel, TextTower
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.models.text_weights import build_with_text_tower_of, init_text_tower, with_text_of

WIDTH, LAYERS = 64, 2
VISION = {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
# One of each kind of text tower: in a module of its own or not, without a mask, shorter, with another activation.
LIKE_CLIPS = ("EVA01-g-14-plus", "RN101", "MobileCLIP-S1", "PE-Core-B-16", "RN101-quickgelu")
OTHERS = ("ViT-B-16-SigLIP2", "ViT-H-14-CLIPA-336", "ViT-H-14-worldwide-378", "coca_ViT-B-32", "roberta-ViT-B-32")


def small(config: dict[str, Any], name: str) -> ClipModel:
    """Build a model of a family with random weights, the biases included."""
    cfg = {name: value for name, value in config.items() if name != "custom_text"}
    text = {**config["text_cfg"], "width": WIDTH, "heads": 2, "layers": LAYERS}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    torch.manual_seed(0)
    model = kind(**{**cfg, "embed_dim": 32, "vision_cfg": VISION, "text_cfg": text}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer = open_clip.SimpleTokenizer(context_length=text["context_length"])
    model_cfg = {**config, "embed_dim": 32, "text_cfg": text}
    preprocessing = build_student(student(77), name="student").preprocessing
    return ClipModel(name=name, model=model, tokenizer=tokenizer, preprocessing=preprocessing, model_cfg=model_cfg)


def activations(clip: ClipModel) -> list[str]:
    """Return the class names of the text tower's activations, layer by layer."""
    text = getattr(clip.model, "text", clip.model)
    return [type(block.mlp.gelu).__name__ for block in text.transformer.resblocks]


def student(context_length: int, layers: int = LAYERS) -> dict[str, Any]:
    return student_config(
        "test_resnet", embedding_size=32, image_size=32, text=f"{WIDTH}x{layers}", context_length=context_length
    )


@pytest.mark.parametrize("name", OTHERS)
def test_a_student_of_another_kind_of_text_tower_is_refused(name: str) -> None:
    config = open_clip.get_model_config(name)
    teacher = ClipModel(name=name, model=torch.nn.Identity(), tokenizer=None, preprocessing=None, model_cfg=config)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        with_text_of(student(config["text_cfg"].get("context_length", 77)), teacher)


@pytest.mark.parametrize("name", LIKE_CLIPS)
def test_the_student_starts_with_the_teachers_features_or_keeps_its_tower(name: str, tmp_path: Path) -> None:
    config = open_clip.get_model_config(name)
    teacher = small(config, name)
    clip = build_student(with_text_of(student(config["text_cfg"]["context_length"]), teacher), name="student")
    init_text_tower(clip, "teacher", teacher)
    # Small towers return nearly the same features with GELU and QuickGELU.
    assert activations(clip) == activations(teacher)
    captions = ["a cat", "two dogs, a red car and a blue sky", ""]
    with torch.no_grad():
        expected = TextTower(teacher.model)(teacher.tokenizer(captions))
        actual = TextTower(clip.model.eval())(clip.tokenizer(captions))
    assert (expected * actual).sum(dim=1).min() >= 0.9999
    # The captions are told apart, so equal features mean something.
    assert (actual @ actual.T).min() < 0.99
    kept = build_with_text_tower_of(teacher, student(77), name="student")
    save_clip(tmp_path / "student", kept, provenance={})
    for clip in (kept, load_clip(str(tmp_path / "student"))):
        assert activations(clip) == activations(teacher)
        with torch.no_grad():
            torch.testing.assert_close(TextTower(clip.model.eval())(clip.tokenizer(captions)), expected)
    assert (clip.context_length, clip.embedding_size) == (teacher.context_length, 32)


def teacher_with(**text: Any) -> ClipModel:
    return small({"custom_text": True, "text_cfg": {"context_length": 16, "vocab_size": 49408, **text}}, "teacher")


def test_a_tower_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever option a later open_clip adds, the comparison notices that it is not carried."""
    teacher = teacher_with(act_kwargs={"approximate": "tanh"}, norm_kwargs={"eps": 1e-1})
    monkeypatch.setattr("clip_rd_edge.models.text_weights._OWN", ("context_length", "layers", "norm_kwargs"))
    with pytest.raises(ConfigError):
        with_text_of(student(16), teacher)
