"""Which models can be the student of a run, what new ones start from, and what of them is trained.

What is frozen keeps its weights: see test_run.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import torch
from support import save_tiny_teacher, tiny_clip
from text_towers import bert_clip, siglip_clip
from tiny_runs import killed_and_resumed, tiny_run, weights

from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.distillation.student import require_named_student, require_trained_bias, set_training_mode
from clip_rd_edge.distillation.teacher import FrozenTextTower
from clip_rd_edge.errors import UsageError
from clip_rd_edge.losses.objective import Weights
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.students import build_student, student_config
from clip_rd_edge.utils.paths import typed


def test_a_logit_bias_needs_the_term_that_trains_it() -> None:
    student = tiny_clip()
    biased = tiny_clip()
    biased.model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    sigmoid, task = Weights(sigmoid=1, hrd=1), Weights(task=1)
    for fitting, other, objective in ((biased, student, sigmoid), (student, biased, task)):
        require_trained_bias(fitting, objective)
        with pytest.raises(UsageError):
            require_trained_bias(other, objective)


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        ("pretrained_text", {"student": "ViT-B-32@openai", "pretrained_text": "weights.pth"}),
        ("tuned_share", {"tuned_share": 0.5}),
        ("quantize", {"quantize": "int8"}),
        ("compile", {"student": "ViT-B-32@openai", "quantize": "int8", "compile": True}),
        ("text", {"text": "teacher"}),
    ],
)
def test_an_option_that_the_student_has_no_use_for_is_refused(option: str, settings: dict[str, object]) -> None:
    shape = {"image_size": None, "text": None, "context_length": None}
    with pytest.raises(UsageError) as refused:
        require_named_student(tiny_run("clip", {}, data="pairs.csv", **{**shape, **settings}))
    assert refused.value.option == option


@pytest.fixture
def text_taken(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    """A run of 6 steps whose student takes the text tower of the folder `texts`."""
    save_tiny_teacher(tmp_path / "teacher")
    save_tiny_teacher(tmp_path / "texts", seed=2)
    settings = {"data": str(pairs_csv), "teacher": str(tmp_path / "teacher"), "text": str(tmp_path / "texts")}
    return tiny_run("clip-rd", {"steps": 6, "batch_size": 6}, checkpoint_every=2, **settings)


def test_a_student_takes_the_text_tower_of_another_model(text_taken: RunConfig, tmp_path: Path) -> None:
    config = msgspec.structs.replace(text_taken, freeze_text=True, embedding_size=0)
    student = killed_and_resumed(config, tmp_path, after=3) / "student"
    before, after = weights(tmp_path / "texts"), weights(student)
    changed = {name for name in before if name.startswith("text.") and not torch.equal(before[name], after[name])}
    assert changed == {"text.text_projection"}
    assert load_clip(str(student)).context_length == 12


def test_the_term_sigmoid_trains_the_bias_of_a_new_student_and_of_a_trained_one(
    pairs_csv: Path, tmp_path: Path
) -> None:
    save_clip(tmp_path / "siglip", siglip_clip(image_size=48), provenance={})
    recipe = {"steps": 3, "batch_size": 6, "learning_rate": 1e-2, "objective": Weights(sigmoid=1, hrd=1)}
    shape = {"image_size": None, "text": None, "context_length": None}
    settings = {"data": str(pairs_csv), "teacher": str(tmp_path / "siglip")}
    new = tiny_run("clip", recipe, **settings)
    tuned = tiny_run("clip", recipe, **settings, student=str(tmp_path / "siglip"), **shape)
    for config, start in ((new, (10.0, -10.0)), (tuned, (20.0, 2.5))):
        name = "new" if config is new else "tuned"
        scoring = load_clip(typed(run_distillation(config, tmp_path / name, resume=False))).scoring
        assert scoring.bias is not None
        for trained, initial in zip((scoring.scale, scoring.bias), start, strict=True):
            assert 0 < abs(trained - initial) < 1


@pytest.fixture
def texts_alone() -> RunConfig:
    return tiny_run("clip-rd", {}, texts="labels.txt", teacher="teacher", freeze_text=True)


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


def test_frozen_layers_keep_weights_and_statistics_and_frozen_norms_their_statistics() -> None:
    for settings, frozen in (({"freeze_image": 2}, ("conv1.", "bn1.", "layer1.")), ({"freeze_norms": True}, ())):
        student = tiny_clip()
        trunk = student.model.get_submodule("visual.trunk")
        before = {name: buffer.clone() for name, buffer in trunk.named_buffers()}
        set_training_mode(student, tiny_run("clip", {}, data="pairs.csv", **settings))
        ImageTower(student.model)(torch.randn(2, 3, 32, 32))[:, 0].sum().backward()
        trained = {name for name, parameter in trunk.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, _ in trunk.named_parameters() if not name.startswith(frozen or "none")}
        changed = {name for name, buffer in trunk.named_buffers() if not torch.equal(buffer, before[name])}
        assert changed == {name for name in before if frozen and not name.startswith(frozen)}


@pytest.mark.parametrize(("name", "image_size"), [("test_resnet", 32), ("test_vit", 48)])
def test_all_that_is_not_frozen_has_a_gradient_with_gradient_checkpointing(name: str, image_size: int) -> None:
    student = tiny_clip(name, image_size=image_size)
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
    return tiny_clip(text="64x4")


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
