from __future__ import annotations

import csv
import errno
import os
import shutil
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clip_rd_edge.data import samples as pairs_module
from clip_rd_edge.data import tables as load
from clip_rd_edge.data import tables as text
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.mixed import load_images
from clip_rd_edge.data.remote import is_remote
from clip_rd_edge.data.samples import BadSamples, Pairs, fingerprint, read_twice, require_batch
from clip_rd_edge.errors import InputError, UnreachableError, UsageError


@pytest.fixture(autouse=True, params=["in memory", "indexed in blocks of a row"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read tables as small ones are, and as those of millions of rows."""
    if request.param != "in memory":
        monkeypatch.setattr(load, "INDEXED_ROWS", -1)
        monkeypatch.setattr(text, "_BLOCK_BYTES", 1)
        monkeypatch.setattr("clip_rd_edge.data.shard_index.usable_cores", lambda: 1)


def test_a_csv_in_open_clips_conventions(pairs_csv: Path) -> None:
    pairs = load_pairs(str(pairs_csv))
    assert len(pairs) == 24
    assert pairs.captions(0) == ("a red picture number 0",)
    assert pairs.open(23).size == (48, 40)


def test_other_column_names_and_tabs(pairs_csv: Path) -> None:
    text = pairs_csv.read_text().replace("filepath,title", "image,caption").replace(",", "\t")
    tsv = pairs_csv.with_suffix(".tsv")
    tsv.write_text(text)
    assert len(load_pairs(str(tsv), image_key="image", caption_key="caption")) == 24


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,title\na,b\n", "no column 'filepath'; its columns are 'path', 'title'"),
        ("filepath,titel\na,b\n", "no column 'title'.* Did you mean 'titel'"),
        ("filepath,title\npictures/0.png,\n", "0 pairs.* the first: .*line 2: the caption in column 'title' is empty"),
        ('filepath,title\npictures/0.png,"[""a"", ""b""]"\n', "line 2: the caption in column 'title' is a list"),
        ("filepath,title\nnowhere.png,x\n", r"0 pairs.*line 2: the image 'nowhere\.png' exists neither"),
        ("filepath,title\npictures/0.png,x\n", "has 1 pair;"),
        ("", "no column 'filepath'"),
    ],
)
def test_invalid_tables_are_reported_with_the_line(pairs_csv: Path, content: str, message: str) -> None:
    pairs_csv.write_text(content)
    with pytest.raises(InputError, match=message):
        load_pairs(str(pairs_csv))


def test_a_table_whose_rows_were_all_left_out_hints_at_their_paths(pairs_csv: Path) -> None:
    pairs_csv.write_text(pairs_csv.read_text().replace("pictures/", "pictures\\"))
    with pytest.raises(InputError, match=r"has 0 pairs; .* 24 were left out; the first: ") as error:
        load_pairs(str(pairs_csv))
    assert "check these rows: an image is a local file, with / between folders" in error.value.hint
    pairs_csv.write_text("filepath,title\n")
    with pytest.raises(InputError, match="has 0 pairs") as error:
        load_pairs(str(pairs_csv))
    assert "add pairs" in error.value.hint


def test_a_folder_is_not_called_missing(pairs_csv: Path) -> None:
    with pytest.raises(InputError, match=r"The data file .*pictures is a folder\.$") as error:
        load_pairs(str(pairs_csv.parent / "pictures"))
    assert error.value.hint.endswith(
        f", or pass images and captions apart: images {pairs_csv.parent / 'pictures'} texts FILE"
    )


def test_images_are_not_suggested_for_a_folder_without_any(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("filepath,title\n")
    with pytest.raises(InputError, match="is a folder") as error:
        load_pairs(str(tmp_path))
    assert error.value.hint == "name a CSV file with the columns filepath,title, shards (….tar) or emoji"


@pytest.mark.parametrize(
    ("folder", "name", "message"),
    [
        (".", "gone.png", "the image 'gone.png' exists neither in the working directory nor in "),
        ("pictures", "gone.png", "the image 'gone.png' does not exist in the working directory"),
        (".", "/gone.png", "the image '/gone.png' does not exist"),
    ],
)
def test_a_missing_image_is_named_with_where_it_was_looked_for(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, folder: str, name: str, message: str
) -> None:
    table = pairs_csv.parent / "pictures" / "table.csv"
    table.write_text(f"filepath,title\n0.png,red\n1.png,green\n{name},blue\n")
    monkeypatch.chdir(pairs_csv.parent / folder)
    pairs = load_pairs(str(table))
    assert message in pairs.left_out[0]
    assert pairs.left_out[0].count("directory") == message.count("directory")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("pictures/none.png,a cat", "the image 'pictures/none.png' exists neither"),
        (
            "https://me:secret@example.com/0.png?sig=abc,a cat",
            "the image 'https://example.com/0.png' is an address; a table names files: download them, or pack shards",
        ),
        (",a cat", "it names no image"),
        ("pictures/0.png,", "the caption in column 'title' is empty"),
        ("pictures/0.png", "the caption in column 'title' is empty"),
        ("pictures/0.png,a dog, asleep", "it has more fields than the header; a caption with ',' needs quotes"),
    ],
)
def test_a_row_that_is_no_pair_counts_as_bad_and_is_named_by_its_line(pairs_csv: Path, row: str, reason: str) -> None:
    pairs_csv.write_text(f"{pairs_csv.read_text().rstrip()}\n{row}\n")
    pairs = load_pairs(str(pairs_csv))
    assert len(pairs) == 24
    assert pairs.left_out[0].startswith(f"{pairs_csv}, line 26: {reason}")
    with pytest.raises(InputError, match=r"1 of 25 samples of .* are bad, more than 1\.00%: .*line 26") as raised:
        BadSamples(pairs, max_share=0.01)
    assert raised.value.hint.startswith("fix or remove them, or accept them: max_bad 0.04")
    assert len(BadSamples(pairs, max_share=0.04)) == 1  # as the hint says


def test_empty_rows_of_a_spreadsheet_are_no_pairs(pairs_csv: Path) -> None:
    header, first, *others = pairs_csv.read_text().splitlines()
    pairs_csv.write_text("\n".join([header, first, ",", *others, ",", ",,", ""]))
    pairs = load_pairs(str(pairs_csv))
    assert len(pairs) == 24
    assert not pairs.left_out


@pytest.mark.parametrize("row", range(1, 25))
@pytest.mark.parametrize("place", ["caption's start", "both captions' starts", "image's start", "after a closed quote"])
def test_a_stray_quote_never_swallows_rows_without_a_word(pairs_csv: Path, row: int, place: str) -> None:
    lines = pairs_csv.read_text().splitlines()
    if place == "image's start":
        lines[row] = f'"{lines[row]}'
    elif place == "after a closed quote":
        lines[row] = lines[row].replace(",", ',"a 5" nail, ')
    else:
        lines[row] = lines[row].replace(",", ',"')
    if place == "both captions' starts" and row + 3 < len(lines):
        lines[row + 3] += '"'  # closes the quote three rows later, as the end of a valid field
    pairs_csv.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=rf"pairs\.csv, line {row + 1}: "):
        load_pairs(str(pairs_csv))


@pytest.mark.parametrize("read", [load_pairs, partial(load_images, column="filepath")], ids=["pairs", "images"])
def test_a_stray_quote_in_a_column_that_is_not_used_swallows_no_rows(
    pairs_csv: Path, read: Callable[[str], Pairs]
) -> None:
    header, *rows = (f"{line},{number}" for number, line in enumerate(pairs_csv.read_text().splitlines()))
    rows[3] = 'pictures/3.png,a cat,"'
    rows[9] = 'pictures/9.png,a cat,5"'
    pairs_csv.write_text("\n".join([header, *rows, ""]))
    with pytest.raises(InputError, match=r"line 5: a quoted field holds the row of the image 'pictures/4\.png'"):
        read(str(pairs_csv))
    rows[3:10] = ['pictures/3.png,a cat,"similar:\npictures/4.png\npictures/5.png, dark"']
    pairs_csv.write_text("\n".join([header, *rows, ""]))
    assert len(read(str(pairs_csv))) == 18


def test_a_stray_quote_in_a_caption_swallows_no_images(pairs_csv: Path) -> None:
    lines = pairs_csv.read_text().splitlines()
    lines[4] = lines[4].replace(",", ',"')
    lines[9] += '"'
    pairs_csv.write_text("\n".join([*lines, ""]))
    with pytest.raises(InputError, match=r"line 5: a quoted field holds the row of the image 'pictures/4\.png'"):
        load_images(str(pairs_csv), column="filepath")


def test_a_quoted_caption_may_hold_newlines_and_doubled_quotes(pairs_csv: Path) -> None:
    lines = pairs_csv.read_text().splitlines()
    lines[3] = 'pictures/2.png,"a 5"" nail,\nred or green"'
    pairs_csv.write_text("\n".join(lines) + "\n")
    pairs = load_pairs(str(pairs_csv))
    assert len(pairs) == 24
    assert pairs.captions(2) == ('a 5" nail,\nred or green',)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"pictures/0.png,{'a' * 131_073}", "line 26: field larger than field limit"),
        (f"{'a' * 5_000}.png,a cat", "1 of 25 samples .*line 26: the image"),
        ("pictures/0\0.png,a cat", "line 26: "),
    ],
    ids=["long field", "long path", "NUL"],
)
def test_absurd_fields_are_named_by_their_line(pairs_csv: Path, line: str, reason: str) -> None:
    pairs_csv.write_text(f"{pairs_csv.read_text().rstrip()}\n{line}\n")
    with pytest.raises(InputError, match=reason):
        BadSamples(load_pairs(str(pairs_csv)))


def test_a_header_without_an_end_is_refused(pairs_csv: Path) -> None:
    pairs_csv.write_text("a" * 300_000)
    with pytest.raises(InputError, match=r"pairs\.csv, line 1: field larger than field limit"):
        load_pairs(str(pairs_csv))


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv"])
def test_the_separator_is_the_one_that_splits_the_header(pairs_csv: Path, separator: str, name: str) -> None:
    rows = list(csv.reader(pairs_csv.read_text().splitlines()))
    path = pairs_csv.with_name(name)
    with path.open("w", newline="") as file:
        caption = "a cat, or a dog; or a cow|ox"
        csv.writer(file, delimiter=separator).writerows([rows[0], *((image, caption) for image, _ in rows[1:])])
    pairs = load_pairs(str(path))
    assert (len(pairs), pairs.left_out) == (24, ())
    assert pairs.captions(23) == ("a cat, or a dog; or a cow|ox",)


def test_a_table_that_is_not_text(pairs_csv: Path) -> None:
    pairs_csv.write_bytes(b"filepath,title\n\xff\xfe,x\n")
    with pytest.raises(InputError, match="not UTF-8"):
        load_pairs(str(pairs_csv))


def test_a_missing_table() -> None:
    with pytest.raises(InputError, match=r"data file nowhere\.csv"):
        load_pairs("nowhere.csv")
    with pytest.raises(InputError, match=r"data file 'a/\{000\.\.001\}\.tar' does not exist") as caught:
        load_pairs("'a/{000..001}.tar'")  # as cmd passes it on
    assert "double quotes" in caught.value.hint


def test_a_table_elsewhere_is_refused() -> None:
    with pytest.raises(InputError, match=r"s3://bucket/pairs\.csv are not on this machine") as caught:
        load_pairs("s3://bucket/pairs.csv")
    assert "name shards" in caught.value.hint


def test_a_drive_of_windows_before_two_slashes_is_no_address(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if os.name != "nt":
        (tmp_path / "C:").symlink_to("/", target_is_directory=True)
    assert len(load_pairs(f"C://{pairs_csv.relative_to(pairs_csv.anchor).as_posix()}")) == 24
    assert not is_remote("C://shards/{000..001}.tar")
    assert is_remote("https://server/{000..001}.tar")


@pytest.mark.parametrize("size", [1, 25])
def test_a_batch_size_that_is_too_small_or_too_large_is_refused(pairs_csv: Path, size: int) -> None:
    with pytest.raises(UsageError, match=f"batch size is {size}"):
        require_batch(load_pairs(str(pairs_csv)), size)


@pytest.fixture
def damaged(pairs_csv: Path) -> Pairs:
    """A table of 24 pairs in which the images 5, 6 and 23 are damaged."""
    for i in (5, 6, 23):
        (pairs_csv.parent / "pictures" / f"{i}.png").write_bytes(b"not an image")
    return load_pairs(str(pairs_csv))


def test_bad_pairs_are_replaced_by_the_next_valid_pair(damaged: Pairs) -> None:
    bad = BadSamples(damaged, max_share=0.2)
    taken = [bad.take(i).captions[0].split()[-1] for i in (4, 5, 6, 23)]
    assert taken == ["4", "7", "7", "0"]
    assert len(bad) == 3  # each counted once


def test_too_many_bad_pairs_raise_an_error_naming_the_latest(damaged: Pairs) -> None:
    bad = BadSamples(damaged, max_share=0.1)  # two of 24
    bad.take(5)
    with pytest.raises(InputError, match=r"3 of 24 samples of .*pairs\.csv are bad, more than 10\.00%: .*23\.png"):
        bad.take(23)


def test_the_search_for_a_valid_pair_ends_at_the_limit(damaged: Pairs) -> None:
    pair, bad = BadSamples(damaged, max_share=0.05).next_valid(5, damaged.open)
    assert pair is None
    assert [index for index, _ in bad] == [5, 6]


def test_samples_left_out_count_as_bad(tmp_path: Path, write_tar: Callable[..., Path], encode_image: Any) -> None:
    members = {f"{i}.{kind}": encode_image(i) if kind == "png" else b"x" for i in range(9) for kind in ("png", "txt")}
    path = write_tar(tmp_path / "0.tar", members | {"9.png": encode_image(9)})
    assert len(BadSamples(load_pairs(str(path)), max_share=0.1)) == 1
    with pytest.raises(InputError, match=r"1 of 10 samples of .* more than 9\.00%: .*0\.tar: 9 has no caption"):
        BadSamples(load_pairs(str(path)), max_share=0.09)


def test_bad_pairs_of_other_processes_count_each_once(damaged: Pairs) -> None:
    bad = BadSamples(damaged, max_share=0.1)  # two of 24
    bad.add([(5, "damaged")])
    bad.share(lambda own: [own, [(5, "damaged"), (6, "damaged")]])
    bad.add([(6, "met later, in another epoch")])
    assert (len(bad), bad.unshared) == (2, 0)
    bad.share(lambda own: [own, []])
    with pytest.raises(InputError, match=r"3 of 24 samples .* more than 10\.00%: found there"):
        bad.share(lambda own: [own, [(23, "found there")]])


def test_bad_pairs_of_a_checkpoint_count_only_for_the_data_that_they_are_of(damaged: Pairs, pairs_csv: Path) -> None:
    bad = BadSamples(damaged, max_share=0.1)  # two of 24
    assert bad.state_dict() == {"pairs": [], "of": ""}  # millions of pairs need no fingerprint
    bad.add([(5, "damaged"), (6, "damaged")])
    state = bad.state_dict()

    def resumed(state: dict[str, Any]) -> BadSamples:
        again = BadSamples(load_pairs(str(pairs_csv)), max_share=0.1)
        again.load_state_dict(state)
        return again

    assert len(resumed(state)) == len(resumed({"pairs": state["pairs"]})) == 2  # the latter of an earlier version
    for i in (5, 6):  # as `--accept-changes` then allows
        shutil.copyfile(pairs_csv.parent / "pictures" / "7.png", pairs_csv.parent / "pictures" / f"{i}.png")
    os.utime(pairs_csv, (1, 1))  # so that a large table is indexed again
    repaired = resumed(state)
    assert (len(repaired), repaired.unshared) == (0, 0)
    repaired.add([(23, "damaged")])


def test_the_fingerprint_is_that_of_the_content_and_not_of_its_location(pairs_csv: Path, tmp_path: Path) -> None:
    original = fingerprint(load_pairs(str(pairs_csv)))
    copy = tmp_path / "elsewhere" / "renamed.csv"
    copy.parent.mkdir()
    shutil.copytree(pairs_csv.parent / "pictures", copy.parent / "pictures")
    copy.write_bytes(pairs_csv.read_bytes())
    shutil.rmtree(pairs_csv.parent / "pictures")
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


@pytest.mark.parametrize(("kind", "message"), [("pipe", "is a pipe"), ("link", "is a link to something that does not")])
def test_a_table_that_is_no_file_is_called_what_it_is(tmp_path: Path, kind: str, message: str) -> None:
    path = tmp_path / "pairs.csv"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=f"pairs.csv {message}") as caught:
        load_pairs(str(path))
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"filepath,title,title\n1.png,a,b\n", "has 2 columns 'title'; expected one", "csv_caption_key"),
        ("filepath,title\n1.png,a\n".encode("utf-16-le"), "is not UTF-8 text: .* as UTF-16 has", "as UTF-8"),
        (b"PK\x03\x04\x14\0\0\0", "is a zip archive or an Excel workbook", "save the workbook as CSV"),
        (b"\x1f\x8b\x08\0\0\0", "is compressed by gzip", "unpack it"),
        (b"ARROW1\0\0\xff\xff", "is an Arrow or Feather file", "save it as Parquet or CSV"),
        (b"\x89PNG\r\n\x1a\n\0", "is an image, and not a table", "name a table"),
        (b'<?xml version="1.0" encoding="UTF-8"?>\n<office:document>', "is XML or HTML, and not", "save it as CSV"),
        (b'{"filepath":"1.png","title":"a, b"}\n', "is JSON, and not a table", "with the columns filepath,title"),
        (b'\xef\xbb\xbf[\n {\n  "title": "a"}]', "is JSON, and not a table", "with the columns filepath,title"),
    ],
)
def test_a_header_that_cannot_be_right_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes, message: str, hint: str
) -> None:
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_pairs(str(tmp_path / "pairs.csv"))
    assert hint in caught.value.hint


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_line_that_tells_excel_the_separator_is_no_header(pairs_csv: Path, mark: str) -> None:
    rows = pairs_csv.read_text().replace(",", ";")
    pairs_csv.write_text(f"{mark}sep=;\n{rows}pictures/none.png;a cat\n", encoding="utf-8")
    pairs = load_pairs(str(pairs_csv))
    assert (len(pairs), len(pairs.left_out)) == (24, 1)
    assert "line 27: the image 'pictures/none.png'" in pairs.left_out[0]
    pairs_csv.write_text('sep=;\nfilepath;"title"s\n')
    with pytest.raises(InputError, match="line 2: ';' expected after"):
        load_pairs(str(pairs_csv))


def test_a_column_may_have_a_name_in_brackets(pairs_csv: Path) -> None:
    pairs_csv.write_text(pairs_csv.read_text().replace("filepath,title", "[filepath],[title]"))
    assert len(load_pairs(str(pairs_csv), image_key="[filepath]", caption_key="[title]")) == 24


def test_a_column_named_twice_may_be_one_that_is_not_read(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    (tmp_path / "pairs.csv").write_text("note,filepath,title,note\nx,1.png,a frog,y\nx,1.png,a dog,y\n")
    assert load_pairs(str(tmp_path / "pairs.csv")).captions(1) == ("a dog",)


def test_a_row_that_names_a_folder_is_called_that(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    (tmp_path / "pics").mkdir()
    (tmp_path / "pairs.csv").write_text("filepath,title\n1.png,a\n1.png,b\npics,c\n")
    (message,) = load_pairs(str(tmp_path / "pairs.csv")).left_out
    assert message.endswith("line 4: the image 'pics' is a folder")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ENOMEM])
def test_an_image_that_the_machine_cannot_read_is_no_bad_pair(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    pairs, stat, failures = load_pairs(str(pairs_csv)), Path.stat, [number]

    def failing(path: Path, **options: Any) -> os.stat_result:
        if path.name == "5.png" and failures:
            raise OSError(failures.pop(), os.strerror(number), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", failing)
    monkeypatch.setattr(pairs_module, "_PAUSE_S", 0, raising=False)
    bad = BadSamples(pairs, max_share=0.5)
    assert bad.take(5).captions == pairs.captions(5)  # at the second attempt
    assert len(bad) == 0
    failures += [number, number]
    with pytest.raises(UnreachableError, match=rf"pictures/5\.png: {os.strerror(number)}") as caught:
        bad.take(5)
    assert ("ulimit -n" in str(caught.value)) == (number == errno.EMFILE)


def test_a_pair_that_is_bad_at_the_second_attempt_keeps_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs_module, "_PAUSE_S", 0)
    second = ValueError("it is damaged")
    reasons = [OSError(errno.EIO, os.strerror(errno.EIO)), second]

    def read(_: int) -> None:
        raise InputError("Cannot read 5.png.") from reasons.pop(0)

    with pytest.raises(InputError) as caught:
        read_twice(read, 5)
    assert caught.value.__cause__ is second


class LostShareError(OSError):
    """What Windows raises when a network share went away."""

    winerror = 64


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), LostShareError(errno.EINVAL, "The network name is gone")]
)
def test_rows_whose_images_the_machine_cannot_find_are_not_left_out(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    stat = os.stat

    def failing(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("5.png"):
            raise type(error)(*error.args, path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(UnreachableError, match=rf"5\.png: {error.strerror}"):
        load_pairs(str(pairs_csv))


def test_an_image_whose_name_is_spelled_as_on_another_system_is_named(pairs_csv: Path) -> None:
    picture = pairs_csv.parent / "pictures" / "0.png"
    names = [unicodedata.normalize(form, "Größe.png") for form in ("NFC", "NFD")]
    picture.with_name(names[0]).write_bytes(picture.read_bytes())
    if os.sep == "\\" or picture.with_name(names[1]).exists():
        pytest.skip("this system does not tell them apart")
    with pairs_csv.open("a", encoding="utf-8") as file:
        file.write(f"pictures/{names[1]},a cat\npictures\\0.png,a dog\npictures\\none.png,a pig\n")
    unicode_form, windows, missing = load_pairs(str(pairs_csv)).left_out
    assert unicode_form.endswith("does not exist; there is one whose name is written in another form of Unicode (NFC)")
    assert windows.endswith(r"'pictures\0.png' does not exist; there is one with / for each backslash")
    assert "exists neither" in missing
