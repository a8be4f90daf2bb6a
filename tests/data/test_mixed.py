"""Pairs, images without captions and captions without images in one data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image
from support import write_tar

from clip_rd_edge.data.load import Mixed, TrainingData, load_pairs, load_samples
from clip_rd_edge.data.order import EpochOrder
from clip_rd_edge.data.samples import Counts, Sample, Samples
from clip_rd_edge.errors import InputError


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Five frames of different widths: 10, 11, … pixels."""
    folder = tmp_path / "frames"
    (folder / "more").mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (10 + number, 9)).save(folder / ("more" if number > 2 else "") / f"{number}.png")
    return folder


def given(texts: Sequence[str]) -> Callable[[str, str], Sequence[str]]:
    """Stand for the reader of label files."""
    return lambda name, column: texts


def widths(samples: Samples) -> list[int]:
    return [samples.read(index).image().width for index in range(len(samples))]


def captions(samples: Samples) -> list[tuple[str, ...]]:
    return [samples.read(index).captions for index in range(len(samples))]


def test_a_folder_of_frames_and_a_list_of_labels(frames: Path) -> None:
    samples = load_samples(TrainingData(images=str(frames), texts="labels.txt"), given(["cat", "dog", "cat"]))
    assert widths(samples) == [10, 11, 12, 13, 14]
    assert captions(samples) == [("cat",), ("dog",), ("cat",), ("dog",), ("cat",)]
    assert samples.counts == Counts(pairs=0, images=5, texts=2)
    assert str(samples.counts) == "5 images without captions and 2 texts"
    assert list(samples.groups) == [5]


def test_more_texts_than_images_share_the_rows(frames: Path) -> None:
    texts = [f"text {number}" for number in range(12)]
    samples = load_samples(TrainingData(images=str(frames), texts="captions.txt"), given(texts))
    assert captions(samples)[1] == ("text 1", "text 6", "text 11")
    assert sorted(text for row in captions(samples) for text in row) == sorted(texts)


def test_templates_are_filled_with_the_texts(frames: Path) -> None:
    source = TrainingData(images=str(frames), texts="labels.txt", templates=("a photo of a {}.", "one {c}"))
    samples = load_samples(source, given(["cat", "dog"]))
    assert captions(samples)[1] == ("a photo of a dog.", "one dog")


def test_images_beside_pairs_are_shown_with_captions_of_pairs(pairs_csv: Path, frames: Path) -> None:
    samples = load_samples(TrainingData(data=str(pairs_csv), images=str(frames)), given([]))
    assert widths(samples) == [48] * 24 + [10, 11, 12, 13, 14]
    assert captions(samples)[:24] == captions(load_pairs(str(pairs_csv)))
    assert captions(samples)[24:] == [captions(samples)[row * 24 // 5] for row in range(5)]
    assert str(samples.counts) == "24 pairs and 5 images without captions"
    assert list(samples.groups) == [24, 5]


def test_texts_beside_pairs_are_shown_with_images_of_pairs(pairs_csv: Path) -> None:
    few = load_samples(TrainingData(data=str(pairs_csv), texts="labels.txt"), given(["cat", "dog"]))
    assert captions(few)[24:] == [("cat",), ("dog",)]
    assert few.read(25).image().tobytes() == few.read(12).image().tobytes()  # evenly spaced among the 24 pairs
    many = load_samples(
        TrainingData(data=str(pairs_csv), texts="texts.txt"), given([f"{number}" for number in range(30)])
    )
    assert len(many) == 48
    assert captions(many)[24:26] == [("0", "24"), ("1", "25")]
    assert str(many.counts) == "24 pairs and 30 texts"


def test_images_from_shards_with_and_without_captions(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    members = {f"{n:04d}.png": file.read_bytes() for n, file in enumerate(sorted(frames.rglob("*.png")))}
    members = dict(sorted({**members, "0001.txt": b"cat"}.items())) | {"alone.txt": b"dog"}
    path = write_tar(tmp_path / "frames.tar", members)
    images = load_pairs(str(path), caption_key=None)
    assert widths(images) == [10, 11, 12, 13, 14]
    assert images.problems.examples == (f"{path}: alone has no image (.jpg, .png, .webp)",)
    samples = Mixed(None, images, ("cat",))
    assert (len(samples), samples.problems.total) == (5, 1)
    with pytest.raises(InputError, match="has 1 pair"):  # the same shard, read as pairs, has an index of its own
        load_pairs(str(path))


@pytest.mark.parametrize("texts", [24, 5])
def test_texts_beside_pairs_are_read_with_the_pairs_whose_images_they_have(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, texts: int
) -> None:
    pairs = load_pairs(str(pairs_csv))
    monkeypatch.setattr(type(pairs), "groups", [7, 7, 7, 3])
    samples = Mixed(pairs, None, tuple(map(str, range(texts))))
    order = EpochOrder(samples.groups, seed=0, window=1)
    seen = list[int]()
    for _ in range(4):
        (group,) = order.groups(0, len(seen), windows=1, epochs=1)
        size = samples.groups[group].sum()
        rows = order.indices(0, len(seen), len(seen) + size).tolist()
        monkeypatch.setattr(pairs, "read", lambda index, group=group: Sample((), index // 7 == group))
        assert all(samples.read(row).file for row in rows)
        assert sum(row < 24 for row in rows) == pairs.groups[group]
        seen += rows
    assert sorted(seen) == list(range(24 + texts))


def test_texts_alone_are_as_many_rows_without_images() -> None:
    samples = load_samples(TrainingData(texts="labels.txt"), given(["cat", "dog", "cat"]))
    assert captions(samples) == [("cat",), ("dog",)]
    assert str(samples.counts) == "2 texts"
    assert (samples.read(0).file, samples.counts.has_images, list(samples.groups)) == (None, False, [2])
