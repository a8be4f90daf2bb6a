from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path

import numpy as np
import pytest
import torch
from failing_datasets import Cramped, Killed, Refusing
from PIL import Image
from support import write_shards

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.order import StepSampler, View
from clip_rd_edge.distillation import loader as loader_module
from clip_rd_edge.distillation.loader import Batch, PairView, ViewDataset, lost_worker, step_loader
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.errors import ConfigError, InputError, LostProcessError, UnreachableError

STUDENT = Preprocessing(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
TEACHER = Preprocessing(size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_the_teacher_gets_the_same_crop_in_its_own_preprocessing(pairs_csv: Path) -> None:
    path = pairs_csv.parent / "pictures" / "0.png"
    Image.linear_gradient("L").convert("RGB").save(path)  # of which each crop has a mean of its own
    dataset = ViewDataset(load_pairs(str(pairs_csv)), STUDENT, [TEACHER], crops=Crops(scale=(0.1, 0.3)), seed=3)
    for epoch in range(4):
        student, (teacher,) = dataset[View(epoch, 0)][:2]
        assert teacher.shape == (16, 16, 3)
        assert teacher.mean() == pytest.approx(student.mean(), abs=2)


def test_the_views_of_an_image_are_all_different(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 300, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "pairs.csv").write_text("filepath,title\na.png,one\nb.png,two\n")
    dataset = ViewDataset(
        load_pairs(str(tmp_path / "pairs.csv")), STUDENT, [], crops=Crops(scale=(0.9, 1.0)), seed=0, views=8
    )
    views = [dataset[View(view, index)].student_pixels.tobytes() for view in range(8) for index in range(2)]
    assert len(set(views)) == 16  # nor are the two pairs, which show the same image, cropped alike


def test_a_pinned_batch_has_the_same_tensors_in_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor + 100)
    student, teacher, image, text = (torch.full((2,), value) for value in range(4))
    batch = Batch(student, (teacher, student), ["a", "b"], teacher_embeddings=(image, text)).pin_memory()
    assert batch.teacher_embeddings is not None
    tensors = batch.student_pixels, *batch.teacher_pixels, *batch.teacher_embeddings
    assert [int(tensor[0]) for tensor in tensors] == [100, 101, 100, 102, 103]
    assert batch.teacher_pixels[1] is batch.student_pixels  # pinned once


def test_scaled_decoding_shows_the_crops_of_full_decoding_and_the_same_pixels_of_what_is_no_jpeg(
    tmp_path: Path,
) -> None:
    rows, rng = ["filepath,title"], np.random.default_rng(0)
    for number in range(8):
        path = tmp_path / f"{number}.{('jpg', 'png')[number % 2]}"
        Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((700, 500)).save(path)
        rows.append(f"{path},{number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    pairs = load_pairs(str(tmp_path / "pairs.csv"))
    kinds = [
        ViewDataset(pairs, STUDENT, [TEACHER], crops=Crops(scale=(0.5, 1.0), decode=decode), seed=3)
        for decode in ("full", "scaled")
    ]
    assert [kind.min_edge for kind in kinds] == [None, 64]
    for index in range(8):
        full, scaled = (kind[View(0, index)] for kind in kinds)
        difference = np.abs(full.student_pixels.astype(int) - scaled.student_pixels)
        assert difference.mean() < 2
        assert (difference.max() == 0) == bool(index % 2)


class Slow(ViewDataset):
    """Takes a hundredth of a second for each pair."""

    def __getitem__(self, view: View) -> PairView:
        time.sleep(0.01)
        return super().__getitem__(view)


def test_workers_become_more_while_steps_wait_and_the_batches_stay_the_same(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_SECONDS", 0.0)
    monkeypatch.setattr(loader_module, "usable_cores", lambda: 2)
    monkeypatch.setattr(loader_module, "most_workers", lambda batch: 3)
    dataset, notes = Slow(load_pairs(str(pairs_csv)), STUDENT, [], crops=Crops(scale=(0.5, 1.0)), seed=3), list[str]()

    def load(workers: int) -> list[Batch]:
        return list(
            step_loader(dataset, StepSampler([24], 2, seed=3, steps=range(90)), workers=workers, note=notes.append)
        )

    grown = load(-1)
    assert [note.rpartition("there will be ")[2] for note in notes[:2]] == ["2", "3"]
    assert len(notes) == 3
    assert [batch.captions for batch in load(2)] == [batch.captions for batch in grown]
    assert len(grown) == 90
    assert len(notes) == 4  # a number that was asked for stays


def test_a_batch_has_the_ids_of_its_captions(pairs_csv: Path) -> None:
    dataset = ViewDataset(load_pairs(str(pairs_csv)), STUDENT, [], crops=Crops(scale=(0.5, 1.0)), seed=3)
    dataset.tokenizers = (lengths, lengths)
    for workers in (0, 1):
        (batch,) = step_loader(dataset, StepSampler([24], 5, seed=3, steps=range(1)), workers=workers)
        assert batch.student_ids is not None
        assert [batch.student_ids.tolist(), batch.teacher_ids[0].tolist()] == [[[len(c)] for c in batch.captions]] * 2


def lengths(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption)] for caption in captions])


