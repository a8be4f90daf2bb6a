from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clip_rd_edge.data import shard_files
from clip_rd_edge.data import shard_index as tars
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.samples import BadSamples
from clip_rd_edge.data.webdataset import expand_braces
from clip_rd_edge.errors import InputError, UnreachableError

Factory = Callable[..., Any]


@pytest.fixture
def shards(tmp_path: Path, write_tar: Factory, encode_image: Factory) -> Path:
    """Shards 0 and 1 of three samples each; sample i has grey level i and the caption `grey i`."""
    for shard in (0, 1):
        members = {}
        for i in range(3 * shard, 3 * shard + 3):
            kind = ("png", "webp")[i % 2]
            members |= {f"{i:04d}.{kind.upper()}": encode_image(i, kind), f"{i:04d}.txt": f"grey {i}\n".encode()}
        write_tar(tmp_path / f"{shard:03d}.tar", members)
    return tmp_path


def greys(pairs: Any) -> list[tuple[int, str]]:
    return [(pairs.read(i).image().getpixel((0, 0))[0], pairs.read(i).captions[0]) for i in range(len(pairs))]


def test_a_brace_range_yields_all_samples_in_order(shards: Path) -> None:
    pairs = load_pairs(f"{shards}/{{000..001}}.tar")
    assert greys(pairs) == [(i, f"grey {i}") for i in range(6)]
    assert pairs.problems.examples == ()


