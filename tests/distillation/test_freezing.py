"""What of a student is trained: refusals. What is frozen keeps its weights: see test_run.py."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import msgspec
import open_clip
import pytest
import torch
from text_towers import bert_clip
from tiny_runs import tiny_run
from transformers import BertModel

from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.student import frozen_at_random, set_training_mode
from clip_rd_edge.distillation.teacher import FrozenTextTower
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower
from clip_rd_edge.models.students import build_student, student_config


@pytest.fixture
def student() -> ClipModel:
    config = student_config("test_resnet", embedding_size=8, image_size=32, text="64x1", context_length=8)
    return build_student(config, name="test_resnet")


@pytest.fixture
def texts_alone() -> RunConfig:
    return tiny_run("clip-rd", {}, texts="labels.txt", teacher="teacher", freeze_text=True)


def test_a_run_that_would_train_nothing_is_refused(student: ClipModel, texts_alone: RunConfig) -> None:
    set_training_mode(student, texts_alone)
    trained = {name for name, parameter in student.model.named_parameters() if parameter.requires_grad}
    assert trained == {"text.text_projection", "logit_scale"}
    student.model.get_submodule("text").proj = torch.nn.Identity()  # as in towers of Hugging Face without a projection
    message = "would be trained: there are no images to train the image tower on and its frozen text tower has no proj"
    with pytest.raises(UsageError, match=message):
        set_training_mode(student, texts_alone)


def test_a_text_tower_without_a_projection_is_frozen_whole(texts_alone: RunConfig) -> None:
    config = student_config("test_resnet", embedding_size=64, image_size=32, text="64x1", context_length=8)
    config["model_cfg"]["text_cfg"]["proj_type"] = "none"
    student = build_student(config, name="test_resnet")
    with pytest.raises(UsageError, match="its frozen text tower has no projection to train"):
        set_training_mode(student, texts_alone)
    frozen = FrozenTextTower(student, torch.device("cpu"), autocast=None, caption_batch=2)(["red", "a cat"])
    assert not frozen.requires_grad
    expected = TextTower(student.model)(student.tokenizer(["red", "a cat"]))
    torch.testing.assert_close(frozen, expected.detach())


def test_a_text_tower_whose_projection_has_a_bias_is_frozen_but_for_it(texts_alone: RunConfig) -> None:
    config = student_config("test_resnet", embedding_size=8, image_size=32, text="64x1", context_length=8)
    config["model_cfg"]["text_cfg"]["proj_bias"] = True  # as SigLIP's
    student = build_student(config, name="test_resnet")
    set_training_mode(student, texts_alone)
    frozen = FrozenTextTower(student, torch.device("cpu"), autocast=None, caption_batch=2)(["red", "a cat"])
    torch.testing.assert_close(frozen, TextTower(student.model)(student.tokenizer(["red", "a cat"])))
    frozen[:, 0].sum().backward()
    trained = {name for name, parameter in student.model.named_parameters() if parameter.grad is not None}
    assert trained == {"text.text_projection.weight", "text.text_projection.bias"}


def test_a_text_tower_that_also_returns_tokens_is_frozen_but_for_its_projection(student: ClipModel) -> None:
    text: dict[str, object] = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 8, "image_size": 16, "attentional_pool": True}
    tokens_too = {"output_tokens": True}
    model = open_clip.CoCa(8, text, {**text, **tokens_too, "embed_cls": True}, {**vision, **tokens_too})
    coca = dataclasses.replace(student, model=model)
    set_training_mode(coca, tiny_run("clip", {}, data="pairs.csv", freeze_text=True))
    frozen = FrozenTextTower(coca, torch.device("cpu"), autocast=None, caption_batch=2)(["red", "a cat"])
    assert frozen.requires_grad
    torch.testing.assert_close(frozen, TextTower(model)(coca.tokenizer(["red", "a cat"])))


@pytest.mark.parametrize(("name", "image_size"), [("test_resnet", 32), ("test_vit", 160)])
def test_all_that_is_not_frozen_has_a_gradient_with_gradient_checkpointing(name: str, image_size: int) -> None:
    config = student_config(name, embedding_size=8, image_size=image_size, text="64x1", context_length=8)
    student = build_student(config, name=name)
    set_training_mode(student, tiny_run("clip", {}, data="pairs.csv", freeze_image=1, gradient_checkpointing=True))
    ImageTower(student.model)(torch.randn(2, 3, image_size, image_size))[:, 0].sum().backward()
    visual = dict(student.model.get_submodule("visual").named_parameters())
    trained = {name for name, parameter in visual.items() if parameter.requires_grad}
    assert 0 < len(trained) < len(visual)
    assert trained == {name for name, parameter in visual.items() if parameter.grad is not None}


@pytest.fixture(params=["of open_clip", "of Hugging Face"])
def with_layers(request: pytest.FixtureRequest, tmp_path: Path) -> ClipModel:
    """A student whose text tower has four layers and, of Hugging Face, dropout."""
    if request.param == "of Hugging Face":
        return bert_clip(tmp_path / "text")
    config = student_config("test_resnet", embedding_size=8, image_size=32, text="64x4", context_length=8)
    return build_student(config, name="test_resnet")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_first_layers_of_a_text_tower_are_frozen_with_their_dropout(
    with_layers: ClipModel, *, gradient_checkpointing: bool
) -> None:
    recompute = {"gradient_checkpointing": True} if gradient_checkpointing else {}
    set_training_mode(with_layers, tiny_run("clip", {}, data="pairs.csv", freeze_text_layers=3, **recompute))
    text = with_layers.model.get_submodule("text")
    embedded = TextTower(with_layers.model)(with_layers.tokenizer(["red", "a cat"]))
    embedded[:, 0].sum().backward()
    with_gradient = {name for name, parameter in text.named_parameters() if parameter.grad is not None}
    frozen = {name for name, parameter in text.named_parameters() if not parameter.requires_grad}
    pattern = r"embedding|\b(resblocks|layer)\.[01]\."
    assert frozen == {name for name, _ in text.named_parameters() if re.search(pattern, name)}
    assert len([name for name in frozen if "embedding" in name]) >= 2  # of tokens and of positions
    assert with_gradient == {name for name, _ in text.named_parameters()} - frozen
    dropouts = {name: module for name, module in text.named_modules() if isinstance(module, torch.nn.Dropout)}
    for name, dropout in dropouts.items():
        assert dropout.training is not bool(re.search(pattern, name)), name
    assert bool(dropouts) is with_layers.has_hugging_face_text


def test_all_layers_of_a_text_tower_and_more_are_refused(with_layers: ClipModel) -> None:
    with pytest.raises(ConfigError, match="were to be frozen, but its text tower has 5, the embeddings") as error:
        set_training_mode(with_layers, tiny_run("clip", {}, data="pairs.csv", freeze_text_layers=5))
    assert error.value.hint == "freeze_text_layers takes 0 to 4; freeze_text freezes all"
    with pytest.raises(ValueError, match="freeze_text is true, and freeze_text_layers is 1; expected one of them"):
        tiny_run("clip", {}, data="pairs.csv", freeze_text=True, freeze_text_layers=1)
    with pytest.raises(ValueError, match="is kept as it is, but freeze_text_layers is 1; expected 0"):
        tiny_run("clip-rd", {}, data="pairs.csv", teacher="t", text="teacher", freeze_text=True, freeze_text_layers=1)


@pytest.mark.parametrize(
    ("options", "towers"),
    [
        ({"freeze_text_layers": 2}, ["text"]),
        ({"freeze_text": True}, ["text"]),
        ({"freeze_text_layers": 2, "pretrained_text": "tokens"}, ["text"]),
        ({"freeze_text_layers": 1, "pretrained_text": "tokens"}, []),
        ({"freeze_text_layers": 2, "pretrained_text": "teacher"}, []),
        ({"text": "teacher", "freeze_text": True}, []),
        ({"freeze_image": 1}, ["image"]),
        ({"freeze_image": 1, "pretrained_image": "timm"}, []),
        ({}, []),
    ],
)
def test_frozen_layers_with_random_weights_are_reported(options: dict[str, Any], towers: list[str]) -> None:
    config = tiny_run("clip-rd", {}, data="pairs.csv", teacher="teacher", **options)
    assert list(frozen_at_random(config)) == [
        f"the frozen layers of the {tower} tower keep random weights: --pretrained-{tower} names weights to start from"
        for tower in towers
    ]
    trained = msgspec.structs.replace(config, student="local-dir:student")
    assert list(frozen_at_random(trained)) == []


def test_a_text_tower_of_transformers_recomputes_in_a_way_that_several_processes_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Releases before 5 take another way unless they are told."""
    student, chosen = bert_clip(tmp_path / "text"), list[object]()
    monkeypatch.setattr(BertModel, "gradient_checkpointing_enable", lambda _, options=None: chosen.append(options))
    set_training_mode(student, tiny_run("clip", {}, data="pairs.csv", gradient_checkpointing=True))
    assert chosen[-1] == {"use_reentrant": False}


def test_layers_without_groups_cannot_be_frozen(student: ClipModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("timm.models.resnet.ResNet.group_matcher")  # as in csatv2
    with pytest.raises(UsageError, match="The first layers of test_resnet cannot be frozen: timm does not") as error:
        set_training_mode(student, tiny_run("clip", {}, data="pairs.csv", freeze_image=1))
    assert error.value.hint == "omit freeze_image, or name another student"
