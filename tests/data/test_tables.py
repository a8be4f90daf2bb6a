"""Tables of any size give the same pairs, whether they are read into memory or through an index, by any processes."""

from __future__ import annotations

import csv
import errno
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Watch, contents

from clip_rd_edge.data import shard_index as index_files
from clip_rd_edge.data import tables as load
from clip_rd_edge.data import tables as parquet
from clip_rd_edge.data import tables as text
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.mixed import load_texts
from clip_rd_edge.data.samples import BadSamples, fingerprint
from clip_rd_edge.data.tables import TABLE_STAGE, IndexedTable, TablePairs, read_table
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.distillation.processes import stop_on_signals
from clip_rd_edge.errors import InputError, LostProcessError

CAPTIONS = ("a cat", 'a 5" nail', '"quoted", he said', "two\nlines", "three\n\nlines\n", "ünïcödé 猫", " a, b ", "\r\n")


@pytest.fixture(autouse=True)
def _indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "INDEXED_ROWS", -1)
    monkeypatch.setattr("clip_rd_edge.data.shard_index.usable_cores", lambda: 2)


def in_memory(path: Path) -> TablePairs:
    return read_table(path, image_key="filepath", caption_key="title")


def write_rows(path: Path, rows: list[tuple[str, str]], **options: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows([("filepath", "title"), *rows])


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 20])
@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
def test_rows_are_those_of_a_table_in_memory_wherever_blocks_begin(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, block: int, line_end: str
) -> None:
    generator = random.Random(block)
    names = [*(f"pictures/{i}.png" for i in range(24)), "pictures/none.png", ""]
    rows = [(generator.choice(names), generator.choice(CAPTIONS)) for _ in range(300)]
    write_rows(pairs_csv, rows, lineterminator=line_end)
    expected = in_memory(pairs_csv)
    monkeypatch.setattr(text, "_BLOCK_BYTES", block)
    pairs = load_pairs(str(pairs_csv))
    assert isinstance(pairs, IndexedTable)
    assert 200 < len(pairs) < 290
    assert [pairs.captions(i) for i in range(len(pairs))] == list(expected.texts)
    assert [pairs.open(i).tobytes() for i in range(9)] == [expected.open(i).tobytes() for i in range(9)]
    assert list(pairs.left_out) == list(expected.left_out)
    assert list(pairs.groups) == list(expected.groups)