def test_a_source_of_weight_two_is_shown_twice_per_epoch(shards: Path) -> None:
    pairs = load_pairs(f"{shards}/000.tar::{shards}/001.tar", weights="1::2")
    assert [grey for grey, _ in greys(pairs)] == [0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_captions_from_json(tmp_path: Path, write_tar: Factory, encode_image: Factory) -> None:
    def as_json(**keys: object) -> bytes:
        return msgspec.json.encode(keys)

    path = write_tar(
        tmp_path / "0.tar",
        {
            "a.png": encode_image(0),
            "a.json": as_json(caption="from json", more=[None, "one", "", " two "]),
            "b.png": encode_image(1),
            "b.txt": b"from text",
            "b.json": as_json(caption="from json", more=["three"]),
            "c.png": encode_image(2),
            "c.json": as_json(capton="typo", more=3),
            "d.png": encode_image(3),
            "d.json": as_json(more=[None]),
            "e.png": encode_image(4),
            "e.json": json.dumps({"caption": "of Python", "score": math.nan, "more": "\ud83d"}).encode(),
            "f.png": encode_image(5),
            "f.json": b'{"caption": NaN',
            "g.png": encode_image(6),
            "g.txt": b"['a dog', 'two dogs']",
            "g.json": as_json(more='["a dog"]'),
        },
    )
    pairs = load_pairs(str(path))
    assert [pairs.read(i).captions for i in (0, 1, 4)] == [("from json",), ("from text",), ("of Python",)]
    with pytest.raises(InputError, match=r"0\.tar: c\.json has no key 'caption'\. Did you mean 'capton'"):
        pairs.read(2)
    with pytest.raises(InputError, match=r"f\.json is not valid JSON"):
        pairs.read(5)
    text_of_a_list = r"g\.(txt|json): the caption is neither a text nor"
    with pytest.raises(InputError, match=text_of_a_list):
        pairs.read(6)
    lists = load_pairs(str(path), json_key="more")
    assert [lists.read(i).captions for i in (0, 1)] == [("one", "two"), ("three",)]
    with pytest.raises(InputError, match=r"c\.json: the caption is neither a text"):
        lists.read(2)
    with pytest.raises(InputError, match=r"d\.json: the caption is empty"):
        lists.read(3)
    with pytest.raises(InputError, match=r"e\.json: the caption is neither a text"):
        lists.read(4)
    with pytest.raises(InputError, match=text_of_a_list):
        lists.read(6)


def test_samples_without_image_or_caption_are_left_out_and_reported(
    tmp_path: Path, write_tar: Factory, encode_image: Factory
) -> None:
    path = write_tar(
        tmp_path / "0.tar",
        {
            "good.png": encode_image(0),
            "good.txt": b"x",
            "no-caption.png": encode_image(1),
            "no-image.txt": b"y",
            "__meta__.json": b"{}",
            "x/._hidden.png": b"",
            "last.jpg": encode_image(2, "jpeg"),
            "last.txt": b"z",
        },
    )
    pairs = load_pairs(str(path))
    assert len(pairs) == 2
    assert pairs.problems.examples == (
        f"{path}: no-caption has no caption (.txt, .json)",
        f"{path}: no-image has no image (.jpg, .png, .webp)",
    )


@pytest.fixture
def long_shards(tmp_path: Path, write_tar: Factory, encode_image: Factory) -> list[Path]:
    """Four shards of 25 samples each."""
    image = encode_image(0)
    return [
        write_tar(
            tmp_path / f"{shard}.tar",
            {f"{i:03d}{suffix}": content for i in range(25) for suffix, content in ((".png", image), (".txt", b"x"))},
        )
        for shard in range(4)
    ]


def test_what_lies_behind_damage_counts_as_bad(tmp_path: Path, long_shards: list[Path]) -> None:
    damaged = bytearray(long_shards[1].read_bytes())
    damaged[damaged.index(b"005.png") + 150] ^= 1  # in the checksum of a header
    long_shards[1].write_bytes(damaged)
    pairs = load_pairs(f"{tmp_path}/{{0..3}}.tar")
    assert len(pairs) == 80
    assert 20 <= pairs.problems.total <= 25  # an estimate: a tar is padded at its end
    bad = BadSamples(pairs, max_share=0.25)
    assert len(bad) == pairs.problems.total
    with pytest.raises(InputError, match=r"are bad, more than 10\.00 ?%: .*1\.tar: the tar is damaged"):
        BadSamples(pairs, max_share=0.1)


def test_what_a_cut_shard_lacks_of_the_usual_number_counts_as_bad(tmp_path: Path, long_shards: list[Path]) -> None:
    whole = long_shards[2].read_bytes()
    long_shards[2].write_bytes(whole[: whole.index(b"010.png")])  # between two members
    pairs = load_pairs(f"{tmp_path}/{{0..3}}.tar")
    assert (len(pairs), pairs.problems.total) == (85, 15)
    with pytest.raises(InputError, match=r"15 of 100 samples .*/2\.tar: the tar ends at byte"):
        BadSamples(pairs)


def test_shards_that_are_merely_shorter_have_lost_nothing(
    tmp_path: Path, long_shards: list[Path], write_tar: Factory, encode_image: Factory
) -> None:
    write_tar(tmp_path / "4.tar", {"000.png": encode_image(0), "000.txt": b"the last one"})
    assert load_pairs(f"{tmp_path}/{{0..4}}.tar").problems.lost == 0


def test_a_tar_is_indexed_once_and_again_when_it_changes(
    shards: Path, write_tar: Factory, encode_image: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"{shards}/{{000..001}}.tar"
    before = greys(load_pairs(source))
    indexed: list[Path] = []
    index_tar = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda path: indexed.append(path) or index_tar(path))
    assert greys(load_pairs(source)) == before
    assert indexed == []
    changed = write_tar(shards / "001.tar", {"new.png": encode_image(9), "new.txt": b"grey 9"})
    assert greys(load_pairs(source))[3:] == [(9, "grey 9")]
    assert indexed == [changed]


def test_a_damaged_or_unwritable_cache_does_no_harm(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(shards / "000.tar")
    before = greys(load_pairs(source))
    (cached,) = (shards / "cache" / "shards").iterdir()
    cached.write_bytes(cached.read_bytes()[:100])
    assert greys(load_pairs(source)) == before
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", os.devnull)
    assert greys(load_pairs(source)) == before


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("plain.tar", ["plain.tar"]),
        ("{00008..00011}.tar", ["00008.tar", "00009.tar", "00010.tar", "00011.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{train,val}/{0..1}.tar", ["train/0.tar", "train/1.tar", "val/0.tar", "val/1.tar"]),
        *((pattern, [pattern]) for pattern in ("{0..}.tar", "{a}.tar", "{0..1.tar", "0..1}.tar")),
    ],
)
def test_braces_are_expanded(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


def test_a_shard_that_cannot_be_opened_is_no_bad_sample(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = load_pairs(str(shards / "{000..001}.tar"))
    shard_files.close_tars()

    def failing(shard: Path) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(shard))

    monkeypatch.setattr(shard_files, "open_file", failing)
    with pytest.raises(UnreachableError, match=r"000\.tar: .*ulimit -n"):
        pairs.read(0).image()
