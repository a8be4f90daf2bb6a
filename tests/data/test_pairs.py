from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.data.pairs import load_pairs, require_batch
from clip_rd_edge.errors import InputError, UsageError


def test_a_csv_in_open_clips_conventions(pairs_csv: Path) -> None:
    pairs = load_pairs(str(pairs_csv))
    assert len(pairs) == 24
    assert pairs.captions(0) == ("a red picture number 0",)
    assert pairs.open(23).size == (48, 40)


def test_other_columns_and_tabs(pairs_csv: Path) -> None:
    text = pairs_csv.read_text().replace("filepath,title", "image,caption").replace(",", "\t")
    tsv = pairs_csv.with_suffix(".tsv")
    tsv.write_text(text)
    assert len(load_pairs(str(tsv), image_key="image", caption_key="caption")) == 24


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,title\na,b\n", "no column 'filepath'; its columns are 'path', 'title'"),
        ("filepath,titel\na,b\n", "no column 'title'.* Did you mean 'titel'"),
        ("filepath,title\npictures/0.png,\n", "line 2: the caption in column 'title' is empty"),
        ("filepath,title\nnowhere.png,x\n", r"line 2: there is no picture 'nowhere\.png'"),
        ("filepath,title\npictures/0.png,x\n", "has 1 pairs"),
        ("", "no column 'filepath'"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(pairs_csv: Path, content: str, message: str) -> None:
    pairs_csv.write_text(content)
    with pytest.raises(InputError, match=message):
        load_pairs(str(pairs_csv))


def test_a_table_that_is_no_text(pairs_csv: Path) -> None:
    pairs_csv.write_bytes(b"filepath,title\n\xff\xfe,x\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load_pairs(str(pairs_csv))


def test_a_missing_table() -> None:
    with pytest.raises(InputError, match=r"no data file nowhere\.csv"):
        load_pairs("nowhere.csv")


@pytest.mark.parametrize("size", [1, 25])
def test_a_batch_without_negatives_or_beyond_the_data_is_refused(pairs_csv: Path, size: int) -> None:
    with pytest.raises(UsageError, match=f"batch size is {size}"):
        require_batch(load_pairs(str(pairs_csv)), size)
