"""A cached teacher against the same one live, and a cache that does not belong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from clip_rd_edge.distillation import embedding_store as cache_build
from clip_rd_edge.distillation.build import Ingredients, load_ingredients, make_dataset
from clip_rd_edge.distillation.config import RunConfig, load_recipe
from clip_rd_edge.distillation.distributed import Processes
from clip_rd_edge.distillation.embedding_store import build_cache, manifest_of, missing_shards, open_cache, shard_path
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
    made = student_config("test_resnet", embedding_size=24, image_size=48, text="tiny", context_length=12)
    save_clip(tmp_path / "teacher", build_student(made, name="teacher"), provenance={})
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
def of(config: RunConfig) -> Ingredients:
    return load_ingredients(config, name="student", processes=Processes())


@pytest.fixture
def build(config: RunConfig, of: Ingredients) -> Callable[..., None]:
    assert of.teacher is not None
    teacher = of.teacher

    def run(**changes: object) -> None:
        arguments = {"crop_scale": config.recipe.crop_scale, "seed": config.seed, "views": VIEWS, "precision": "fp32"}
        build_cache(
            Path(str(config.teacher_cache)),
            manifest_of(teacher, of.pairs, **{**arguments, **changes}),  # type: ignore[arg-type]
            Teacher(teacher, torch.device("cpu"), autocast=None),
            of.pairs,
            Processes(),
            workers=0,
            max_bad=0.01,
        )

    return run


def test_a_cached_teacher_says_what_the_live_one_says(
    config: RunConfig, of: Ingredients, build: Callable[..., None]
) -> None:
    build()
    assert of.teacher is not None
    live, cached = make_dataset(config, of), make_dataset(config, of, with_teacher_pixels=False)
    cached.cache = open_cache(Path(str(config.teacher_cache)))
    teacher = Teacher(of.teacher, torch.device("cpu"), autocast=None)
    replay = CachedTeacher(of.teacher.logit_scale, torch.device("cpu"))
    steps = StepSampler(24, 6, seed=0, start=0, stop=12)  # three epochs over two views
    for one, other in zip(step_loader(live, steps, workers=0), step_loader(cached, steps, workers=0), strict=True):
        assert one.captions == other.captions
        assert torch.equal(one.student_pixels, other.student_pixels)
        for expected, got in zip(teacher.embed(one), replay.embed(other), strict=True):
            torch.testing.assert_close(got, expected, atol=2**-11, rtol=0)  # float16's rounding below 1


def test_an_interrupted_build_goes_on_and_an_unfinished_cache_is_refused(
    config: RunConfig, build: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(config.teacher_cache))
    write, written = cache_build.write_shard, []

    def write_one(path: Path, *arrays: np.ndarray) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *arrays)

    monkeypatch.setattr(cache_build, "write_shard", write_one)
    with pytest.raises(KeyboardInterrupt):
        build()
    with pytest.raises(ConfigError, match="lacks 1 shards"):
        open_cache(folder)
    first = shard_path(folder, 0, 0).stat().st_mtime_ns
    monkeypatch.setattr(cache_build, "write_shard", write)
    build()
    assert missing_shards(folder, open_cache(folder).manifest) == []
    assert shard_path(folder, 0, 0).stat().st_mtime_ns == first


@pytest.mark.parametrize("change", [{"seed": 1}, {"views": 3}, {"crop_scale": (0.5, 1.0)}, {"precision": "bf16"}])
def test_a_cache_of_something_else_is_refused_by_name(build: Callable[..., None], change: dict[str, object]) -> None:
    build()
    (name,) = change
    with pytest.raises(UsageError, match=f"made with another {name}"):
        build(**change)


def test_a_cache_of_other_weights_is_refused(of: Ingredients, build: Callable[..., None]) -> None:
    build()
    assert of.teacher is not None
    with torch.no_grad():
        of.teacher.model.get_parameter("text.text_projection").add_(1e-3)
    with pytest.raises(UsageError, match="another teacher_sha256"):
        build()


def test_a_run_with_a_cache(config: RunConfig, tmp_path: Path) -> None:
    student = run_distillation(config, tmp_path / "run", resume=False)
    assert (student / "open_clip_model.safetensors").is_file()
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == VIEWS


def test_a_cache_needs_views(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fixed number of views"):
        run_distillation(msgspec.structs.replace(config, views=0), tmp_path / "run", resume=False)