@pytest.mark.parametrize("methods", [["fork", "spawn"], ["spawn"]], ids=["processes", "threads"])
def test_any_workers_give_the_same_index(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, methods: list[str]) -> None:
    if methods[0] not in index_files.get_all_start_methods():
        pytest.skip("this system cannot fork")
    monkeypatch.setattr(index_files, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(text, "_BLOCK_BYTES", 64)
    assert contents(load_pairs(str(pairs_csv))) == contents(in_memory(pairs_csv))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks workers")
def test_a_machine_without_semaphores_reads_in_threads(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose /dev/shm is missing or read-only, or AWS Lambda."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    assert contents(load_pairs(str(pairs_csv))) == contents(in_memory(pairs_csv))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks workers")
def test_a_worker_that_is_killed_is_told_in_one_sentence(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def read(table: text.CsvTable, place: tuple[int, int]) -> None:
        if place == next(table.places()):
            time.sleep(0.5)  # the other worker has begun
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    monkeypatch.setattr(text, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(text.CsvTable, "read", read)
    with stop_on_signals(), pytest.raises(LostProcessError, match="that reads the data was ended from outside"):
        load_pairs(str(pairs_csv))
    assert capfd.readouterr().err == ""  # nor a traceback of the other worker, which the pool ends


def test_the_fault_that_is_named_is_the_first_one(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks within a caption of several lines are no rows, and what is wrong with them does not count.
    rows = [(f"pictures/{i}.png", f'line\n"a" "b\n{i}"' * 3) for i in range(24)]
    write_rows(pairs_csv, rows)
    monkeypatch.setattr(text, "_BLOCK_BYTES", 8)
    assert contents(load_pairs(str(pairs_csv))) == contents(in_memory(pairs_csv))
    pairs_csv.write_bytes(pairs_csv.read_bytes() + b'pictures/0.png,a cat\npictures/0.png,"b" c\npictures/0.png,\xff\n')
    with pytest.raises(InputError, match=r"pairs\.csv, line 171: ',' expected after '\"'"):
        load_pairs(str(pairs_csv))


def test_text_that_is_not_utf_8_is_named_by_its_line(pairs_csv: Path) -> None:
    pairs_csv.write_bytes(pairs_csv.read_bytes() + b"pictures/0.png,caf\xe9\n")
    with pytest.raises(InputError, match=r"pairs\.csv, line 26: it is not UTF-8 text: .* at byte 1,034 of the file"):
        load_pairs(str(pairs_csv))


def test_a_table_is_read_once(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    first = fingerprint(load_pairs(str(pairs_csv), reporter=watch))
    assert watch.updates == [(TABLE_STAGE, 0, 1), (TABLE_STAGE, 1, 1)]
    monkeypatch.setattr(text.CsvTable, "read", lambda *_: pytest.fail("read again"))
    assert fingerprint(load_pairs(str(pairs_csv))) == first


def test_another_time_of_the_table_indexes_it_again(pairs_csv: Path) -> None:
    first = fingerprint(load_pairs(str(pairs_csv)))
    (pairs_csv.parent / "pictures" / "0.png").write_bytes((pairs_csv.parent / "pictures" / "1.png").read_bytes())
    os.utime(pairs_csv, (1, 1))
    assert fingerprint(load_pairs(str(pairs_csv))) != first


@pytest.mark.parametrize("share", [1, 0.5])
def test_images_that_came_after_the_table_was_indexed_are_found_as_the_hint_says(pairs_csv: Path, share: float) -> None:
    late = pairs_csv.parent / "late"
    write_rows(pairs_csv, [(f"{'late' if i < 24 * share else 'pictures'}/{i}.png", "a caption") for i in range(24)])
    for _ in range(2):
        with pytest.raises(InputError, match=r"late/0\.png") as refusal:
            BadSamples(load_pairs(str(pairs_csv)))
        assert refusal.value.hint.endswith(f"; if images were added since, touch {pairs_csv}")
        shutil.copytree(pairs_csv.parent / "pictures", late, dirs_exist_ok=True)
    pairs_csv.touch()
    assert not BadSamples(load_pairs(str(pairs_csv)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            Path.unlink,
            r"0\.png of .*pairs\.csv cannot be read: No such file.*; it was there when the table was indexed",
        ),
        (
            lambda path: path.write_bytes(b"new"),
            r"0\.png of .*pairs\.csv has 3 bytes; it had \d,\d+ when the table was",
        ),
    ],
    ids=["missing, as on one node of several", "replaced"],
)
def test_images_that_changed_since_are_told(pairs_csv: Path, change: Callable[[Path], Any], message: str) -> None:
    load_pairs(str(pairs_csv))
    change(pairs_csv.parent / "pictures" / "0.png")
    with pytest.raises(InputError, match=message):
        load_pairs(str(pairs_csv))


def test_relative_paths_depend_on_the_working_directory(
    pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_table = load_pairs(str(pairs_csv)).open(0).tobytes()
    other = tmp_path / "other"
    shutil.copytree(pairs_csv.parent / "pictures", other / "pictures")
    shutil.copy(other / "pictures" / "1.png", other / "pictures" / "0.png")
    monkeypatch.chdir(other)
    assert load_pairs(str(pairs_csv)).open(0).tobytes() != from_table


def test_relative_paths_depend_on_the_folder_of_a_link_to_the_table(pairs_csv: Path, tmp_path: Path) -> None:
    from_table = load_pairs(str(pairs_csv)).open(0).tobytes()
    other = tmp_path / "other"
    shutil.copytree(pairs_csv.parent / "pictures", other / "pictures")
    shutil.copy(other / "pictures" / "1.png", other / "pictures" / "0.png")
    (other / "pairs.csv").symlink_to(pairs_csv)
    from_other = load_pairs(str(other / "pairs.csv")).open(0).tobytes()
    assert from_other != from_table
    current = tmp_path / "current"
    for folder, expected in ((other, from_other), (pairs_csv.parent, from_table)):
        current.unlink(missing_ok=True)
        current.symlink_to(folder)
        assert load_pairs(str(current / "pairs.csv")).open(0).tobytes() == expected


def test_a_copy_in_another_process_opens_the_files_itself(pairs_csv: Path) -> None:
    pairs = load_pairs(str(pairs_csv))
    assert contents(pickle.loads(pickle.dumps(pairs))) == contents(pairs)


def test_an_index_outlives_its_removal_from_the_cache(pairs_csv: Path, tmp_path: Path) -> None:
    pairs = load_pairs(str(pairs_csv))
    shutil.rmtree(tmp_path / "cache")
    assert pairs.captions(23) == ("a yellow picture number 23",)


def test_indices_that_nobody_opens_are_removed(pairs_csv: Path, tmp_path: Path) -> None:
    load_pairs(str(pairs_csv))
    (index,) = (tmp_path / "cache" / "table-indices").glob("*/index.json")
    os.utime(pairs_csv, (1, 1))
    load_pairs(str(pairs_csv))
    assert index.is_file()
    os.utime(index, (time.time() - 31 * 24 * 3600,) * 2)
    os.utime(pairs_csv, (2, 2))
    load_pairs(str(pairs_csv))
    assert not index.parent.exists()
    assert len(list((tmp_path / "cache" / "table-indices").iterdir())) == 2


@pytest.mark.parametrize(("name", "least"), [("rows.bin", 80), ("texts.bin", 100), ("folders.bin", 20)])
def test_a_flipped_bit_in_an_index_is_an_error_and_no_other_pair(
    name: str, least: int, pairs_csv: Path, tmp_path: Path, flips: Callable[[Path, Callable[[], object]], int]
) -> None:
    load_pairs(str(pairs_csv))
    (file,) = (tmp_path / "cache" / "table-indices").glob(f"*/{name}")
    assert flips(file, lambda: contents(load_pairs(str(pairs_csv)))) >= least


def test_a_read_only_cache_only_costs_time(pairs_csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(pairs_csv))  # a file, so that no folder can be made in it
    assert contents(load_pairs(str(pairs_csv))) == contents(in_memory(pairs_csv))


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize("indexed", [False, True], ids=["in memory", "indexed"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_parquet_gives_the_pairs_of_a_csv(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool, dictionary: bool
) -> None:
    names = [*(f"pictures/{i % 24}.png" for i in range(100)), "pictures/none.png", None, "pictures/0.png"]
    captions = [*(CAPTIONS[i % 7] for i in range(99)), "['a', 'b']", "a", "b", None]
    columns: dict[str, Any] = {"index": list(range(103)), "filepath": names, "title": captions}
    if dictionary:
        columns["title"] = pytest.importorskip("pyarrow").array(captions).dictionary_encode()
    path = write_parquet(pairs_csv.with_suffix(".parquet"), columns, row_group_size=13)
    write_rows(pairs_csv, [(name or "", caption or "") for name, caption in zip(names, captions, strict=True)])
    monkeypatch.setattr(parquet, "_BLOCK_ROWS", 10)
    monkeypatch.setattr(load, "INDEXED_ROWS", -1 if indexed else 1 << 30)
    pairs = load_pairs(str(path))
    assert contents(pairs) == contents(in_memory(pairs_csv))
    reasons = [message.partition(": ")[2] for message in pairs.left_out]
    assert reasons == [message.partition(": ")[2] for message in in_memory(pairs_csv).left_out]
    assert pairs.left_out[0].startswith(f"{path}, row 100: the caption in column 'title' is a list; expected one row")
    assert pairs.left_out[1].startswith(f"{path}, row 101: the image 'pictures/none.png' exists neither")


@pytest.mark.parametrize("indexed", [False, True], ids=["in memory", "indexed"])
def test_parquet_may_have_arrows_views_of_strings(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    view = getattr(pytest.importorskip("pyarrow"), "string_view", None)
    if view is None:
        pytest.skip("pyarrow has no string_view")
    texts = {
        "filepath": [f"pictures/{i}.png" for i in range(24)],
        "title": [f"a longer caption {i}" for i in range(24)],
    }
    array = pytest.importorskip("pyarrow").array
    path = write_parquet(pairs_csv.with_suffix(".parquet"), {key: array(texts[key], view()) for key in texts})
    monkeypatch.setattr(parquet, "_BLOCK_ROWS", 10)
    monkeypatch.setattr(load, "INDEXED_ROWS", -1 if indexed else 1 << 30)
    pairs = load_pairs(str(path))
    assert [pairs.captions(i) for i in range(len(pairs))] == [(title,) for title in texts["title"]]
    assert parquet.read_column(str(path), "title") == texts["title"]


@pytest.mark.parametrize("images", [[b"\xff"], [{"bytes": b"\xff", "path": "1.png"}]], ids=["bytes", "Hugging Face"])
def test_images_within_parquet_are_to_be_written_into_files(tmp_path: Path, images: list[Any]) -> None:
    path = write_parquet(tmp_path / "pairs.parquet", {"image": images, "title": ["a"], "data": [b"a"]})
    with pytest.raises(InputError, match=r"column 'image' holds .*binary.*; expected text") as refusal:
        load_pairs(str(path), image_key="image")
    assert refusal.value.hint.endswith("write the images of this one into files or WebDataset shards")
    with pytest.raises(InputError, match="column 'data' holds binary") as refusal:
        parquet.read_column(str(path), "data")
    assert refusal.value.hint == "name a column of text with csv_caption_key"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"filepath": ["a"], "titel": ["b"]}, "no column 'title'; .* Did you mean 'titel'"),
        ({"filepath": [b"\xff"], "title": ["b"]}, "column 'filepath' holds binary; expected text"),
        ({"filepath": ["a"], "title": [["b"]]}, "column 'title' holds list<"),
    ],
)
def test_parquet_with_other_columns_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write_parquet(tmp_path / "pairs.parquet", columns)
    with pytest.raises(InputError, match=message):
        load_pairs(str(path))


def test_what_is_no_parquet_or_damaged_is_named(pairs_csv: Path) -> None:
    path = write_parquet(pairs_csv.with_suffix(".parquet"), {"filepath": ["pictures/0.png"] * 99, "title": ["a"] * 99})
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(40) + content[44:])
    with pytest.raises(InputError, match=r"pairs\.parquet is damaged: "):
        load_pairs(str(path))
    path.write_bytes(b"filepath,title\n")
    with pytest.raises(InputError, match=r"pairs\.parquet is not a Parquet file: "):
        load_pairs(str(path))


@pytest.mark.parametrize("indexed", [False, True], ids=["in memory", "indexed"])
def test_parquet_with_text_that_is_not_utf_8_is_named_by_its_row(
    pairs_csv: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool
) -> None:
    captions = pytest.importorskip("pyarrow").array([b"a cat"] * 12 + [b"caf\xe9"]).view("string")
    path = write_parquet(pairs_csv.with_suffix(".parquet"), {"filepath": ["pictures/0.png"] * 13, "title": captions})
    monkeypatch.setattr(parquet, "_BLOCK_ROWS", 10)
    monkeypatch.setattr(load, "INDEXED_ROWS", -1 if indexed else 1 << 30)
    message = r"pairs\.parquet, row 13: it is not UTF-8 text"
    with pytest.raises(InputError, match=message):
        load_pairs(str(path))
    with pytest.raises(InputError, match=message):
        parquet.read_column(str(path), "title")


@pytest.mark.parametrize("name", ["PAIRS.PARQUET", "pairs.parquet.gzip", "pairs"])
def test_parquet_is_known_whatever_its_name(pairs_csv: Path, name: str) -> None:
    images = [f"pictures/{i}.png" for i in range(2)]
    path = write_parquet(pairs_csv.with_name(name), {"filepath": images, "title": ["a", "b"]}, compression="gzip")
    assert load_pairs(str(path)).captions(1) == ("b",)
    assert load_texts(str(path), "title", lambda *_: pytest.fail("read as text")) == ["a", "b"]


def test_texts_of_parquet_with_a_list_for_one_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "texts.parquet", {"title": ["a cat", "['a', 'b']"]})
    with pytest.raises(InputError, match=r"texts\.parquet has a list in its column 'title': .*; expected one row"):
        parquet.read_column(str(path), "title")


def test_a_parquet_table_is_a_retrieval_task(pairs_csv: Path) -> None:
    path = write_parquet(
        pairs_csv.with_suffix(".parquet"),
        {"filepath": ["pictures/0.png", "pictures/../pictures/0.png", "pictures/1.png"], "title": ["a", "b", "c"]},
    )
    task = load_task(str(path))
    assert (len(task.images), task.caption_images) == (2, (0, 0, 1))


def test_epochs_shuffle_the_same_groups_of_rows(pairs_csv: Path) -> None:
    write_rows(pairs_csv, [(f"pictures/{i % 24}.png", f"caption {i}") for i in range(10_000)])
    assert list(load_pairs(str(pairs_csv)).groups) == list(in_memory(pairs_csv).groups) == [4096, 4096, 1808]
