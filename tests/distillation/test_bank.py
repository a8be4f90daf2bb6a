"""The teacher's bank: read from a store, or filled by a run; and runs with either, in chunks and resumed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support import Watch, save_tiny_teacher
from tiny_runs import stop_at, tiny_run

import clip_rd_edge as edge
from clip_rd_edge.bundle.runs import read_metrics
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.run import check_folder, run_distillation
from clip_rd_edge.distillation.store import (
    QueueBank,
    StoredBank,
    TeacherStore,
    TeacherStores,
    image_shard,
    keys_file,
    load_rows,
    open_store,
    text_shard,
    write_rows,
)
from clip_rd_edge.distillation.teacher import Teacher
from clip_rd_edge.errors import UsageError
from clip_rd_edge.losses.terms import Ensemble

STEPS, BATCH_SIZE, WIDTH = 8, 6, 24
CPU = torch.device("cpu")


@pytest.fixture
def config(pairs_csv: Path, tmp_path: Path) -> RunConfig:
    save_tiny_teacher(tmp_path / "teacher")
    recipe = {"steps": STEPS, "batch_size": BATCH_SIZE, "bank_size": 16}
    return tiny_run(
        "clip-rd-bank", recipe, data=str(pairs_csv), teacher=str(tmp_path / "teacher"), views=2, checkpoint_every=3
    )


@pytest.fixture
def store(config: RunConfig, tmp_path: Path) -> TeacherStore:
    source = {"data": config.data, "teacher": config.teacher, "views": 2, "workers": 0, "recipe": "clip-rd-bank"}
    return open_store(edge.embed(output=tmp_path / "store", **source))


def stored(*stores: TeacherStore, size: int = 1_000, seed: int = 0) -> list[torch.Tensor]:
    ensemble = Ensemble((WIDTH,) * len(stores), (1.0,) * len(stores))
    bank = StoredBank(TeacherStores(stores), ensemble, size=size, seed=seed, device=CPU)
    rows = bank.with_batch(torch.empty(0), torch.empty(0))
    return [rows.image, rows.text]


@pytest.fixture
def lacking(store: TeacherStore, tmp_path: Path) -> TeacherStore:
    """A copy of the store, from which the tests take something."""
    return TeacherStore(Path(shutil.copytree(store.folder, tmp_path / "lacking")), store.manifest, store.captions)


def test_a_stored_bank_is_all_of_a_store_or_a_seeded_part_of_its_shards(
    store: TeacherStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_rd_edge.distillation.store.SHARD_SIZE", 10)
    everything = []
    for path_of in (lambda shard: image_shard(store.folder, 0, shard), lambda shard: text_shard(store.folder, shard)):
        rows = load_rows(path_of(0))
        everything.append(torch.from_numpy(rows.copy()).float())
        for shard in range(3):
            write_rows(path_of(shard), rows[10 * shard : 10 * (shard + 1)])
    assert all(map(torch.equal, stored(store), everything))
    drawn = set()
    for seed in range(5):  # a part of some shards, and nothing of others
        assert all(map(torch.equal, stored(store, size=3, seed=seed), stored(store, size=3, seed=seed)))
        for part, rows in zip(stored(store, size=3, seed=seed), everything, strict=True):
            places = [(rows == row).all(dim=1).nonzero().item() for row in part]
            assert places == sorted(set(places))
            assert len(places) == 3
            drawn.add(tuple(places))
    assert len(drawn) > 1


def test_a_caption_that_one_of_two_stores_lacks_is_left_out_of_both(store: TeacherStore, lacking: TeacherStore) -> None:
    for path in (text_shard(lacking.folder, 0), keys_file(lacking.folder)):
        write_rows(path, np.delete(load_rows(path), 5, axis=0))  # it could not be read when this store was built
    lacking = TeacherStore(lacking.folder, lacking.manifest, lacking.captions - 1)
    for stores in ((store, lacking), (lacking, store)):
        _, text = stored(*stores)
        assert text.shape == (23, 2 * WIDTH)
        assert torch.equal(text[:, :WIDTH], text[:, WIDTH:])


def test_an_image_without_a_finite_embedding_costs_a_run_one_step(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a teacher that overflows in float16: the bank must not keep the embedding."""
    embed, calls = Teacher.embed_images, list[Teacher]()

    def overflow_at_first(teacher: Teacher, pixels: torch.Tensor) -> torch.Tensor:
        embeddings = embed(teacher, pixels)
        if not calls:
            embeddings[2] = math.nan
        calls.append(teacher)
        return embeddings

    monkeypatch.setattr(Teacher, "embed_images", overflow_at_first)
    run_distillation(config, tmp_path / "run", resume=False)
    assert [line["loss"] is None for line in read_metrics(tmp_path / "run")] == [True] + [False] * (STEPS - 1)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_a_queue_goes_on_with_the_newest_embeddings_and_one_of_another_size_begins_anew(size: int) -> None:
    def seen(queue: QueueBank, *numbers: int) -> list[float]:
        for number in numbers:
            bank = queue.with_batch(torch.full((2, 2), float(number)), torch.full((2, 2), -float(number)))
        assert torch.equal(bank.text, -bank.image)
        return sorted(bank.image[:, 0].tolist())

    before, after = QueueBank(5, CPU), QueueBank(size, CPU)
    assert seen(before, 1, 2, 3, 4) == [2, 3, 3, 4, 4]
    after.load_state_dict(before.state_dict())
    assert seen(after, 5) == ([3, 4, 4, 5, 5] if size == 5 else [5, 5])
    assert seen(after, 6, 7, 8) == [5, 5, 6, 6, 7, 7, 8, 8][-size:]
    assert seen(QueueBank(1, CPU), 1) == [1]  # less than a batch


def test_a_run_that_goes_on_with_another_teacher_begins_its_queue_anew_and_takes_no_store(
    config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(MemoryError):
        run_distillation(config, tmp_path / "run", resume=False, reporter=Watch(on_step=stop_at(4)))
    with pytest.raises(UsageError) as refused:
        check_folder(msgspec.structs.replace(config, store=str(tmp_path / "store")), tmp_path / "run", resume=True)
    assert refused.value.option == "store"
    save_tiny_teacher(tmp_path / "teacher", seed=2)
    with pytest.raises(MemoryError):
        run_distillation(config, tmp_path / "run", resume=True, accept_changes=True, reporter=Watch(on_step=stop_at(7)))
    queue = torch.load(tmp_path / "run" / "checkpoints" / "step-6" / "state.pt", weights_only=True)["bank"]
    assert queue["seen"] == 3 * BATCH_SIZE  # of steps 4 to 6: step 3 was the last that was saved
