"""Runs with two teachers that differ in width, scale, size of images and tokens: live, from a store, and resumed."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
from support import Watch, save_tiny_teacher, write_pairs
from tiny_runs import killed_and_resumed, tiny_run, weights

import clip_rd_edge as edge
from clip_rd_edge.bundle.runs import read_metrics
from clip_rd_edge.data.order import StepSampler
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.embed import STORE_STAGE
from clip_rd_edge.distillation.loader import step_loader
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.distillation.setup import load_setup, make_dataset
from clip_rd_edge.distillation.store import (
    StoredBank,
    TeacherStores,
    image_shard,
    load_rows,
    open_stores,
    store_folders,
    write_rows,
)
from clip_rd_edge.distillation.teacher import LiveTeacher, StoredTeacher, Teacher, ensemble_of
from clip_rd_edge.losses.terms import Bank, Ensemble
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.students import build_student, student_config

STEPS, BATCH_SIZE = 4, 6
WIDTHS, SCALES = (24, 16), (1 / 0.07, 40.0)
CPU = torch.device("cpu")


def save_other_teacher(folder: Path, *, seed: int = 2, width: int = 16) -> Path:
    torch.manual_seed(seed)
    config = student_config("test_resnet", embedding_size=width, image_size=32, text="64x1", context_length=9)
    clip = build_student(config, name="other")
    with torch.no_grad():
        clip.model.get_parameter("logit_scale").fill_(math.log(SCALES[1]))
    save_clip(folder, clip, provenance={})
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, two teachers, and a store of both: do not change it."""
    folder = tmp_path_factory.mktemp("world")
    teachers = [save_tiny_teacher(folder / "first"), save_other_teacher(folder / "second")]
    options = {"data": write_pairs(folder), "views": 2, "workers": 0, "recipe": "clip-rd-bank"}
    edge.embed(teacher=teachers, output=folder / "store", **options)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def config(world: Path) -> RunConfig:
    recipe = {"steps": STEPS, "batch_size": BATCH_SIZE, "bank_size": 16}
    settings = {"data": str(world / "pairs.csv"), "teacher": (str(world / "first"), str(world / "second"))}
    return tiny_run("clip-rd-bank", recipe, views=2, checkpoint_every=2, **settings)


@pytest.fixture
def with_store(config: RunConfig, world: Path) -> RunConfig:
    return msgspec.structs.replace(config, store=str(world / "store"))


def test_a_killed_run_resumes_to_the_same_weights(config: RunConfig, tmp_path: Path) -> None:
    run = killed_and_resumed(config, tmp_path, after=3)
    assert weights(run / "student")["visual.head.proj.weight"].shape[0] == sum(WIDTHS)  # the teachers' together
    assert all(line["loss/bank"] > 0 and line["loss/hrd"] > 0 for line in read_metrics(run))


def test_a_store_keeps_the_embeddings_of_each_teacher_side_by_side(
    with_store: RunConfig, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "store", tmp_path / "store")
    setup = load_setup(with_store, name="student", processes=Processes())
    folders = store_folders(tmp_path / "store", setup.teachers)
    assert sorted(folders) == sorted((tmp_path / "store").iterdir())
    stores = open_stores(folders)
    assert tuple(store.manifest.embedding_size for store in stores.stores) == WIDTHS
    live, stored = make_dataset(with_store, setup), make_dataset(with_store, setup, with_teacher_pixels=False)
    stored.store = stores
    teachers = LiveTeacher([Teacher(clip, CPU, autocast=None) for clip in setup.teachers])
    assert teachers.logit_scale == pytest.approx(SCALES)
    steps = StepSampler([24], 6, seed=0, steps=range(2, 6))
    batches = zip(step_loader(live, steps, workers=0), step_loader(stored, steps, workers=0), strict=True)
    for expected, actual in batches:
        assert [pixels.shape[-1] for pixels in expected.teacher_pixels] == [48, 32]
        assert actual.teacher_pixels == ()
        assert expected.captions == actual.captions
        assert torch.equal(expected.student_pixels, actual.student_pixels)
        there, here = teachers.embed(expected), StoredTeacher(ensemble_of(setup.teachers), CPU).embed(actual)
        for one, other in ((there.image, here.image), (there.text, here.text)):
            assert one.shape == (6, sum(WIDTHS))
            torch.testing.assert_close(other, one, atol=2**-11, rtol=0)
    bank = stored_bank(stores, ensemble_of(setup.teachers))
    assert bank.image.shape == bank.text.shape == (24, sum(WIDTHS))
    torch.testing.assert_close(bank.image.norm(dim=1), torch.ones(24), atol=2e-3, rtol=0)
    # What one teacher lacks is neither in the bank nor in training.
    rows = load_rows(image_shard(folders[1], 0, 0))
    rows[3] = 0
    write_rows(image_shard(folders[1], 0, 0), rows)
    assert len(stored_bank(stores, ensemble_of(setup.teachers)).image) == 23
    assert stores.lookup(0, 3, setup.pairs.read(3).captions[0]) is None


