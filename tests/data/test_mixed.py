"""Pairs, images without captions and captions without images in one data set."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from clip_rd_edge.data import tables as load
from clip_rd_edge.data import tables as text
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.mixed import (
    MixedSamples,
    TrainingData,
    describe_counts,
    has_images,
    load_images,
    load_samples,
    pair_count,
    sample_counts,
)
from clip_rd_edge.data.order import EpochOrder
from clip_rd_edge.data.samples import BadSamples, Pairs, fingerprint
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.runtime.labels import read_texts


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


def widths(samples: Pairs) -> list[int]:
    return [samples.open(index).width for index in range(len(samples))]


def captions(samples: Pairs) -> list[tuple[str, ...]]:
    return [samples.captions(index) for index in range(len(samples))]


def test_a_folder_of_frames_and_a_list_of_labels(frames: Path) -> None:
    samples = load_samples(TrainingData(images=str(frames), texts="labels.txt"), given(["cat", "dog", "cat"]))
    assert widths(samples) == [10, 11, 12, 13, 14]
    assert captions(samples) == [("cat",), ("dog",), ("cat",), ("dog",), ("cat",)]
    assert pair_count(samples) == 0
    assert sample_counts(samples) == {"pairs": 0, "images": 5, "texts": 2}
    assert describe_counts(samples) == "5 images without captions and 2 texts"
    assert list(samples.groups) == [5]


def test_a_tilde_is_the_home_folder_in_every_source(
    pairs_csv: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "labels.txt").write_text("red\ngreen\n")
    source = TrainingData(data=f"~/{pairs_csv.name}", images="~/frames", texts="~/labels.txt")
    assert sample_counts(load_samples(source, read_texts)) == {"pairs": 24, "images": 5, "texts": 2}
    shards = TrainingData(data="~/a/{0..3}.tar::b~/~.tar::~/c.tar")
    assert shards.data == f"{tmp_path}/a/{{0..3}}.tar::b~/~.tar::{tmp_path}/c.tar"


def test_more_texts_than_images_share_the_rows(frames: Path) -> None:
    texts = [f"text {number}" for number in range(12)]
    samples = load_samples(TrainingData(images=str(frames), texts="captions.txt"), given(texts))
    assert captions(samples)[1] == ("text 1", "text 6", "text 11")
    assert sorted(text for row in captions(samples) for text in row) == sorted(texts)


def test_texts_come_from_a_column_of_a_parquet_file(frames: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "captions.parquet"
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"TEXT": ["a cat ", None, "a dog", " ", "a cat"], "url": ["u"] * 5, "width": range(5), "empty": [""] * 5}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    source = TrainingData(images=str(frames), texts=str(path), csv_caption_key="TEXT")
    assert captions(load_samples(source, given(["unused"])))[:3] == [("a cat",), ("a dog",), ("a cat",)]
    for column, message in (("text", "no column 'text'.*TEXT"), ("width", "int64"), ("empty", "no text")):
        with pytest.raises(InputError, match=message):
            load_samples(TrainingData(images=str(frames), texts=str(path), csv_caption_key=column), given([]))


def test_templates_are_filled_with_the_texts(frames: Path) -> None:
    source = TrainingData(images=str(frames), texts="labels.txt", templates=("a photo of a {}.", "one {c}"))
    samples = load_samples(source, given(["cat", "dog"]))
    assert captions(samples)[1] == ("a photo of a dog.", "one dog")


def test_images_beside_pairs_are_shown_with_captions_of_pairs(pairs_csv: Path, frames: Path) -> None:
    samples = load_samples(TrainingData(data=str(pairs_csv), images=str(frames)), given([]))
    assert widths(samples) == [48] * 24 + [10, 11, 12, 13, 14]
    assert captions(samples)[:24] == captions(load_pairs(str(pairs_csv)))
    assert captions(samples)[24:] == [captions(samples)[row * 24 // 5] for row in range(5)]
    assert pair_count(samples) == 24
    assert describe_counts(samples) == "24 pairs and 5 images without captions"
    assert list(samples.groups) == [24, 5]


def test_texts_beside_pairs_are_shown_with_images_of_pairs(pairs_csv: Path) -> None:
    few = load_samples(TrainingData(data=str(pairs_csv), texts="labels.txt"), given(["cat", "dog"]))
    assert captions(few)[24:] == [("cat",), ("dog",)]
    assert few.open(25).tobytes() == few.open(12).tobytes()  # evenly spaced among the 24 pairs
    many = load_samples(
        TrainingData(data=str(pairs_csv), texts="texts.txt"), given([f"{number}" for number in range(30)])
    )
    assert len(many) == 48
    assert captions(many)[24:26] == [("0", "24"), ("1", "25")]
    assert describe_counts(many) == "24 pairs and 30 texts"


def test_all_three_together(pairs_csv: Path, frames: Path) -> None:
    samples = load_samples(TrainingData(data=str(pairs_csv), images=str(frames), texts="labels.txt"), given(["cat"]))
    assert describe_counts(samples) == "24 pairs, 5 images without captions and 1 text"
    assert captions(samples)[24:] == [("cat",)] * 5


def test_pairs_alone_stay_as_they_are(pairs_csv: Path) -> None:
    pairs = load_samples(TrainingData(data=str(pairs_csv)), given([]))
    assert not isinstance(pairs, MixedSamples)
    assert (pair_count(pairs), describe_counts(pairs)) == (24, "24 pairs")


def test_whatever_changes_has_another_fingerprint(pairs_csv: Path, frames: Path) -> None:
    source = TrainingData(data=str(pairs_csv), images=str(frames), texts="labels.txt")
    found = {
        fingerprint(load_samples(source, given(["cat", "dog"]))),
        fingerprint(load_samples(source, given(["dog", "cat"]))),
    }
    templates = TrainingData(**{**vars_of(source), "templates": ("a {}",)})
    found.add(fingerprint(load_samples(templates, given(["cat", "dog"]))))
    (frames / "0.png").unlink()
    found.add(fingerprint(load_samples(source, given(["cat", "dog"]))))
    assert len(found) == 4
    moved = frames.rename(frames.with_name("moved"))
    assert (
        fingerprint(load_samples(TrainingData(**{**vars_of(source), "images": str(moved)}), given(["cat", "dog"])))
        in found
    )


def vars_of(source: TrainingData) -> dict[str, object]:
    return {name: getattr(source, name) for name in source.__struct_fields__}


def test_images_from_a_table_with_one_column(frames: Path) -> None:
    table = frames.parent / "frames.csv"
    table.write_text("filepath\nframes/0.png\nframes/more/4.png\nframes/gone.png\n")
    images = load_images(str(table), column="filepath")
    assert widths(images) == [10, 14]
    assert "the image 'frames/gone.png' exists neither" in images.left_out[0]


@pytest.mark.parametrize("rows", [1 << 30, -1], ids=["in memory", "indexed"])
def test_an_image_with_several_captions_in_a_table_counts_once(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "INDEXED_ROWS", rows)
    monkeypatch.setattr(text, "_BLOCK_BYTES", 32)
    table = frames.parent / "frames.csv"
    names = ["0.png", "more/4.png", "gone.png"]
    table.write_text("filepath,title\n" + "".join(f"frames/{name},{number}\n" for number in range(5) for name in names))
    images = load_images(str(table), column="filepath")
    assert widths(images) == [10, 14]
    assert len(images.left_out) == 1
    assert len(load_pairs(str(table))) == 10


@pytest.mark.parametrize("rows", [1 << 30, -1], ids=["in memory", "indexed"])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_each_row_of_a_table_that_names_no_image_counts_as_bad(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, form: str
) -> None:
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "INDEXED_ROWS", rows)
    names = ["frames/0.png", "", "frames/gone.png", " ", "frames/gone.png", ""]
    table = frames.parent / f"frames.{form}"
    if form == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"filepath": [name or None for name in names]}), table)
    else:
        table.write_text("filepath,title\n" + "".join(f"{name},a cat\n" for name in names))
    images = load_images(str(table), column="filepath")
    assert widths(images) == [10]
    reasons = [message.partition(": ")[2] for message in images.left_out]
    assert [reason for reason in reasons if "gone.png" not in reason] == ["it names no image"] * 3
    assert len(reasons) == 4
    with pytest.raises(InputError, match=r"4 of 5 samples of .* are bad"):
        BadSamples(images)


def test_an_image_of_a_table_counts_whatever_its_caption_looks_like(frames: Path) -> None:
    table = frames.parent / "frames.csv"
    table.write_text("filepath,title\nframes/0.png,a cat, asleep\nframes/more/4.png,a dog, awake, outside\n")
    images = load_images(str(table), column="filepath")
    assert widths(images) == [10, 14]
    assert not images.left_out


def test_images_from_shards_with_and_without_captions(
    frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "frames.tar"
    with tarfile.open(path, "w") as archive:
        for number, file in enumerate(sorted(frames.rglob("*.png"))):
            archive.add(file, f"{number:04d}.png")
            if number == 1:
                info = tarfile.TarInfo(f"{number:04d}.txt")
                info.size = 3
                archive.addfile(info, io.BytesIO(b"cat"))
        info = tarfile.TarInfo("alone.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"dog"))
    images = load_images(str(path), column="filepath")
    assert widths(images) == [10, 11, 12, 13, 14]
    assert [message.partition(": ")[2] for message in images.left_out] == ["alone has no image (.jpg, .png, .webp)"]
    samples = MixedSamples(None, images, ("cat",))
    assert (len(samples), len(samples.left_out), samples.lost) == (5, 1, 0)
    with pytest.raises(InputError, match="has 1 pair"):  # the same shard, read as pairs, has an index of its own
        load_pairs(str(path))


class Prefetched:
    """Records which groups are fetched; the rest is a table's."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs, self.groups, self.fetched = pairs, pairs.groups, list[int]()

    def __getattr__(self, name: str) -> object:
        return getattr(self.pairs, name)

    def __len__(self) -> int:
        return len(self.pairs)

    def prefetch(self, groups: list[int]) -> None:
        self.fetched += groups


