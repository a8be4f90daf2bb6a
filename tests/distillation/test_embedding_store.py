"""A cached teacher gives the same embeddings as a live one, and a cache with other settings is rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from clip_rd_edge.distillation import embedding_store
from clip_rd_edge.distillation.build import RunSetup, load_setup, make_dataset
from clip_rd_edge.distillation.config import RunConfig, load_recipe
from clip_rd_edge.distillation.distributed import Processes
from clip_rd_edge.distillation.embedding_store import build_cache, make_manifest, missing_shards, open_cache, shard_path
from clip_rd_edge.distillation.loader import StepSampler, step_loader
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.distillation.teacher import CachedTeacher, Teacher
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.models.student import build_student, student_config

VIEWS = 2


@pytest.fixture
def config(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    torch.manual_seed(1)
    teacher = student_config("test_resnet", embedding_size=24, image_size=48, text="tiny", context_length=12)
    save_clip(tmp_path / "teacher", build_student(teacher, name="teacher"), provenance={})
    recipe = msgspec.structs.replace(load_recipe("clip-rd"), steps=5, batch_size=6, precision="fp32")
    return RunConfig(
        recipe_name="clip-rd",
        recipe=recipe,
        data=str(pairs_csv),
        teacher=str(tmp_path / "teacher"),
        teacher_precision="fp32",
        teacher_cache=str(tmp_path / "cache"),
        views=VIEWS,
        student="test_resnet",
        image_size=48,
        text="tiny",
        context_length=12,
        workers=0,
    )


@pytest.fixture
def setup(config: RunConfig) -> RunSetup:
    return load_setup(config, name="student", processes=Processes())


@pytest.fixture
def build(config: RunConfig, setup: RunSetup) -> Callable[..., None]:
    assert setup.teacher is not None
    teacher = setup.teacher

    def run(**changes: object) -> None:
        arguments = {"crop_scale": config.recipe.crop_scale, "seed": config.seed, "views": VIEWS, "precision": "fp32"}
        build_cache(
            Path(str(config.teacher_cache)),
            make_manifest(teacher, setup.pairs, **{**arguments, **changes}),  # type: ignore[arg-type]
            Teacher(teacher, torch.device("cpu"), autocast=None),
            setup.pairs,
            Processes(),
            workers=0,
            max_bad=0.01,
        )

    return run


def test_a_cached_teacher_gives_the_embeddings_of_the_live_one(
    config: RunConfig, setup: RunSetup, build: Callable[..., None]
) -> None:
    build()
    assert setup.teacher is not None
    live, cached = make_dataset(config, setup), make_dataset(config, setup, with_teacher_pixels=False)
    cached.cache = open_cache(Path(str(config.teacher_cache)))
    teacher = Teacher(setup.teacher, torch.device("cpu"), autocast=None)
    cached_teacher = CachedTeacher(setup.teacher.logit_scale, torch.device("cpu"))
    steps = StepSampler(24, 6, seed=0, start=0, stop=12)  # three epochs over two views
    live_batches, cached_batches = step_loader(live, steps, workers=0), step_loader(cached, steps, workers=0)
    for live_batch, cached_batch in zip(live_batches, cached_batches, strict=True):
        assert live_batch.captions == cached_batch.captions
        assert torch.equal(live_batch.student_pixels, cached_batch.student_pixels)
        for expected, actual in zip(teacher.embed(live_batch), cached_teacher.embed(cached_batch), strict=True):
            torch.testing.assert_close(actual, expected, atol=2**-11, rtol=0)  # float16 rounding below 1


def test_an_interrupted_build_resumes_and_an_incomplete_cache_is_rejected(
    config: RunConfig, build: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(config.teacher_cache))
    write_shard, written = embedding_store.write_shard, []

    def interrupt_after_first(path: Path, *arrays: np.ndarray) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_shard(path, *arrays)

    monkeypatch.setattr(embedding_store, "write_shard", interrupt_after_first)
    with pytest.raises(KeyboardInterrupt):
        build()
    with pytest.raises(ConfigError, match="lacks 1 shards"):
        open_cache(folder)
    written_at = shard_path(folder, 0, 0).stat().st_mtime_ns
    monkeypatch.setattr(embedding_store, "write_shard", write_shard)
    build()
    assert missing_shards(folder, open_cache(folder).manifest) == []
    assert shard_path(folder, 0, 0).stat().st_mtime_ns == written_at


@pytest.mark.parametrize("change", [{"seed": 1}, {"views": 3}, {"crop_scale": (0.5, 1.0)}, {"precision": "bf16"}])
def test_a_cache_with_another_setting_is_rejected_by_name(
    build: Callable[..., None], change: dict[str, object]
) -> None:
    build()
    (name,) = change
    with pytest.raises(UsageError, match=f"made with another {name}"):
        build(**change)


def test_a_cache_of_other_teacher_weights_is_rejected(setup: RunSetup, build: Callable[..., None]) -> None:
    build()
    assert setup.teacher is not None
    with torch.no_grad():
        setup.teacher.model.get_parameter("text.text_projection").add_(1e-3)
    with pytest.raises(UsageError, match="another teacher_sha256"):
        build()


def test_a_run_with_a_cache_completes(config: RunConfig, tmp_path: Path) -> None:
    student = run_distillation(config, tmp_path / "run", resume=False)
    assert (student / "open_clip_model.safetensors").is_file()
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == VIEWS


def test_a_cache_needs_a_number_of_views(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fixed number of views"):
        run_distillation(msgspec.structs.replace(config, views=0), tmp_path / "run", resume=False)
