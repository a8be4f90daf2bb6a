"""Many shards are indexed into one file, once, whatever interrupts or damages it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.data import shard_index
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.shard_files import close_tars
from clip_rd_edge.data.shard_index import index_shards
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.paths import cache_home
from clip_rd_edge.utils.text import Reporter

Factory = Callable[..., Any]


@pytest.fixture
def paths(tmp_path: Path, write_tar: Factory, encode_image: Factory) -> list[Path]:
    """Twelve shards of one to three samples; sample j of shard i has the caption `i j`."""
    return [
        write_tar(
            tmp_path / f"{i:02d}.tar",
            {
                f"{i}-{j}.{suffix}": encode_image(10 * i + j) if suffix == "png" else f"{i} {j}".encode()
                for j in range(1 + i % 3)
                for suffix in ("png", "txt")
            },
        )
        for i in range(12)
    ]


def contents(paths: list[Path]) -> list[str]:
    pairs = load_pairs("::".join(map(str, paths)))
    samples = map(pairs.read, range(len(pairs)))
    return [f"{sample.image().getpixel((0, 0))[0]} {sample.captions[0]}" for sample in samples]


EXPECTED = [f"{10 * i + j} {i} {j}" for i in range(12) for j in range(1 + i % 3)]


def test_a_flipped_bit_in_an_index_is_an_error_and_no_other_sample(
    paths: list[Path], flips: Callable[[Path, Callable[[], object]], int]
) -> None:
    contents(paths)
    (file,) = (cache_home() / "shard-indices").glob("*/rows.bin")
    assert flips(file, lambda: contents(paths)) >= 100


def test_an_interrupted_indexing_goes_on_where_it_was(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class StopError(Exception):
        pass

    class Interrupt(Reporter):
        def update(self, stage: str, step: int = 0, total: int | None = None, message: str = "") -> None:
            if step == 7:
                raise StopError

    with pytest.raises(StopError):
        index_shards(paths, json_key=None, reporter=Interrupt())
    scanned = []
    scan = shard_index._scan
    monkeypatch.setattr(shard_index, "_scan", lambda path: scanned.append(path) or scan(path))
    assert contents(paths) == EXPECTED
    assert scanned == paths[8:]


def test_a_copy_in_another_process_reads_on_its_own(paths: list[Path]) -> None:
    index = index_shards(paths, json_key=None)
    location = index.locate(11, 2)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.locate(11, 2) == location


def test_one_unreadable_shard_is_named_and_leaves_no_index(paths: list[Path], tmp_path: Path) -> None:
    paths[5].write_bytes(b"not a tar" * 100)
    with pytest.raises(InputError, match=r"05\.tar is not an uncompressed tar"):
        index_shards(paths, json_key=None)
    assert not list((tmp_path / "cache" / "shard-indices").glob("*/index.json"))


def test_a_shard_that_was_cut_since_it_was_indexed_has_bad_samples(paths: list[Path]) -> None:
    pairs = load_pairs(str(paths[2]))
    os.truncate(paths[2], 600)
    close_tars()
    with pytest.raises(InputError, match=r"02\.tar.*expected .* bytes, found 0"):
        pairs.read(2).image()
