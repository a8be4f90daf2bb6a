from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_rd_edge.data.bad import BadSamples, SoundPair
from clip_rd_edge.data.pairs import Pairs, load_pairs
from clip_rd_edge.errors import InputError


@pytest.fixture
def damaged(pairs_csv: Path) -> Pairs:
    """24 pairs of a table, of which numbers 5, 6 and 23 are no pictures."""
    for i in (5, 6, 23):
        (pairs_csv.parent / "pictures" / f"{i}.png").write_bytes(b"no picture")
    return load_pairs(str(pairs_csv))


def test_the_next_sound_pair_is_taken(damaged: Pairs) -> None:
    bad = BadSamples(damaged, max_share=0.2)
    taken = [bad.take(i).captions[0].split()[-1] for i in (4, 5, 6, 23)]
    assert taken == ["4", "7", "7", "0"]
    assert len(bad) == 3  # each once, however often it was met


def test_too_many_are_an_error_that_names_the_last(damaged: Pairs) -> None:
    bad = BadSamples(damaged, max_share=0.1)  # two of 24
    bad.take(5)
    with pytest.raises(InputError, match=r"3 of 24 samples of .*pairs\.csv are bad, more than 10\.00%: .*23\.png"):
        bad.take(23)


def test_a_search_ends_where_more_are_bad_than_allowed(damaged: Pairs) -> None:
    found = BadSamples(damaged, max_share=0.05).sound(5)
    assert not isinstance(found, SoundPair)
    assert [index for index, _ in found] == [5, 6]


def test_samples_left_out_count_too(tmp_path: Path, write_tar: Callable[..., Path], picture: Any) -> None:
    members = {f"{i}.{kind}": picture(i) if kind == "png" else b"x" for i in range(9) for kind in ("png", "txt")}
    path = write_tar(tmp_path / "0.tar", members | {"9.png": picture(9)})
    assert len(BadSamples(load_pairs(str(path)), max_share=0.1)) == 1
    with pytest.raises(InputError, match=r"1 of 10 samples of .* more than 9\.00%: .*0\.tar: 9 has no caption"):
        BadSamples(load_pairs(str(path)), max_share=0.09)


def test_what_other_processes_found_counts(damaged: Pairs) -> None:
    bad = BadSamples(damaged, max_share=0.1)  # two of 24
    bad.check_total(2)
    with pytest.raises(InputError, match=r"3 of 24 samples .* found by another process"):
        bad.check_total(3)
