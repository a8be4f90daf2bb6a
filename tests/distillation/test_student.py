"""Which models can be the student of a run, and what new ones start from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
from support import Watch, save_tiny_teacher
from text_towers import siglip_clip
from tiny_runs import assert_same_weights, killed_and_resumed, stop_at, tiny_run

from clip_rd_edge.distillation import student as module
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.distill import run_distillation
from clip_rd_edge.distillation.embed import embed_teacher
from clip_rd_edge.distillation.student import require_trained_bias
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.losses.objective import Weights
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.students import TEACHER, build_student, student_config
from clip_rd_edge.models.text_weights import TOKENS
from clip_rd_edge.utils.paths import typed
from clip_rd_edge.utils.structs import read_yaml


@pytest.fixture
def student() -> ClipModel:
    config = student_config("test_resnet", embedding_size=8, image_size=32, text="64x1", context_length=8)
    return build_student(config, name="test_resnet")


def test_a_logit_bias_needs_the_term_that_trains_it(student: ClipModel) -> None:
    require_trained_bias(student, Weights(task=1))
    with pytest.raises(UsageError):
        require_trained_bias(student, Weights(sigmoid=1))
    student.model.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    require_trained_bias(student, Weights(sigmoid=1, hrd=1))
    with pytest.raises(UsageError):
        require_trained_bias(student, Weights(task=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "test_resnt"}, r"No student named 'test_resnt': .* Did you mean 'test_resnet"),
        ({"student": "local-dir:/nowhere"}, "The model folder /nowhere does not exist"),
        ({"text": "smal"}, "The text tower is 'smal'; expected one of tiny, small, standard"),
        ({"text": "local-dir:/nowhere"}, "The model folder /nowhere does not exist"),
    ],
)
@pytest.mark.parametrize(
    ("place", "run"), [("setup", partial(run_distillation, resume=False)), ("embed", embed_teacher)]
)
def test_a_misspelled_student_is_refused_before_anything_is_read_or_fetched(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    run: Callable[..., object],
    changes: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr(f"clip_rd_edge.distillation.{place}.training_pairs", lambda *_, **__: pytest.fail("indexed"))
    config = tiny_run("clip-rd", {}, teacher="ViT-B-32", teacher_pretrained="openai", data="far.tar", **changes)
    with pytest.raises((InputError, ConfigError), match=message):
        run(config, tmp_path / "run")


def test_token_embeddings_are_initialised_once_in_a_run(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = list[list[str]]()

    def double(student: ClipModel, teachers: list[ClipModel], reporter: object) -> str:
        starts.append([teacher.name for teacher in teachers])
        with torch.no_grad():
            student.model.get_parameter("text.token_embedding.weight").mul_(2)
        return "token embeddings are doubled"

    monkeypatch.setattr(module, "init_token_embeddings", double)
    save_tiny_teacher(tmp_path / "teacher")
    settings = {"data": str(pairs_csv), "teacher": str(tmp_path / "teacher"), "checkpoint_every": 2}
    config = tiny_run("clip-rd", {"steps": 6, "batch_size": 6}, pretrained_text=TOKENS, **settings)
    killed_and_resumed(config, tmp_path, after=3)
    assert starts == [["teacher"], ["teacher"]]  # of the run without interruption, and of the other before it


@pytest.mark.parametrize("start", [TOKENS, TEACHER])
def test_a_text_tower_cannot_start_from_no_teacher(pairs_csv: Path, tmp_path: Path, start: str) -> None:
    config = tiny_run("clip", {"steps": 6, "batch_size": 6}, pretrained_text=start, data=str(pairs_csv))
    with pytest.raises(UsageError, match="start from its teacher, but the recipe clip has no teacher") as error:
        run_distillation(config, tmp_path / "run", resume=False, reporter=Watch())
    assert error.value.hint == "choose another pretrained_text, or another recipe"


def test_a_student_takes_the_text_tower_of_another_model(pairs_csv: Path, tmp_path: Path) -> None:
    save_tiny_teacher(tmp_path / "teacher")
    save_tiny_teacher(tmp_path / "texts", seed=2)
    settings = {"data": str(pairs_csv), "teacher": str(tmp_path / "teacher"), "text": str(tmp_path / "texts")}
    config = tiny_run(
        "clip-rd", {"steps": 6, "batch_size": 6}, freeze_text=True, embedding_size=0, checkpoint_every=2, **settings
    )
    killed_and_resumed(config, tmp_path, after=3)
    names = ("text.token_embedding.weight", "text.transformer.resblocks.0.mlp.c_fc.weight")
    weights = [load_clip(str(tmp_path / name)).model.state_dict() for name in ("texts", "run", "teacher")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in names)
    assert not torch.equal(weights[1][names[0]], weights[2][names[0]])
    teacher = load_clip(str(tmp_path / "teacher"))
    for start in (TOKENS, TEACHER):
        config = msgspec.structs.replace(config, pretrained_text=start, context_length=16)  # the teacher has but 12
        with pytest.raises(UsageError, match=r"takes the text tower of .*texts, but other weights to start from"):
            module.make_student(config, [teacher], name="other")


@pytest.fixture
def text_taken(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    """A run of 6 steps whose student takes the text tower of the folder `texts`."""
    save_tiny_teacher(tmp_path / "teacher")
    save_tiny_teacher(tmp_path / "texts", seed=2)
    settings = {"data": str(pairs_csv), "teacher": str(tmp_path / "teacher"), "text": str(tmp_path / "texts")}
    return tiny_run("clip-rd", {"steps": 6, "batch_size": 6}, checkpoint_every=2, **settings)


def test_a_text_tower_that_was_replaced_is_noticed(text_taken: RunConfig, tmp_path: Path) -> None:
    run, texts = tmp_path / "run", tmp_path / "texts"
    with pytest.raises(MemoryError):
        run_distillation(text_taken, run, resume=False, reporter=Watch(on_step=stop_at(3)))
    save_tiny_teacher(texts, seed=3)
    # The tokens of another tower are not those that the weights in the checkpoint were trained with.
    for accept_changes in (False, True):
        with pytest.raises(UsageError, match="text tower that the student starts from has other weights") as error:
            run_distillation(text_taken, run, resume=True, accept_changes=accept_changes)
        assert error.value.hint == "restore them, or start a new run with another output"
    shutil.rmtree(texts)
    with pytest.raises(ConfigError, match=r"The text tower is '.*texts', but there is no such folder; expected"):
        run_distillation(text_taken, run, resume=True)
    save_tiny_teacher(tmp_path / "moved", seed=2)
    moved = msgspec.structs.replace(text_taken, text=str(tmp_path / "moved"))
    resumed = run_distillation(moved, run, resume=True)
    assert_same_weights(resumed, run_distillation(moved, tmp_path / "uninterrupted", resume=False))


def test_the_text_tower_of_another_model_keeps_its_context_length(text_taken: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for length in (8, 77):
        other = msgspec.structs.replace(text_taken, context_length=length)
        asked = rf"text tower of .*texts, whose context length is 12; {length} was asked for"
        with pytest.raises(UsageError, match=asked):
            run_distillation(other, run, resume=False)
    default = msgspec.structs.replace(text_taken, context_length=None)
    with pytest.raises(MemoryError):
        run_distillation(default, run, resume=False, reporter=Watch(on_step=stop_at(3)))
    recorded = read_yaml(run / "config.yaml", RunConfig)
    assert recorded.context_length == 12
    assert load_clip(str(run_distillation(default, run, resume=True))).context_length == 12


def test_a_students_file_that_was_edited_is_noticed_and_one_that_was_moved_is_not(
    pairs_csv: Path, tmp_path: Path
) -> None:
    def write(name: str, mean: float) -> str:
        vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 16}
        content = {"vision_cfg": vision, "preprocess_cfg": {"mean": [mean] * 3, "std": [0.5] * 3}}
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    run, recipe = tmp_path / "run", {"steps": 2, "batch_size": 6}
    config = tiny_run("clip", recipe, data=str(pairs_csv), student=write("own.json", 0.5), checkpoint_every=1)
    with pytest.raises(MemoryError):
        run_distillation(config, run, resume=False, reporter=Watch(on_step=stop_at(2)))
    write("own.json", 0.1)
    for accept_changes in (False, True):
        with pytest.raises(UsageError, match="the file of the student's architecture has another content") as error:
            run_distillation(config, run, resume=True, accept_changes=accept_changes)
        assert error.value.hint == "restore them, or start a new run with another output"
    moved = msgspec.structs.replace(config, student=write("moved.json", 0.5))
    assert load_clip(str(run_distillation(moved, run, resume=True))).preprocessing.mean == (0.5, 0.5, 0.5)


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
