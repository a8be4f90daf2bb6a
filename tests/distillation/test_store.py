"""A stored teacher gives the same embeddings as a live one, and a store of other data or settings is refused."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support import save_tiny_teacher
from thread_processes import call_in_threads
from tiny_runs import tiny_run

from clip_rd_edge.data.order import View
from clip_rd_edge.data.samples import Sample
from clip_rd_edge.data.tables import Table
from clip_rd_edge.distillation import embed, store
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.embed import ShardMaker, fill_store
from clip_rd_edge.distillation.loader import step_loader
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.setup import RunSetup, load_setup, make_dataset
from clip_rd_edge.distillation.store import TeacherStore, TeacherStores, open_store
from clip_rd_edge.distillation.student import crops_of
from clip_rd_edge.distillation.teacher import CaptionCache, LiveTeacher, Teacher
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.files import write_bytes

VIEWS = 2


@pytest.fixture
def config(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    teacher = str(save_tiny_teacher(tmp_path / "teacher"))
    recipe = {"steps": 5, "batch_size": 6}
    return tiny_run("clip-rd", recipe, data=str(pairs_csv), teacher=teacher, store=str(tmp_path / "store"), views=VIEWS)


def load(config: RunConfig) -> RunSetup:
    return load_setup(config, name="student", processes=Processes())


@pytest.fixture
def setup(config: RunConfig) -> RunSetup:
    return load(config)


def fill(config: RunConfig, setup: RunSetup, processes: Processes | None = None) -> None:
    teacher = Teacher(setup.teachers[0], torch.device("cpu"), autocast=None)
    maker = ShardMaker(config, teacher, setup.pairs, crops_of(config))
    fill_store(Path(str(config.store)), maker, processes or Processes(), max_bad=config.max_bad)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 pairs make three shards of images and of texts."""
    monkeypatch.setattr(store, "SHARD_SIZE", 10)


@pytest.fixture
def filled(config: RunConfig, setup: RunSetup, small_shards: None, tmp_path: Path) -> TeacherStore:
    fill(config, setup)
    return open_store(tmp_path / "store")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}


