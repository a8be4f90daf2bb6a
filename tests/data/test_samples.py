"""The tables, shards and folders that are samples: how their bad ones are counted, and what identifies them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_rd_edge.data import samples as samples_module
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.samples import BadSamples, Samples, fingerprint
from clip_rd_edge.errors import InputError, UnreachableError


@pytest.fixture
def damaged(pairs_csv: Path) -> Samples:
    """A table of 24 pairs in which the images 5, 6 and 23 are damaged."""
    for i in (5, 6, 23):
        (pairs_csv.parent / "pictures" / f"{i}.png").write_bytes(b"not an image")
    return load_pairs(str(pairs_csv))


def test_bad_pairs_are_replaced_by_the_next_valid_pair_until_they_are_too_many(damaged: Samples) -> None:
    bad = BadSamples(damaged, max_share=0.2)
    taken = [bad.take(i)[1][0].split()[-1] for i in (4, 5, 6, 23)]
    assert taken == ["4", "7", "7", "0"]
    assert len(bad) == 3  # each counted once
    bad = BadSamples(damaged, max_share=0.1)  # two of 24
    bad.take(5)
    with pytest.raises(InputError, match=r"3 of 24 samples .*10\.00%: .*23\.png"):
        bad.take(23)


def test_the_search_for_a_valid_pair_ends_at_the_limit(damaged: Samples) -> None:
    found, bad = BadSamples(damaged, max_share=0.05).next_valid(5, lambda index: damaged.read(index).image())
    assert found is None
    assert [index for index, _ in bad] == [5, 6]


def test_samples_left_out_count_as_bad(tmp_path: Path, write_tar: Callable[..., Path], encode_image: Any) -> None:
    members = {f"{i}.{kind}": encode_image(i) if kind == "png" else b"x" for i in range(9) for kind in ("png", "txt")}
    path = write_tar(tmp_path / "0.tar", members | {"9.png": encode_image(9)})
    assert len(BadSamples(load_pairs(str(path)), max_share=0.1)) == 1
    with pytest.raises(InputError, match=r"1 of 10 samples .*0\.tar: 9 has no caption"):
        BadSamples(load_pairs(str(path)), max_share=0.09)


def test_bad_pairs_of_other_processes_count_each_once(damaged: Samples) -> None:
    bad = BadSamples(damaged, max_share=0.1)  # two of 24
    bad.add([(5, "damaged")])
    bad.share(lambda own: [own, [(5, "damaged"), (6, "damaged")]])
    bad.add([(6, "met later, in another epoch")])
    assert (len(bad), bad.unshared) == (2, 0)
    bad.share(lambda own: [own, []])
    with pytest.raises(InputError, match=r"3 of 24 samples .*: found there"):
        bad.share(lambda own: [own, [(23, "found there")]])


def test_the_fingerprint_is_that_of_the_content_and_not_of_its_location(pairs_csv: Path, tmp_path: Path) -> None:
    original = fingerprint(load_pairs(str(pairs_csv)))
    copy = tmp_path / "elsewhere" / "renamed.csv"
    copy.parent.mkdir()
    shutil.move(pairs_csv.parent / "pictures", copy.parent / "pictures")
    copy.write_bytes(pairs_csv.read_bytes())
    assert fingerprint(load_pairs(str(copy))) == original


@pytest.mark.parametrize("change", ["caption", "order", "image", "count"])
def test_the_fingerprint_changes_with_the_data(pairs_csv: Path, change: str) -> None:
    original = fingerprint(load_pairs(str(pairs_csv)))
    header, first, second, *rest = pairs_csv.read_text().splitlines()
    if change == "caption":
        first += "!"
    elif change == "order":
        first, second = second, first
    elif change == "image":
        Image.new("RGB", (48, 40)).save(pairs_csv.parent / "pictures" / "0.png")
    else:
        rest.pop()
    pairs_csv.write_text("\n".join([header, first, second, *rest]))
    assert fingerprint(load_pairs(str(pairs_csv))) != original


def test_an_image_that_the_machine_cannot_read_is_no_bad_pair(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = errno.EIO
    pairs, stat, failures = load_pairs(str(pairs_csv)), Path.stat, [number]

    def failing(path: Path, **options: Any) -> os.stat_result:
        if path.name == "5.png" and failures:
            raise OSError(failures.pop(), os.strerror(number), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", failing)
    monkeypatch.setattr(samples_module, "_PAUSE_S", 0)
    bad = BadSamples(pairs, max_share=0.5)
    assert bad.take(5)[1] == pairs.read(5).captions  # at the second attempt
    assert len(bad) == 0
    failures += [number, number]
    with pytest.raises(UnreachableError, match=rf"pictures/5\.png: {os.strerror(number)}"):
        bad.take(5)