@pytest.fixture
def shards(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The pairs of the table as three shards of eight; image 5 is not readable, caption 14 is empty."""
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(pairs_csv.parent / "cache"))
    return write_shards(pairs_csv, {"0005.png": b"not an image", "0014.txt": b" \n"})


def shard_batches(source: str, start: int, *, workers: int, max_bad: float) -> tuple[list[Batch], ViewDataset]:
    dataset = ViewDataset(
        load_pairs(source), STUDENT, [TEACHER], crops=Crops(scale=(0.5, 1.0)), seed=3, max_bad=max_bad
    )
    sampler = StepSampler([24], 5, seed=3, steps=range(start, 9))
    return list(step_loader(dataset, sampler, workers=workers)), dataset


def test_shards_resume_identically_in_workers_and_skip_bad_samples(shards: str) -> None:
    uninterrupted, dataset = shard_batches(shards, 0, workers=0, max_bad=0.1)
    resumed, _ = shard_batches(shards, 4, workers=2, max_bad=0.1)
    for expected, actual in zip(uninterrupted[4:], resumed, strict=True):
        assert expected.captions == actual.captions
        assert expected.bad == actual.bad
        assert torch.equal(expected.student_pixels, actual.student_pixels)
        assert torch.equal(expected.teacher_pixels[0], actual.teacher_pixels[0])
    assert {index for batch in uninterrupted for index, _ in batch.bad} == {5, 14}
    assert len(dataset.bad) == 2
    numbers = {int(caption.split()[-1]) for batch in uninterrupted for caption in batch.captions}
    assert numbers.isdisjoint({5, 14})
    assert {6, 15} <= numbers


def test_too_many_bad_samples_are_an_error_from_a_worker_too(shards: str) -> None:
    with pytest.raises(InputError, match=r"^\d of 24 samples of .* are bad, more than 1\.00%"):
        shard_batches(shards, 0, workers=2, max_bad=0.01)


def loader_with_a_worker(kind: type[ViewDataset], pairs_csv: Path) -> Iterator[Batch]:
    dataset = kind(load_pairs(str(pairs_csv)), STUDENT, [TEACHER], crops=Crops(scale=(0.5, 1.0)), seed=3)
    return step_loader(dataset, StepSampler([24], 5, seed=3, steps=range(9)), workers=1)


def test_a_batch_too_large_for_shared_memory_ends_the_run_in_a_sentence(pairs_csv: Path) -> None:
    """torch prints an error and waits for the lost batch for ever."""
    loader = loader_with_a_worker(Cramped, pairs_csv)
    with pytest.raises(UnreachableError, match=r"a batch of 0\.0 MB through shared memory: File too large") as caught:
        next(loader)
    assert "workers 0" in caught.value.hint


def test_an_error_of_our_own_keeps_its_sentence_and_its_hint_from_a_worker(pairs_csv: Path) -> None:
    with pytest.raises(ConfigError, match=r"^It is damaged\.$") as caught:
        next(loader_with_a_worker(Refusing, pairs_csv))
    assert caught.value.hint == "repair it"
    assert "in __getitem__" in str(caught.value.__cause__)  # where it was raised, for --debug


def test_a_worker_that_is_killed_ends_the_run_in_a_sentence(pairs_csv: Path) -> None:
    loader = loader_with_a_worker(Killed, pairs_csv)
    with pytest.raises(RuntimeError) as caught:
        next(loader)
    assert isinstance(lost_worker(caught.value), LostProcessError)


def test_a_spawned_worker_does_not_run_the_users_script_again(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(*_: object) -> set[str]:
        return {key for key in spawn.get_preparation_data("worker") if key.startswith("init_main")}

    class Recording(torch.utils.data.DataLoader):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            sent.append(keys())
            return super().__iter__()

    sent = list[set[str]]()
    monkeypatch.setattr(loader_module, "DataLoader", Recording)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)  # a process of xdist has none
    assert keys()
    dataset = ViewDataset(load_pairs(str(pairs_csv)), STUDENT, (), crops=Crops(scale=(0.5, 1.0)), seed=3)
    assert len(list(step_loader(dataset, StepSampler([24], 5, seed=3, steps=range(1)), workers=0))) == 1
    assert sent == [set()]
    assert keys()