def unreadable(setup: RunSetup, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what makes images of these pairs unreadable, and all others readable."""
    assert isinstance(setup.pairs, Table)
    read_row = Table.read

    def choose(*indices: int) -> None:
        def read(table: Table, index: int) -> Sample:
            sample = read_row(table, index)
            return sample._replace(file=Path("missing.jpg")) if index in indices else sample

        monkeypatch.setattr(Table, "read", read)

    return choose


def live_embeddings(config: RunConfig, setup: RunSetup, view: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """What the teacher itself gives for a view, in float32."""
    (batch,) = step_loader(make_dataset(config, setup), [[View(view, index)]], workers=0)
    assert batch.bad == ()
    targets = LiveTeacher([Teacher(setup.teachers[0], torch.device("cpu"), autocast=None)]).embed(batch)
    return targets.image[0].numpy(), targets.text[0].numpy()


def test_every_row_of_every_shard_is_that_of_its_own_pair_view_and_caption(
    config: RunConfig, setup: RunSetup, filled: TeacherStore
) -> None:
    rows = []
    for view in range(VIEWS):
        for index in range(24):
            (caption,) = setup.pairs.read(index).captions
            stored = filled.lookup(view, index, caption)
            assert stored is not None
            for actual, expected in zip(stored, live_embeddings(config, setup, view, index), strict=True):
                np.testing.assert_allclose(actual.astype(np.float32), expected, atol=2**-10)
            rows.append(stored[0].tobytes())
    assert len(set(rows)) == VIEWS * 24


def test_a_build_that_is_interrupted_at_any_file_continues(
    config: RunConfig, setup: RunSetup, filled: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, written = contents(filled.folder), list[Path]()
    shutil.rmtree(filled.folder)

    def write(path: Path, *content: bytes) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(path)
        write_bytes(path, *content)

    for module in (store, embed):
        monkeypatch.setattr(module, "write_bytes", write)
    for count in range(len(expected)):  # noqa: B007  write reads it
        with pytest.raises(KeyboardInterrupt):
            fill(config, setup)
        with pytest.raises(InputError):
            open_store(filled.folder)
        assert not list(filled.folder.rglob("*.tmp"))
    count = -1
    fill(config, setup)
    assert contents(filled.folder) == expected
    assert len(written) == len(expected)  # nothing is computed twice


@pytest.mark.usefixtures("small_shards")
def test_a_pair_that_cannot_be_read_for_a_moment_never_gets_the_embedding_of_another_one(
    config: RunConfig, setup: RunSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(config, max_bad=0.1)
    choose = unreadable(setup, monkeypatch)
    choose(5)
    fill(config, setup)
    stored = make_dataset(config, setup, with_teacher_pixels=False)
    stored.store = TeacherStores((open_store(Path(str(config.store))),))

    def check(view: int, index: int, *, expected: int) -> None:
        (batch,) = step_loader(stored, [[View(view, index)]], workers=0)
        live_batch = next(iter(step_loader(make_dataset(config, setup), [[View(view, expected)]], workers=0)))
        assert batch.captions == live_batch.captions == list(setup.pairs.read(expected).captions)
        assert torch.equal(batch.student_pixels, live_batch.student_pixels)
        assert batch.teacher_embeddings is not None
        for actual, live in zip(batch.teacher_embeddings, live_embeddings(config, setup, view, expected), strict=True):
            np.testing.assert_allclose(actual[0].float().numpy(), live, atol=2**-10)

    choose()  # readable again: it has no embedding, so the next pair takes its place, with its own embedding
    check(1, 5, expected=6)
    check(1, 6, expected=6)
    assert len(stored.bad) == 1
    choose(8)  # was readable when the store was built
    check(0, 8, expected=9)
    assert len(stored.bad) == 2


def test_what_the_teacher_does_not_embed_in_finite_numbers_is_bad(
    config: RunConfig, setup: RunSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a teacher that overflows in float16, for one image and for the caption of another."""
    embed_images, embed_captions = Teacher.embed_images, CaptionCache.__call__
    (caption,) = setup.pairs.read(7).captions

    def images(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        embeddings = embed_images(teacher, pixels)
        embeddings[5, 3] = np.nan
        return embeddings

    def captions(cache: CaptionCache, texts: list[str], ids: torch.Tensor | None = None) -> torch.Tensor:
        embeddings = embed_captions(cache, texts, ids)
        embeddings[texts.index(caption), 3] = np.inf
        return embeddings

    monkeypatch.setattr(Teacher, "embed_images", images)
    monkeypatch.setattr(CaptionCache, "__call__", captions)
    with pytest.raises(InputError, match="image 5 is not finite in fp32"):
        fill(config, setup)
    fill(msgspec.structs.replace(config, max_bad=0.05), setup)
    filled = open_store(Path(str(config.store)))
    rows = [filled.lookup(0, index, setup.pairs.read(index).captions[0]) for index in range(24)]
    assert [index for index, row in enumerate(rows) if row is None] == [5, 7]
    assert np.isfinite([row for row in rows if row is not None]).all()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("processes", "bad"), [(1, (3, 12)), (2, (3, 7, 12))])
def test_a_store_that_was_refused_is_refused_again_until_the_images_are_repaired(
    processes: int, bad: tuple[int, ...], config: RunConfig, setup: RunSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process keeps a file that lacks an image, and what all have met counts together."""
    config = msgspec.structs.replace(config, max_bad=0.05)  # one of 24
    choose = unreadable(setup, monkeypatch)
    choose(*bad)
    setups = [copy.deepcopy(setup) for _ in range(processes)]  # a model of its own, whose tensors no other replaces

    def fill_own(own: Processes) -> None:
        fill(config, setups[own.rank], own)

    for _ in range(2):
        for error in call_in_threads(processes, fill_own):
            assert isinstance(error, InputError)
            assert "of 24 samples" in str(error)
    choose()
    assert call_in_threads(processes, fill_own) == [None] * processes
    filled = open_store(Path(str(config.store)))
    assert all(
        filled.lookup(view, index, setup.pairs.read(index).captions[0]) for view in (0, 1) for index in range(24)
    )


def test_a_file_that_a_complete_store_has_lost_is_refused_and_computed_again(
    config: RunConfig, setup: RunSetup, filled: TeacherStore
) -> None:
    content = contents(filled.folder)
    for name, lost_bytes in (("images/view-001/shard-00001.npy", None), ("texts/keys.npy", 1)):
        file = filled.folder / name
        if lost_bytes is None:
            file.unlink()
        else:
            file.write_bytes(content[name][:-lost_bytes])
        with pytest.raises(ConfigError, match=file.name):
            open_store(filled.folder)
        with pytest.raises(ConfigError, match=file.name):  # by a run that has begun
            [filled.lookup(1, index, setup.pairs.read(index).captions[0]) for index in range(24)]
        fill(config, setup)
        assert contents(filled.folder) == content


def test_a_flipped_bit_in_a_store_is_an_error_and_no_other_embedding(
    config: RunConfig, setup: RunSetup, filled: TeacherStore
) -> None:
    def embeddings() -> list[Any]:
        opened = open_store(filled.folder)
        found = [opened.lookup(view, i, setup.pairs.read(i).captions[0]) for view in range(VIEWS) for i in range(24)]
        return [row and tuple(part.tobytes() for part in row) for row in found]

    expected, rng = embeddings(), np.random.default_rng(0)
    assert None not in expected
    for file in [*filled.folder.glob("images/*/*.npy"), *filled.folder.glob("texts/*.npy")]:
        content = file.read_bytes()
        for place in rng.integers(0, len(content), 20).tolist():
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            if place < 128:  # which is not read
                assert embeddings() == expected
                continue
            with pytest.raises(ConfigError, match="has changed since it was written"):
                embeddings()
        file.unlink()  # as the hint says
        fill(config, setup)
        assert file.read_bytes() == content


def test_a_store_of_anything_else_is_refused_by_name(config: RunConfig, setup: RunSetup) -> None:
    def refuses(name: str, setup: RunSetup = setup, **options: Any) -> None:
        with pytest.raises(UsageError, match=f"its {name} is"):
            fill(msgspec.structs.replace(config, **options), setup)

    fill(config, setup)
    refuses("seed", seed=1)
    refuses("views", views=3)
    refuses("precision", teacher_precision="bf16")
    refuses("scale", recipe=msgspec.structs.replace(config.recipe, crop_scale=(0.5, 1.0)))
    refuses("decode", decode="full")
    table = Path(str(config.data))
    table.write_text(table.read_text().replace("number 7", "number 8"))
    refuses("pairs_sha256", load(config))
    with torch.no_grad():
        setup.teachers[0].model.get_parameter("text.text_projection").add_(1e-3)
    refuses("teacher_sha256", setup)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("seed", [0, 1])
def test_of_two_jobs_that_fill_a_store_at_once_the_second_waits_and_shares_it_or_is_refused(
    seed: int, config: RunConfig, setup: RunSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, compute = list[int](), ShardMaker.compute

    def slow(maker: ShardMaker, tasks: Any) -> Any:
        computed.append(maker.manifest.seed)
        for shard in compute(maker, tasks):
            time.sleep(0.02)
            yield shard

    monkeypatch.setattr(ShardMaker, "compute", slow)
    other, same = msgspec.structs.replace(config, seed=seed), copy.deepcopy(setup)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fill, config, setup)
        while not computed:
            time.sleep(0.01)
        second = pool.submit(fill, other, same)
        first.result()
        error = second.exception()
    assert isinstance(error, UsageError) if seed else error is None, repr(error)
    assert computed == [0] * 2  # texts and images: the second finds nothing left to do
    open_store(Path(str(config.store)))