def stored_bank(stores: TeacherStores, ensemble: Ensemble) -> Bank:
    bank = StoredBank(stores, ensemble, size=100, seed=0, device=CPU)
    return bank.with_batch(torch.empty(0), torch.empty(0))


def test_a_store_serves_runs_with_some_of_its_teachers(with_store: RunConfig, world: Path, tmp_path: Path) -> None:
    first, second = with_store.teachers
    before = sorted(world.glob("store/**/*"))
    recipe = msgspec.structs.replace(with_store.recipe, steps=1)
    for number, names in enumerate([(second, first), second]):
        watch = Watch()
        config = msgspec.structs.replace(with_store, recipe=recipe, teacher=names)
        run_distillation(config, tmp_path / f"run-{number}", resume=False, reporter=watch)
        assert not any(stage == STORE_STAGE for stage, *_ in watch.updates)
    assert sorted(world.glob("store/**/*")) == before


@pytest.fixture
def alike(config: RunConfig, tmp_path: Path) -> RunConfig:
    """Two teachers that share a text tower, with images of different sizes."""
    first = load_clip(config.teachers[0])
    torch.manual_seed(4)
    vision = {**first.model_cfg["vision_cfg"], "image_size": 32}
    other = student_config("test_resnet", embedding_size=WIDTHS[0], image_size=32)
    second = build_student({**other, "model_cfg": {**first.model_cfg, "vision_cfg": vision}}, name="alike")
    second.model.get_submodule("text").load_state_dict(first.model.get_submodule("text").state_dict())
    with torch.no_grad():
        second.model.get_parameter("logit_scale").fill_(math.log(SCALES[1]))
    save_clip(tmp_path / "alike", second, provenance={})
    return msgspec.structs.replace(config, teacher=(config.teachers[0], str(tmp_path / "alike")))


def test_teachers_that_share_a_text_tower_are_the_mean_of_both(alike: RunConfig, tmp_path: Path) -> None:
    stored_config = msgspec.structs.replace(alike, store=str(tmp_path / "store"))
    watch = Watch()
    run = run_distillation(stored_config, tmp_path / "run", resume=False, reporter=watch)
    assert "the teachers share a text tower: the student learns the mean of their image embeddings" in watch.noted
    assert weights(run)["visual.head.proj.weight"].shape[0] == WIDTHS[0]
    setup = load_setup(alike, name="student", processes=Processes())
    assert setup.ensemble is not None
    teachers = [Teacher(clip, CPU, autocast=None) for clip in setup.teachers]
    live, stored = LiveTeacher(teachers), StoredTeacher(setup.ensemble, CPU)
    assert live.logit_scale == stored.logit_scale == pytest.approx(sum(SCALES) / 2)
    data, from_store = make_dataset(alike, setup), make_dataset(alike, setup, with_teacher_pixels=False)
    from_store.store = stores = open_stores(store_folders(tmp_path / "store", setup.teachers))
    steps = StepSampler([24], 6, seed=0, steps=range(1))
    (batch,), (read,) = (list(step_loader(source, steps, workers=0)) for source in (data, from_store))
    here = live.embed(batch)
    images = [teacher.embed_images(pixels) for teacher, pixels in zip(teachers, batch.teacher_pixels, strict=True)]
    mean = sum(images) / 2
    assert isinstance(mean, torch.Tensor)
    torch.testing.assert_close(here.image, mean / mean.norm(dim=1, keepdim=True))
    torch.testing.assert_close(here.text, teachers[0].embed_captions(batch.captions))
    for one, other in zip(stored.embed(read)[:2], here[:2], strict=True):
        torch.testing.assert_close(one, other, atol=2**-11, rtol=0)
    both = stored_bank(stores, setup.ensemble)
    assert both.image.shape == both.text.shape == (24, WIDTHS[0])
    torch.testing.assert_close(both.image.norm(dim=1), torch.ones(24), atol=1e-6, rtol=0)


@pytest.mark.parametrize("differs", ["weights", "tokenizer", "context"])
def test_teachers_with_other_texts_stay_side_by_side(alike: RunConfig, differs: str) -> None:
    first, second = (load_clip(name) for name in alike.teachers)
    assert ensemble_of([first, second]).share_text
    assert not ensemble_of([first]).share_text
    if differs == "weights":
        with torch.no_grad():
            second.model.get_parameter("text.token_embedding.weight")[3] += 1e-3
    elif differs == "tokenizer":
        ids = second.tokenizer
        second = replace(second, tokenizer=lambda texts: ids([text.replace("&", "and") for text in texts]))
    else:
        second = replace(second, tokenizer=partial(second.tokenizer, context_length=4))
    assert ensemble_of([first, second]).widths == (WIDTHS[0], WIDTHS[0])
