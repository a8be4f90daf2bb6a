"""Packed data are read like any other, and an interrupted call goes on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clip_rd_edge as edge
from clip_rd_edge.data import webdataset as pack
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.samples import Samples
from clip_rd_edge.data.webdataset import Shards
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.paths import Typed


@pytest.fixture(autouse=True)
def few_samples_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "SHARD_SAMPLES", 4)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten images of 80 × 60 pixels in several formats, of which one is turned by EXIF, and a small one."""
    rng, rows = np.random.default_rng(0), [("filepath", "title")]
    for number in range(11):
        path = tmp_path / f"{number}.{('jpg', 'png', 'bmp')[number % 3]}"
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            (80, 60) if number else (30, 40)
        )
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 3 else 1
        noise.save(path, exif=exif)
        rows.append((str(path), f"caption {number}"))
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "pairs.csv"


def captions(samples: Samples) -> Sequence[str]:
    return [samples.read(index).captions[0] for index in range(len(samples))]


def test_packed_pairs_are_the_pairs_with_smaller_images_in_an_order_of_chance(table: Path, tmp_path: Path) -> None:
    packed = edge.pack(table, output=tmp_path / "shards", edge=40)
    assert packed.source == str(tmp_path / "shards" / "{00000..00002}.tar")
    assert packed.bytes == sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar"))
    pairs, source = load_pairs(Typed(packed.source)), load_pairs(Typed(str(table)))
    assert (packed.samples, packed.left_out, pairs.problems.count) == (11, 0, 0)
    found = captions(pairs)
    assert sorted(found) == sorted(captions(source)) != found
    for index, caption in enumerate(found):
        image, original = pairs.read(index).image(), source.read(captions(source).index(caption)).image()
        assert image.size == {(80, 60): (53, 40), (60, 80): (40, 53)}.get(original.size, original.size)
        difference = np.asarray(image, float) - np.asarray(original.resize(image.size), float)
        assert np.abs(difference).mean() < 6
    (small,) = (pairs.read(index).file for index, caption in enumerate(found) if caption == "caption 0")
    assert small is not None
    assert small.read_bytes() == (tmp_path / "0.jpg").read_bytes()


def test_an_interrupted_call_goes_on_and_makes_what_an_uninterrupted_one_makes(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge.pack(table, output=tmp_path / "whole")
    write, written = pack._write, list[str]()

    def stopping(path: Path, *arguments: object, **options: object) -> object:
        written.append(path.name)
        if written == ["00000.tar", "00001.tar"]:
            raise KeyboardInterrupt
        return write(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pack, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        edge.pack(table, output=tmp_path / "shards")
    (tmp_path / "shards" / "00000.tar").write_bytes(b"cut off")
    edge.pack(table, output=tmp_path / "shards")
    assert written == ["00000.tar", "00001.tar", "00000.tar", "00001.tar", "00002.tar"]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("change", ["edge", "data", "foreign"])
def test_a_folder_with_anything_else_is_refused(change: str, table: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    if change == "foreign":
        shards.mkdir()
        (shards / "notes.txt").write_text("mine")
    else:
        edge.pack(table, output=shards)
    if change == "data":
        table.write_text(table.read_text().replace("caption 7", "caption 8"))
    with pytest.raises(UsageError) as error:
        edge.pack(table, output=shards, edge=256 if change == "edge" else 512)
    assert error.value.option == "output"


def test_what_cannot_be_read_is_left_out_and_counted_also_by_the_call_that_goes_on(table: Path, tmp_path: Path) -> None:
    (tmp_path / "5.bmp").write_bytes(b"BM damaged")
    for _ in range(2):
        with pytest.raises(InputError):
            edge.pack(table, output=tmp_path / "shards")
    for _ in range(2):
        packed = edge.pack(table, output=tmp_path / "shards", max_bad=0.1)
        assert (packed.samples, packed.left_out) == (10, 1)
    assert "caption 5" not in captions(load_pairs(Typed(packed.source)))


def test_class_folders_become_pairs_with_one_prompt_and_images_alone_stay_such(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (50, 40), name).save(tmp_path / "photos" / name / "a.png")
    packed = edge.pack(tmp_path / "photos", output=tmp_path / "pairs", template="a {} thing")
    assert sorted(captions(load_pairs(Typed(packed.source)))) == ["a blue thing", "a red thing"]
    alone = edge.pack(tmp_path / "photos", output=tmp_path / "alone", without_captions=True)
    images = load_pairs(Typed(alone.source), caption_key=None)
    assert isinstance(images, Shards)
    assert (len(images), images.counts.images, images.read(0).captions) == (2, 2, ())
    with pytest.raises(UsageError) as error:
        edge.pack(tmp_path / "photos", output=tmp_path / "imagenet", template="imagenet")
    assert error.value.option == "template"
