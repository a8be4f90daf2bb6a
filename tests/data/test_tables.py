"""Tables of any size give the same pairs, whether they are kept in memory or in the cache."""

from __future__ import annotations

import csv
import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import Watch, contents

from clip_rd_edge.data import tables
from clip_rd_edge.data.load import load_pairs, load_texts
from clip_rd_edge.data.samples import Samples, fingerprint
from clip_rd_edge.data.tables import TABLE_STAGE, Table
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.errors import InputError, UnreachableError


def read_column(path: str, column: str) -> Any:
    return load_texts(path, column, lambda *_: pytest.fail("read as text"))


CAPTIONS = ("a cat", 'a 5" nail', '"quoted", he said', "two\nlines", "three\n\nlines\n", "ünïcödé 猫", " a, b ", "\r\n")


@pytest.fixture(autouse=True)
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read tables as small ones are, or as those of millions of rows."""
    if getattr(request, "param", "") == "kept":
        monkeypatch.setattr(tables, "KEPT_ROWS", -1)


kept = pytest.mark.parametrize("_size", ["kept"], indirect=True)
both = pytest.mark.parametrize("_size", ["in memory", "kept"], indirect=True)


def captions(samples: Samples) -> list[str]:
    return [samples.read(index).captions[0] for index in range(len(samples))]


def write_rows(path: Path, rows: list[tuple[str, str]], **options: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows([("filepath", "title"), *rows])


@both
def test_a_csv_in_open_clips_conventions(pairs_csv: Path) -> None:
    pairs = load_pairs(str(pairs_csv))
    assert len(pairs) == 24
    assert pairs.read(0).captions == ("a red picture number 0",)
    assert pairs.read(23).image().size == (48, 40)
    assert str(pairs.counts) == "24 pairs"
    assert contents(pickle.loads(pickle.dumps(pairs))) == contents(pairs)  # as another process receives it


def test_other_column_names_and_tabs(pairs_csv: Path) -> None:
    tsv = pairs_csv.with_suffix(".tsv")
    tsv.write_text(pairs_csv.read_text().replace("filepath,title", "[image],caption").replace(",", "\t"))
    assert len(load_pairs(str(tsv), image_key="[image]", caption_key="caption")) == 24


@both
@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
def test_captions_hold_whatever_csv_can(pairs_csv: Path, line_end: str) -> None:
    write_rows(pairs_csv, [(f"pictures/{i % 24}.png", CAPTIONS[i % 7]) for i in range(5000)], lineterminator=line_end)
    assert captions(load_pairs(str(pairs_csv))) == [CAPTIONS[i % 7].strip() for i in range(5000)]
    assert list(load_pairs(str(pairs_csv)).groups) == [4096, 904]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("pictures/none.png,a cat", "no image file 'pictures/none.png' in "),
        ("https://me:secret@example.com/0.png?sig=abc,a cat", "'https://example.com/0.png' is an address"),
        ("pictures/0.png", "the caption in column 'title' is empty"),
        ("pictures/0.png,a dog, asleep", "it has more fields than the header"),
        ("pictures/0\0.png,a cat", "no image file"),
    ],
)
def test_a_row_that_is_no_pair_counts_as_bad_and_is_named_by_its_line(pairs_csv: Path, row: str, reason: str) -> None:
    pairs_csv.write_text(f"{pairs_csv.read_text().rstrip()}\n{row}\n")
    pairs = load_pairs(str(pairs_csv))
    assert (len(pairs), pairs.problems.count) == (24, 1)
    assert pairs.problems.examples[0].startswith(f"{pairs_csv}, line 26: ")
    assert reason in pairs.problems.examples[0]


def test_empty_rows_of_a_spreadsheet_are_no_pairs(pairs_csv: Path) -> None:
    header, first, *others = pairs_csv.read_text().splitlines()
    pairs_csv.write_text("\n".join([header, first, ",", *others, ",", ",,", ""]))
    pairs = load_pairs(str(pairs_csv))
    assert (len(pairs), pairs.problems.count) == (24, 0)


@both
@pytest.mark.parametrize("place", ["caption's start", "both captions' starts", "image's start", "after a closed quote"])
def test_a_stray_quote_never_swallows_rows_without_a_word(pairs_csv: Path, place: str) -> None:
    lines, row = pairs_csv.read_text().splitlines(), 17
    if place == "image's start":
        lines[row] = f'"{lines[row]}'
    elif place == "after a closed quote":
        lines[row] = lines[row].replace(",", ',"a 5" nail, ')
    else:
        lines[row] = lines[row].replace(",", ',"')
    if place == "both captions' starts":
        lines[row + 3] += '"'  # closes the quote three rows later, as the end of a valid field
    pairs_csv.write_text("\n".join(lines) + "\n")
    for read in (load_pairs, partial(load_pairs, caption_key=None)):
        with pytest.raises(InputError, match=rf"pairs\.csv, line {row + 1}: "):
            read(str(pairs_csv))


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (f"pictures/0.png,{'a' * 131_073}", 26),
        ('pictures/0.png,"two\nlines"\npictures/0.png,"b" c\npictures/0.png,\udce9', 28),
        ('pictures/0.png,"two\nlines"\npictures/0.png,caf\udce9', 28),
    ],
    ids=["long field", "quote", "not UTF-8"],
)
def test_what_cannot_be_read_is_named_by_its_line(pairs_csv: Path, rows: str, line: int) -> None:
    pairs_csv.write_bytes(pairs_csv.read_bytes() + rows.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(InputError, match=rf"pairs\.csv, line {line}: "):
        load_pairs(str(pairs_csv))


def test_rows_whose_images_the_machine_cannot_find_are_not_left_out(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def failing(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("5.png"):
            raise OSError(errno.EIO, "Input/output error", path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(UnreachableError, match=r"5\.png: Input"):
        load_pairs(str(pairs_csv))


def test_images_alone_count_once_each_and_rows_without_one_each(pairs_csv: Path) -> None:
    names = ["0.png", "", "gone.png", "1.png", " ", "gone.png", "0.png"]
    pairs_csv.write_text("filepath,title\n" + "".join(f"{n and 'pictures/'}{n},a, b\n" for n in names))
    images = load_pairs(str(pairs_csv), caption_key=None)
    assert (len(images), images.problems.count, images.read(0).captions) == (2, 3, ())
    assert str(images.counts) == "2 images without captions"


# Kept tables


@kept
def test_a_table_is_read_once_until_its_time_changes(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    first = fingerprint(load_pairs(str(pairs_csv), reporter=watch))
    assert watch.updates == [(TABLE_STAGE, 24, 24)]
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_read", lambda *_, **__: pytest.fail("read again"))
        assert fingerprint(load_pairs(str(pairs_csv))) == first
    (pairs_csv.parent / "pictures" / "0.png").write_bytes((pairs_csv.parent / "pictures" / "1.png").read_bytes())
    os.utime(pairs_csv, (1, 1))
    assert fingerprint(load_pairs(str(pairs_csv))) != first


def test_relative_paths_depend_on_the_working_directory(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_table = contents(load_pairs(str(pairs_csv)))
    other = tmp_path / "other"
    shutil.copytree(pairs_csv.parent / "pictures", other / "pictures")
    shutil.copy(other / "pictures" / "1.png", other / "pictures" / "0.png")
    monkeypatch.chdir(other)
    assert contents(load_pairs(str(pairs_csv))) != from_table


@kept
@pytest.mark.parametrize(("name", "least"), [("rows.bin", 80), ("texts.bin", 100), ("folders.bin", 20)])
def test_a_flipped_bit_in_an_index_is_an_error_and_no_other_pair(
    name: str, least: int, pairs_csv: Path, tmp_path: Path, flips: Callable[[Path, Callable[[], object]], int]
) -> None:
    load_pairs(str(pairs_csv))
    (file,) = (tmp_path / "cache" / "table-indices").glob(f"*/{name}")
    assert flips(file, lambda: contents(load_pairs(str(pairs_csv)))) >= least


@kept
def test_a_read_only_cache_only_costs_time(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(load_pairs(str(pairs_csv)))
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(pairs_csv))  # a file, so that no folder can be made in it
    assert contents(load_pairs(str(pairs_csv))) == expected


# Parquet


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **options)
    return path


@both
@pytest.mark.parametrize("kind", ["string", "dictionary", "string_view"])
def test_parquet_gives_the_pairs_of_a_csv(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    names = [*(f"pictures/{i % 24}.png" for i in range(100)), "pictures/none.png", None, "pictures/0.png"]
    titles = [*(CAPTIONS[i % 7] for i in range(99)), "['a', 'b']", "a", "b", None]
    columns: dict[str, Any] = {"index": list(range(103)), "filepath": names, "title": titles}
    pyarrow = pytest.importorskip("pyarrow")
    if kind == "dictionary":
        columns["title"] = pyarrow.array(titles).dictionary_encode()
    elif kind == "string_view":
        if not hasattr(pyarrow, kind):
            pytest.skip("pyarrow has no string_view")
        columns["title"] = pyarrow.array(titles, pyarrow.string_view())
    path = write_parquet(pairs_csv.with_suffix(".parquet"), columns, row_group_size=13)
    write_rows(pairs_csv, [(name or "", title or "") for name, title in zip(names, titles, strict=True)])
    monkeypatch.setattr(tables, "_BLOCK_ROWS", 10)
    pairs, of_csv = load_pairs(str(path)), load_pairs(str(pairs_csv))
    assert contents(pairs) == contents(of_csv)
    reasons, expected = ([message.partition(": ")[2] for message in each.problems.examples] for each in (pairs, of_csv))
    assert reasons == expected
    assert pairs.problems.examples[0].startswith(f"{path}, row 100: ")
    assert read_column(str(path), "filepath")[-1] == "pictures/0.png"


def test_parquet_with_images_in_a_column_is_refused(tmp_path: Path) -> None:
    """As data sets of Hugging Face have them."""
    columns = {"filepath": [{"bytes": b"\xff", "path": "1.png"}], "title": ["a"]}
    path = write_parquet(tmp_path / "pairs.parquet", columns)
    with pytest.raises(InputError) as caught:
        load_pairs(str(path))
    assert caught.value.option == "csv_img_key"


def test_a_workbook_or_another_encoding_is_no_table(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pairs.xlsx", "w", zipfile.ZIP_DEFLATED) as workbook:
        workbook.writestr("xl/workbook.xml", bytes(range(256)))
    (tmp_path / "pairs.csv").write_text("filepath,title\n1.png,a\n", encoding="utf-16")
    for name in ("pairs.xlsx", "pairs.csv"):
        with pytest.raises(InputError) as caught:
            load_pairs(str(tmp_path / name))
        assert not isinstance(caught.value, tables.MissingColumnError)


def test_parquet_is_known_by_its_first_bytes_and_its_damage_is_named(pairs_csv: Path) -> None:
    path = write_parquet(pairs_csv.with_suffix(".parquet"), {"filepath": ["pictures/0.png"] * 99, "title": ["a"] * 99})
    content = path.read_bytes()
    renamed = path.rename(path.with_suffix(".parquet.gzip"))  # as pandas writes it
    assert len(load_pairs(str(renamed))) == 99
    for damaged in (content[:100], b"no parquet", b"PAR1" + content[4:40][::-1] + content[40:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"pairs\.parquet "):
            load_pairs(str(path))


def test_parquet_text_that_is_not_utf_8_is_named_by_its_row(pairs_csv: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    titles = pyarrow.array([b"a", b"b", b"caf\xe9"]).view(pyarrow.string())
    path = write_parquet(pairs_csv.with_suffix(".parquet"), {"filepath": ["pictures/0.png"] * 3, "title": titles})
    with pytest.raises(InputError, match=r"pairs\.parquet, row 3: "):
        load_pairs(str(path))


def test_a_table_is_a_retrieval_task(pairs_csv: Path) -> None:
    write_rows(pairs_csv, [(f"pictures/{name}.png", name) for name in ("0", "../pictures/0", "1")])
    task = load_task(str(pairs_csv))
    assert (len(task.images), task.caption_images) == (2, (0, 0, 1))
    assert isinstance(load_pairs(str(pairs_csv)), Table)