def test_each_part_fetches_its_own_groups(pairs_csv: Path) -> None:
    pairs, images = (Prefetched(load_pairs(str(pairs_csv))) for _ in range(2))
    MixedSamples(pairs, images).prefetch([0, 1])  # type: ignore[arg-type]
    assert (pairs.fetched, images.fetched) == ([0], [0])


@pytest.mark.parametrize("texts", [24, 18, 5])
def test_texts_beside_pairs_are_read_with_the_pairs_whose_images_they_have(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, texts: int
) -> None:
    pairs = Prefetched(load_pairs(str(pairs_csv)))
    pairs.groups = [7, 7, 7, 3]
    samples = MixedSamples(pairs, None, tuple(map(str, range(texts))))  # type: ignore[arg-type]
    order = EpochOrder(samples.groups, seed=0, window=1)
    seen = list[int]()
    for _ in range(4):
        (group,) = order.groups(0, len(seen), windows=1, epochs=1)
        size = samples.groups[group].sum()
        rows = order.indices(0, len(seen), len(seen) + size).tolist()
        monkeypatch.setattr(pairs, "open", lambda index, group=group: index // 7 == group)
        assert all(map(samples.open, rows))
        assert sum(row < 24 for row in rows) == pairs.groups[group]
        seen += rows
    assert sorted(seen) == list(range(24 + texts))
    samples.prefetch([3])
    assert pairs.fetched == [3]


def test_texts_alone_are_as_many_rows_without_images() -> None:
    samples = load_samples(TrainingData(texts="labels.txt"), given(["cat", "dog", "cat"]))
    assert captions(samples) == [("cat",), ("dog",)]
    assert describe_counts(samples) == "2 texts"
    assert (pair_count(samples), has_images(samples), list(samples.groups)) == (0, False, [2])


@pytest.mark.parametrize(
    ("source", "texts", "message"),
    [
        ({}, [], "There are no training data"),
        ({"images": "frames"}, [], "There are images, but no captions to train on"),
        ({"images": "frames", "templates": ("a {}",)}, [], "There are templates, but no texts"),
        (
            {"images": "frames", "texts": "labels.txt", "templates": ("a {}",) * 1001},
            ["cat"],
            "There are 1,001 templates; the limit is 1,000",
        ),
    ],
)
def test_what_is_missing_is_said(
    frames: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, object], texts: list[str], message: str
) -> None:
    monkeypatch.chdir(frames.parent)
    with pytest.raises(UsageError, match=message) as error:
        load_samples(TrainingData(**source), given(texts))  # type: ignore[arg-type]
    assert "name " in error.value.hint


