"""A cached teacher gives the same embeddings as a live one, and a cache with other settings is rejected."""

from __future__ import annotations

import copy
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from support import PATIENCE_S, save_tiny_teacher
from thread_processes import call_in_threads

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.data.samples import BadSamples, Sample
from clip_rd_edge.data.tables import Table
from clip_rd_edge.distillation import embed as store_build
from clip_rd_edge.distillation import store as embedding_store
from clip_rd_edge.distillation.config import RunConfig, load_recipe
from clip_rd_edge.distillation.embed import ShardMaker, ShardTask, build_store, make_manifest
from clip_rd_edge.distillation.inputs import RunSetup, load_setup, make_dataset
from clip_rd_edge.distillation.loader import StepSampler, View, step_loader
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.distillation.store import (
    COMPLETE,
    CompleteStore,
    StoreManifest,
    caption_key,
    claim_store,
    image_shard,
    open_store,
    shard_rows,
    text_shard,
    with_checksums,
)
from clip_rd_edge.distillation.teacher import CaptionCache, LiveTeacher, StoredTeacher, Teacher, ensemble_of
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.structs import read_json

VIEWS = 2


@pytest.fixture
def config(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    save_tiny_teacher(tmp_path / "teacher")
    recipe = msgspec.structs.replace(load_recipe("clip-rd"), steps=5, batch_size=6, precision="fp32")
    return RunConfig(
        recipe_name="clip-rd",
        recipe=recipe,
        data=str(pairs_csv),
        teacher=str(tmp_path / "teacher"),
        teacher_precision="fp32",
        store=str(tmp_path / "cache"),
        views=VIEWS,
        student="test_resnet",
        image_size=48,
        text="64x1",
        context_length=12,
        workers=0,
    )


_read = Table.read


def fail_to_open(
    patch: pytest.MonkeyPatch, setup: RunSetup, *unreadable: int, fails: Callable[[int], bool] | None = None
) -> None:
    """Let images of a table not be read: these alone, or those for which a function says so."""

    def read(table: Table, index: int) -> Sample:
        sample = _read(table, index)

        def opened() -> Image.Image:
            if fails(index) if fails else index in unreadable:
                raise InputError(f"Cannot read image {index}: Input/output error.")
            return sample.image()

        return sample._replace(open=opened)

    assert isinstance(setup.pairs, Table)
    patch.setattr(Table, "read", read)


@pytest.fixture
def setup(config: RunConfig) -> RunSetup:
    return load_setup(config, name="student", processes=Processes())


def make_build(config: RunConfig, setup: RunSetup, processes: Processes = Processes()) -> Callable[..., None]:  # noqa: B008
    teacher = setup.teachers[0]

    def run(**changes: object) -> None:
        arguments = {
            "crops": Crops(scale=config.recipe.crop_scale, aspect_ratio=1.0),
            "seed": config.seed,
            "views": VIEWS,
            "precision": "fp32",
        }
        maker = ShardMaker(
            make_manifest(teacher, setup.pairs, **{**arguments, **changes}),  # type: ignore[arg-type]
            Teacher(teacher, torch.device("cpu"), autocast=None),
            setup.pairs,
            workers=config.workers,
            max_bad=config.max_bad,
        )
        build_store(Path(str(config.store)), maker, processes)

    return run


@pytest.fixture
def build(config: RunConfig, setup: RunSetup) -> Callable[..., None]:
    return make_build(config, setup)


def test_a_cached_teacher_gives_the_embeddings_of_the_live_one(
    config: RunConfig, setup: RunSetup, build: Callable[..., None]
) -> None:
    build()
    live, cached = make_dataset(config, setup), make_dataset(config, setup, with_teacher_pixels=False)
    cached.cache = open_store(Path(str(config.store)))
    teacher = LiveTeacher([Teacher(setup.teachers[0], torch.device("cpu"), autocast=None)])
    cached_teacher = StoredTeacher(ensemble_of(setup.teachers), torch.device("cpu"))
    steps = StepSampler([24], 6, seed=0, start=0, stop=12)  # three epochs over two views
    live_batches, cached_batches = step_loader(live, steps, workers=0), step_loader(cached, steps, workers=0)
    for live_batch, cached_batch in zip(live_batches, cached_batches, strict=True):
        assert live_batch.captions == cached_batch.captions
        assert torch.equal(live_batch.student_pixels, cached_batch.student_pixels)
        live_targets, targets = teacher.embed(live_batch), cached_teacher.embed(cached_batch)
        for expected, actual in ((live_targets.image, targets.image), (live_targets.text, targets.text)):
            torch.testing.assert_close(actual, expected, atol=2**-11, rtol=0)  # float16 rounding below 1


def live_embeddings(config: RunConfig, setup: RunSetup, view: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """What the teacher itself gives for a view, in float32."""
    dataset = make_dataset(config, setup)
    (batch,) = step_loader(dataset, [[View(view, index)]], workers=0)
    assert batch.bad == ()
    targets = LiveTeacher([Teacher(setup.teachers[0], torch.device("cpu"), autocast=None)]).embed(batch)
    return targets.image[0].numpy(), targets.text[0].numpy()


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 pairs make three shards of images and of texts."""
    monkeypatch.setattr(embedding_store, "SHARD_SIZE", 10)


@pytest.mark.usefixtures("small_shards")
def test_every_row_of_every_shard_is_that_of_its_own_pair_view_and_caption(
    config: RunConfig, setup: RunSetup, build: Callable[..., None]
) -> None:
    build()
    cache = open_store(Path(str(config.store)))
    rows = []
    for view in range(VIEWS):
        for index in range(24):
            (caption,) = setup.pairs.read(index).captions
            cached = cache.lookup(view, index, caption)
            assert cached is not None
            for actual, expected in zip(cached, live_embeddings(config, setup, view, index), strict=True):
                np.testing.assert_allclose(actual.astype(np.float32), expected, atol=2**-10)
            rows.append(cached[0].tobytes())
    assert len(set(rows)) == VIEWS * 24


@pytest.mark.usefixtures("small_shards")
def test_a_caption_is_embedded_and_stored_once(config: RunConfig, pairs_csv: Path, tmp_path: Path) -> None:
    header, *lines = pairs_csv.read_text().splitlines()
    pairs_csv.write_text("\n".join([header, *(line.split(" number")[0] for line in lines)]))  # four captions
    setup = load_setup(config, name="student", processes=Processes())
    make_build(config, setup)()
    folder = Path(str(config.store))
    assert np.load(text_shard(folder, 0))["row"].shape == (4, 24)
    assert not text_shard(folder, 1).exists()
    cache = open_store(folder)
    for index in range(24):
        cached = cache.lookup(0, index, setup.pairs.read(index).captions[0])
        assert cached is not None
        np.testing.assert_allclose(
            cached[1].astype(np.float32), live_embeddings(config, setup, 0, index)[1], atol=2**-10
        )


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_build_resumes_and_an_incomplete_cache_is_rejected(
    config: RunConfig, build: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(str(config.store))
    write_array = store_build.write_array
    files = 3 + 2 + 3 + VIEWS * 3  # captions, keys and their pairs, texts, images
    written: list[Path] = []

    def interrupt_at(count: int) -> Callable[..., None]:
        def write(path: Path, array: np.ndarray) -> None:
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(path)
            write_array(path, array)

        return write

    for count in range(files):
        monkeypatch.setattr(store_build, "write_array", interrupt_at(count))
        with pytest.raises(KeyboardInterrupt):
            build()
        with pytest.raises(ConfigError, match="not complete"):
            open_store(folder)
        assert not list(folder.rglob("*.tmp"))
    monkeypatch.setattr(store_build, "write_array", write_array)
    build()
    repeated = {path for path in written if written.count(path) > 1}
    assert repeated <= {folder / "texts" / "pairs.npy"}  # whatever is written is not computed again
    assert open_store(folder).captions == 24


@pytest.mark.usefixtures("small_shards")
def test_a_pair_that_cannot_be_read_for_a_moment_never_gets_the_embedding_of_another_one(
    config: RunConfig, setup: RunSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(config, max_bad=0.1)
    open_except = partial(fail_to_open, monkeypatch, setup)
    open_except(5)
    make_build(config, setup)()
    cached = make_dataset(config, setup, with_teacher_pixels=False)
    cached.cache = open_store(Path(str(config.store)))

    def check(view: int, index: int, *, expected: int) -> None:
        (batch,) = step_loader(cached, [[View(view, index)]], workers=0)
        live_batch = next(iter(step_loader(make_dataset(config, setup), [[View(view, expected)]], workers=0)))
        assert batch.captions == live_batch.captions == list(setup.pairs.read(expected).captions)
        assert torch.equal(batch.student_pixels, live_batch.student_pixels)
        assert batch.teacher_embeddings is not None
        for actual, live in zip(batch.teacher_embeddings, live_embeddings(config, setup, view, expected), strict=True):
            np.testing.assert_allclose(actual[0].float().numpy(), live, atol=2**-10)

    open_except()  # readable again: it has no embedding, so the next pair takes its place, with its own embedding
    check(1, 5, expected=6)
    check(1, 6, expected=6)
    assert len(cached.bad) == 1
    open_except(8)  # was readable when the cache was built
    check(0, 8, expected=9)
    assert len(cached.bad) == 2


def test_a_read_error_that_passes_while_the_cache_is_built_leaves_no_gap(
    config: RunConfig, setup: RunSetup, build: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = set[int]()

    def fails_first(index: int) -> bool:
        fails = index % 5 == 0 and index not in failed
        failed.update([index] if fails else [])
        return fails

    fail_to_open(monkeypatch, setup, fails=fails_first)
    build()
    cache = open_store(Path(str(config.store)))
    assert len(failed) == 5
    assert all(cache.lookup(0, index, setup.pairs.read(index).captions[0]) for index in range(24))


@pytest.mark.usefixtures("small_shards")
def test_one_loader_reads_the_images_of_all_shards_and_views(
    config: RunConfig, pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, workers: int) -> Any:
        loaders.append(workers)
        return step_loader(*arguments, workers=workers)

    name = pairs_csv.read_text().splitlines()[13].split(",")[0]
    (pairs_csv.parent / name).write_bytes(b"no image")
    config = msgspec.structs.replace(config, max_bad=0.05)
    monkeypatch.setattr(store_build, "BATCH_SIZE", 4)
    monkeypatch.setattr(store_build, "step_loader", load)
    setup, content = load_setup(config, name="student", processes=Processes()), list[dict[str, bytes]]()
    for workers in (0, 2):
        loaders, cache = list[int](), tmp_path / f"cache-{workers}"
        make_build(msgspec.structs.replace(config, workers=workers, store=str(cache)), setup)()
        assert loaders == [workers] + [0] * VIEWS  # what is bad is tried once more
        content.append({str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*.*")})
    assert content[0] == content[1]
    rows = np.concatenate([np.load(image_shard(tmp_path / "cache-2", 1, shard))["row"] for shard in range(3)])
    assert [index for index, row in enumerate(rows) if not row.any()] == [12]


def test_what_the_teacher_does_not_embed_in_finite_numbers_is_bad(
    config: RunConfig, setup: RunSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a teacher that overflows in float16, for one image and for the caption of another."""
    embed_images, embed_captions = Teacher.embed_images, CaptionCache.__call__
    (caption,) = setup.pairs.read(7).captions

    def images(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        embeddings = embed_images(teacher, pixels)
        embeddings[5 if len(embeddings) == 24 else 0, 3] = np.nan  # what is bad is tried once more
        return embeddings

    def captions(cache: CaptionCache, texts: list[str]) -> torch.Tensor:
        embeddings = embed_captions(cache, texts)
        embeddings[texts.index(caption), 3] = np.inf
        return embeddings

    monkeypatch.setattr(Teacher, "embed_images", images)
    monkeypatch.setattr(CaptionCache, "__call__", captions)
    with pytest.raises(InputError, match=r"1 of 24 .*: The teacher's embedding of image 5 is not finite in fp32"):
        make_build(config, setup)()
    make_build(msgspec.structs.replace(config, max_bad=0.05), setup)()
    cache = open_store(Path(str(config.store)))
    rows = [cache.lookup(0, index, setup.pairs.read(index).captions[0]) for index in range(24)]
    assert [index for index, row in enumerate(rows) if row is None] == [5, 7]
    assert np.isfinite([row for row in rows if row is not None]).all()


def test_too_many_unreadable_images_stop_the_build(
    setup: RunSetup, build: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_open(monkeypatch, setup, *range(24))
    with pytest.raises(InputError, match=r"of 24 samples .* are bad"):
        build()


class OneOfTwo(Processes):
    """Another process has found other bad pairs."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, [(20, "elsewhere"), (21, "elsewhere")]] if isinstance(value, list) else [value]


@pytest.mark.usefixtures("small_shards")
def test_bad_pairs_of_all_processes_count_together_also_at_the_next_attempt(
    config: RunConfig, setup: RunSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_open(monkeypatch, setup, 5)
    config = msgspec.structs.replace(config, max_bad=0.1)  # two of 24
    for _ in range(2):
        with pytest.raises(InputError, match=r"3 of 24 samples .* are bad"):
            make_build(config, setup, OneOfTwo())()


@pytest.mark.usefixtures("small_shards")
def test_the_bad_pairs_of_a_cache_count_also_when_it_is_continued(
    config: RunConfig, setup: RunSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_open(monkeypatch, setup, 0, 5)
    make_build(msgspec.structs.replace(config, max_bad=0.1), setup)()  # two of 24
    cache = Path(str(config.store))
    assert list(cache.rglob("*.bad.json"))
    image_shard(cache, 0, 2).unlink()  # as if it had been interrupted; nothing is missing in this one
    (cache / COMPLETE).unlink()
    with pytest.raises(InputError, match=r"2 of 24 samples .* are bad"):
        make_build(msgspec.structs.replace(config, max_bad=0.05), setup)()
    assert not list(cache.rglob("*.bad.json"))  # and so are the files that lack them, to be made anew


def test_a_refused_job_removes_its_files_though_another_has_removed_some(setup: RunSetup, tmp_path: Path) -> None:
    bad, files = BadSamples(setup.pairs, max_share=0.1), [tmp_path / "removed.npy", tmp_path / "left.npy"]
    bad.add([(5, "here")])
    files[1].touch()
    with pytest.raises(InputError, match=r"3 of 24 samples .* are bad"):
        store_build.share_bad(bad, OneOfTwo(), files)
    assert not files[1].exists()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("processes", "bad"), [(1, (3, 12)), (2, (3, 7, 12))])
def test_a_store_that_was_refused_is_refused_again_until_the_images_are_repaired(
    processes: int, bad: tuple[int, ...], config: RunConfig, setup: RunSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of two processes keeps a file that lacks an image."""

    config = msgspec.structs.replace(config, max_bad=0.05)  # one of 24
    fail_to_open(monkeypatch, setup, *bad)
    setups = [copy.deepcopy(setup) for _ in range(processes)]  # a model of its own, whose tensors no other replaces

    def build(own: Processes) -> None:
        make_build(config, setups[own.rank], own)()

    for _ in range(2):
        for error in call_in_threads(processes, build):
            assert isinstance(error, InputError)
            assert f"{len(bad)} of 24 samples" in str(error)
    fail_to_open(monkeypatch, setup)
    assert call_in_threads(processes, build) == [None] * processes
    cache = open_store(Path(str(config.store)))
    assert all(cache.lookup(view, index, setup.pairs.read(index).captions[0]) for view in (0, 1) for index in range(24))


@pytest.mark.usefixtures("small_shards")
def test_a_file_that_another_job_finishes_between_two_processes_leaves_no_gap(
    config: RunConfig, setup: RunSetup, build: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    finished = (tmp_path / "cache").rename(tmp_path / "of the other job")
    path_of, ranks, is_listed, copied = ShardTask.path, dict[int, int](), threading.Event(), list[Path]()

    def path(task: ShardTask, folder: Path) -> Path:
        file = path_of(task, folder)
        if task.kind == "images" and ranks[threading.get_ident()] == 0 and (task.view, task.shard) == (VIEWS - 1, 2):
            is_listed.set()
        if task.kind == "images" and ranks[threading.get_ident()] == 1 and not copied:
            assert is_listed.wait(PATIENCE_S)
            copied.append(image_shard(folder, 0, 0))
            copied[0].parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image_shard(finished, 0, 0), copied[0])
        return file

    setups = [copy.deepcopy(setup) for _ in range(2)]

    def call(processes: Processes) -> None:
        ranks[threading.get_ident()] = processes.rank
        make_build(config, setups[processes.rank], processes)()

    monkeypatch.setattr(ShardTask, "path", path)
    assert call_in_threads(2, call) == [None, None]
    assert len(copied) == 1
    names = [{file.relative_to(folder) for file in folder.rglob("*")} for folder in (tmp_path / "cache", finished)]
    assert names[0] == names[1]


@pytest.mark.usefixtures("small_shards")
def test_a_file_that_another_job_removes_is_computed_again(
    build: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a job does that is refused for too many bad images."""
    share_bad, file = store_build.share_bad, image_shard(tmp_path / "cache", 1, 1)
    removed = list[Path]()

    def share_and_remove(*args: Any) -> None:
        share_bad(*args)
        if file.exists() and not removed:
            removed.append(file)
            file.unlink()

    monkeypatch.setattr(store_build, "share_bad", share_and_remove)
    build()
    assert removed
    assert file.exists()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("name", ["images/view-001/shard-00001.npy", "texts/shard-00002.npy", "texts/keys.npy"])
@pytest.mark.parametrize("lost_bytes", [None, 1])
def test_a_file_that_a_complete_cache_has_lost_is_refused_and_computed_again(
    lost_bytes: int | None, name: str, build: Callable[..., None], setup: RunSetup, tmp_path: Path
) -> None:
    build()
    cache, file = open_store(tmp_path / "cache"), tmp_path / "cache" / name
    content = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.*")}
    if lost_bytes is None:
        file.unlink()
    else:
        file.write_bytes(content[file][:-lost_bytes])
    expected = rf"{file.name} is (missing|damaged: it has \d+ bytes); expected {len(content[file])} bytes"
    with pytest.raises(ConfigError, match=expected):
        open_store(tmp_path / "cache")
    with pytest.raises(ConfigError, match=expected) as raised:  # by a run that has begun
        [cache.lookup(1, index, setup.pairs.read(index).captions[0]) for index in range(24)]
    assert "run the command again" in raised.value.hint
    build()
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.*")} == content


@pytest.mark.usefixtures("small_shards")
def test_a_flipped_bit_in_a_store_is_an_error_and_no_other_embedding(
    build: Callable[..., None], setup: RunSetup, tmp_path: Path
) -> None:
    build()

    def embeddings() -> list[Any]:
        cache = open_store(tmp_path / "cache")
        found = [cache.lookup(view, i, setup.pairs.read(i).captions[0]) for view in range(VIEWS) for i in range(24)]
        return [row and tuple(part.tobytes() for part in row) for row in found]

    expected, rng = embeddings(), np.random.default_rng(0)
    assert None not in expected
    for file in [*tmp_path.glob("cache/images/*/*.npy"), *tmp_path.glob("cache/texts/*.npy")]:
        content = file.read_bytes()
        for place in rng.integers(0, len(content), 20).tolist():
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            if (place < 128 and file.name != "keys.npy") or file.name == "pairs.npy":  # neither is read any more
                assert embeddings() == expected
                continue
            with pytest.raises(ConfigError, match="has changed since it was written"):
                embeddings()
        file.write_bytes(content)


@pytest.mark.usefixtures("small_shards")
def test_damaged_keys_are_computed_again(build: Callable[..., None], tmp_path: Path) -> None:
    build()
    keys = tmp_path / "cache" / "texts" / "keys.npy"
    content = keys.read_bytes()
    keys.write_bytes(content[:-1] + b"\0")
    with pytest.raises(ConfigError, match="damaged"):
        open_store(tmp_path / "cache")
    build()
    assert keys.read_bytes() == content
    open_store(tmp_path / "cache")


def test_a_copy_of_the_data_and_of_the_teacher_in_other_folders_uses_the_same_cache(
    config: RunConfig, pairs_csv: Path, tmp_path: Path, build: Callable[..., None]
) -> None:
    build()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("pictures", "teacher"):
        shutil.move(tmp_path / name, moved / name)
    shutil.move(pairs_csv, moved / "other-name.csv")
    changed = msgspec.structs.replace(config, data=str(moved / "other-name.csv"), teacher=str(moved / "teacher"))
    make_build(changed, load_setup(changed, name="student", processes=Processes()))()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")} == written != {}


def test_a_store_of_millions_of_rows_opens_at_once_and_its_rows_are_read_without_memory(tmp_path: Path) -> None:
    pairs, width = 1_000_000, 64
    keys = np.sort(np.random.default_rng(0).integers(0, 2**64, pairs, dtype=np.uint64))
    captions = {0: "first", pairs // 2: "middle", pairs - 1: "last"}
    for row, caption in captions.items():
        keys[row] = caption_key(caption)
    keys.sort()
    embedding_store.write_array(tmp_path / "texts" / "keys.npy", keys)
    manifest = StoreManifest(
        teacher="t", teacher_sha256="", logit_scale=1.0, embedding_size=width, views=1, seed=0,
        preprocessing=Preprocessing(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1)), data="d", pairs=pairs,
        crops=Crops(scale=(0.9, 1.0)), pairs_sha256="", precision="fp32",
    )  # fmt: skip
    embedding_store.write_bytes(tmp_path / "manifest.json", embedding_store.to_json(manifest))
    complete = CompleteStore(pairs, embedding_store.keys_crc32(tmp_path))
    embedding_store.write_bytes(tmp_path / "complete.json", embedding_store.to_json(complete))
    zeros = {
        rows: tmp_path / f"{rows}.npy" for rows in (embedding_store.SHARD_SIZE, pairs % embedding_store.SHARD_SIZE)
    }
    for rows, path in zeros.items():
        embedding_store.write_array(path, with_checksums(np.zeros((rows, width), np.float16)))
    for shard in range(embedding_store.shard_count(pairs)):
        for path in (image_shard(tmp_path, 0, shard), text_shard(tmp_path, shard)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(zeros[len(shard_rows(shard, pairs))])
    del keys
    tracemalloc.start()
    cache = open_store(tmp_path)
    for row in np.random.default_rng(1).integers(0, pairs, 300).tolist():
        assert cache.lookup(0, row, "first") is None  # its rows are zeros
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert cache.lookup(0, 0, "no such caption") is None


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"views": 3}, {"crops": Crops(scale=(0.5, 1.0))}, {"precision": "bf16"}]
)
def test_a_cache_with_another_setting_is_rejected_by_name(
    build: Callable[..., None], change: dict[str, object]
) -> None:
    build()
    (name,) = change
    with pytest.raises(UsageError, match=f"its {name} is"):
        build(**change)


def test_a_cache_of_other_teacher_weights_is_rejected(setup: RunSetup, build: Callable[..., None]) -> None:
    build()
    with torch.no_grad():
        setup.teachers[0].model.get_parameter("text.text_projection").add_(1e-3)
    with pytest.raises(UsageError, match="its teacher_sha256 is"):
        build()


@pytest.mark.parametrize(("seed", "refused"), [(0, False), (1, True)])
def test_of_two_jobs_that_begin_a_cache_at_once_the_second_shares_it_or_is_refused(
    seed: int, refused: bool, setup: RunSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write, writing = tmp_path / "cache", embedding_store.write_bytes, threading.Event()
    first = make_manifest(
        setup.teachers[0], setup.pairs, crops=Crops(scale=(0.5, 1.0)), seed=0, views=VIEWS, precision="fp32"
    )

    def slow(path: Path, *content: bytes) -> None:
        writing.set()
        time.sleep(0.2)
        write(path, *content)

    monkeypatch.setattr(embedding_store, "write_bytes", slow)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(claim_store, folder, first)
        assert writing.wait(PATIENCE_S)
        second = msgspec.structs.replace(first, seed=seed)
        with pytest.raises(UsageError, match="its seed is 0; expected 1") if refused else nullcontext():
            claim_store(folder, second)
        job.result()
    assert read_json(folder / "manifest.json", StoreManifest) == first
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]


def test_a_cache_whose_first_job_was_killed_is_begun_again(config: RunConfig, build: Callable[..., None]) -> None:
    folder = Path(str(config.store))
    folder.mkdir()
    (folder / f".manifest.json.{'0' * 32}.tmp").touch()
    build()
    open_store(folder)


def test_a_run_with_a_cache_completes(config: RunConfig, tmp_path: Path) -> None:
    student = run_distillation(config, tmp_path / "run", resume=False)
    assert (student / "open_clip_model.safetensors").is_file()
    assert len(list((tmp_path / "cache").glob("images/*/*.npy"))) == VIEWS


def test_a_cache_needs_a_number_of_views(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fixed number of views"):
        run_distillation(msgspec.structs.replace(config, views=0), tmp_path / "run", resume=False)