def test_sources_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no images"):
        load_images(str(tmp_path / "empty"), column="filepath")
    (tmp_path / "table.csv").write_text("filepath\ngone.png\n")
    with pytest.raises(InputError, match=r"has no images\. 1 were left out; the first: .*gone\.png"):
        load_images(str(tmp_path / "table.csv"), column="filepath")
    with pytest.raises(InputError, match="s3://bucket/photos are not on this machine"):
        load_images("s3://bucket/photos", column="filepath")
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_images(str(tmp_path / "nowhere"), column="filepath")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are Unicode")
def test_a_name_that_is_not_utf_8_is_a_name_like_any_other(frames: Path) -> None:
    path = next(frames.rglob("*.png")).rename(frames / os.fsdecode(b"caf\xe9.png"))
    first = fingerprint(load_images(str(frames), column="filepath"))
    path.rename(frames / os.fsdecode(b"caf\xe8.png"))
    assert fingerprint(load_images(str(frames), column="filepath")) != first


def test_links_in_a_folder_of_images_are_followed(frames: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "phone").symlink_to(frames)
    (tmp_path / "links" / "dead.png").symlink_to(tmp_path / "gone.png")
    images = load_images(str(tmp_path / "links"), column="filepath")
    assert len(images) == 1 + len(load_images(str(frames), column="filepath"))
    with pytest.raises(InputError, match="a link to something that does not exist"):
        images.open(0)
