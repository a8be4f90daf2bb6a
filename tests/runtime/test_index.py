from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from support import CommandLine, Watch, another_model, fail_to_look_at, rewrite

from clip_rd_edge.bundle.encoder import normalise
from clip_rd_edge.bundle.labels import LabelBank, write_labels
from clip_rd_edge.bundle.manifest import BACKGROUND
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, InputError, NotFiniteError, UsageError
from clip_rd_edge.runtime import index_update as indexing
from clip_rd_edge.runtime.backends.onnxruntime import OrtEncoder
from clip_rd_edge.runtime.encoder import Placement
from clip_rd_edge.runtime.index import Entry, Index, is_index, model_key, nearest, read_index, search_index, write_index
from clip_rd_edge.runtime.index_folder import Source
from clip_rd_edge.runtime.index_update import update_index
from clip_rd_edge.runtime.load import load


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "photos.index"


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the batch size of each call of the image tower."""
    batch_sizes: list[int] = []
    encode = OrtEncoder.encode_pixels

    def record(self: OrtEncoder, pixels: np.ndarray) -> np.ndarray:
        batch_sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(OrtEncoder, "encode_pixels", record)
    return batch_sizes


def names(path: Path) -> list[str]:
    return sorted(entry.path for entry in read_index(path)[0].entries)


def files(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in path.iterdir()}


def paint(folder: Path, count: int) -> None:
    for i in range(count):
        Image.new("RGB", (9, 9), (i, 50, 50)).save(folder / f"{i:03}.png")


def interrupted_at(done: int) -> Watch:
    def interrupt(step: int) -> None:
        if step >= done:
            raise KeyboardInterrupt

    return Watch("embedding", interrupt)


def test_only_changed_images_are_embedded_and_only_changes_are_written(
    colour_bundle: Path, colour_images: Path, index: Path, embedded: list[int]
) -> None:
    for name in ("m.bmp", "n.bmp"):  # the same content and time
        Image.new("RGB", (9, 9), (250, 0, 0)).save(colour_images / name)
        os.utime(colour_images / name, ns=(10**18, 10**18))
    encoder = load(colour_bundle)
    assert update_index(encoder, colour_images, index).embedded == 6
    before = files(index)
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded, update.removed) == (6, 0, 0)
    assert files(index) == before
    Image.new("RGB", (9, 9), (0, 0, 250)).save(colour_images / "red.png")  # now blue
    Image.new("RGB", (9, 9), (0, 0, 240)).save(colour_images / "a.png")
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded, update.removed) == (5, 2, 0)
    assert sum(embedded) == 8
    assert len(files(index)) == 2  # the old embeddings file was deleted
    before = files(index)
    assert update_index(encoder, colour_images, index).kept == 7
    assert files(index) == before
    known, rows = read_index(index)
    best = nearest(known, rows, encoder.encode_texts(["blue"]), top=3)
    assert {hit.path.name for hit in best} == {"red.png", "blue.jpg", "a.png"}


def test_moved_copied_or_touched_images_are_not_embedded_again(
    colour_bundle: Path, colour_images: Path, index: Path, embedded: list[int]
) -> None:
    encoder, copies = load(colour_bundle), [colour_images / f"copy{i}.png" for i in range(3)]
    update_index(encoder, colour_images, index)
    (colour_images / "green.png").rename(colour_images / "more" / "moved.png")
    for copy in copies:
        shutil.copy(colour_images / "red.png", copy)
    os.utime(colour_images / "blue.jpg", ns=(1, 1))
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded, update.removed) == (7, 0, 0)
    known, rows = read_index(index)
    assert nearest(known, rows, encoder.encode_texts(["green"]), top=1)[0].path == colour_images / "more" / "moved.png"
    copies[0].unlink()
    os.utime(copies[1], (1, 1))
    assert update_index(encoder, colour_images, index).removed == 1
    for path in (colour_images / "red.png", *copies[1:]):
        path.rename(colour_images / "more" / path.name)
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded, update.removed) == (6, 0, 0)
    assert sum(embedded) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="has no time of change")
def test_a_change_is_noticed_though_size_and_time_are_those_of_before(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    encoder, frame = load(colour_bundle), colour_images / "frame.bmp"
    for colour, embedded in (((250, 0, 0), 5), ((0, 0, 250), 1)):
        Image.new("RGB", (9, 9), colour).save(frame)
        os.utime(frame, (1, 1))
        assert update_index(encoder, colour_images, index).embedded == embedded
        time.sleep(0.02)  # file systems keep times to some milliseconds
    (colour_images / "more.png").hardlink_to(frame)  # changes the time, and not the content
    frame.chmod(0o600)
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded) == (6, 0)
    before = files(index)
    update_index(encoder, colour_images, index)
    assert files(index) == before


@pytest.fixture
def _no_time_of_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, and on file systems on which renaming a file does not change it."""
    entry = Source.entry
    monkeypatch.setattr(Source, "entry", lambda *args: msgspec.structs.replace(entry(*args), changed_ns=0))


@pytest.mark.usefixtures("_no_time_of_change")
def test_an_image_that_changes_within_a_second_that_the_file_system_does_not_divide_is_noticed(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    """FAT, zip archives and some network shares keep whole seconds, or two of them."""
    second, path, sizes = int(time.time()), colour_images / "frame.bmp", set()
    for colour, name in (((250, 0, 0), "red"), ((0, 250, 0), "green")):
        Image.new("RGB", (40, 30), colour).save(path)
        os.utime(path, (second, second))
        sizes.add(path.stat().st_size)
        update_index(load(colour_bundle), colour_images, index)
        assert {hit.path.name: hit.similarity for hit in search_index(index, name)}["frame.bmp"] > 0.99
    assert len(sizes) == 1
    os.utime(path, (second - 60, second - 60))
    update_index(load(colour_bundle), colour_images, index)
    before = files(index)
    update_index(load(colour_bundle), colour_images, index)
    assert files(index) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_images_that_may_only_be_unmounted_stay(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path
) -> None:
    for name in ("mounted/2020", "mount point"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (9, 9), (0, 0, 250)).save(tmp_path / "mounted" / "2020" / "blue.png")
    disk = colour_images / "disk"
    disk.symlink_to(tmp_path / "mounted")
    (colour_images / "link.png").symlink_to(tmp_path / "mounted" / "2020" / "blue.png")
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    before = names(index)
    (tmp_path / "mounted").rename(tmp_path / "away")
    update = update_index(encoder, colour_images, index)  # links to nothing
    assert (update.kept, update.removed, len(update.unreadable), names(index)) == (6, 0, 2, before)
    disk.unlink()
    disk.symlink_to(tmp_path / "mount point")  # as unmounting does: the folder beneath appears
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.removed, names(index)) == (6, 0, before)
    assert any("disk is empty; 1 image of it stays" in message for message in update.unreadable)
    disk.unlink()
    (colour_images / "link.png").unlink()
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.removed, update.unreadable) == (4, 2, [])
    colour_images.rename(tmp_path / "photos away")
    colour_images.mkdir()
    with pytest.raises(InputError):
        update_index(encoder, colour_images, index)
    assert len(names(index)) == 4


def test_images_that_cannot_be_looked_at_for_a_moment_stay(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch, command_line: CommandLine
) -> None:
    for colour in (10, 20):
        Image.new("RGB", (9, 9), (250, colour, 0)).save(colour_images / "more" / f"{colour}.png")
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    with monkeypatch.context() as patch:  # one file of a bad disk
        fail_to_look_at(patch, lambda path: path.name == "red.png", OSError(errno.EIO, "Input/output error"))
        update = update_index(encoder, colour_images, index)
    assert (update.kept, update.removed) == (6, 0)
    assert update.unreadable == [f"Cannot read the image {colour_images / 'red.png'}: Input/output error."]
    with monkeypatch.context() as patch:  # a folder that may be listed and not entered
        fail_to_look_at(patch, lambda path: path.parent.name == "more", PermissionError(13, "Permission denied"))
        update = update_index(encoder, colour_images, index)
        code, output, error = command_line("search", index, "red")
    assert (update.kept, update.removed) == (6, 0)
    assert len(update.unreadable) == 3
    assert (code, len(output.splitlines()), error) == (0, 6, "")  # none is called gone
    assert update_index(encoder, colour_images, index).embedded == 0


def test_an_interrupted_update_keeps_its_progress(
    command_line: CommandLine, colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(colour_images, 100)
    encoder = load(colour_bundle)
    with pytest.raises(KeyboardInterrupt):
        update_index(encoder, colour_images, index, reporter=interrupted_at(64))
    assert len(search_index(index, "red", top=100)) == 64
    code, output, error = command_line("search", index, "red", "--top", "1")
    assert (code, len(output.splitlines()), "has 64 of 104 images" in " ".join(error.split())) == (0, 1, True)

    def interrupted(*args: Any) -> Iterator[Any]:
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "embed_images", interrupted)
        assert command_line("index", colour_bundle, colour_images, "-o", index)[0] == 75
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded) == (64, 40)
    assert command_line("search", index, "red", "--top", "1")[2] == ""


def test_ctrl_c_within_a_batch_damages_no_index(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, entry = load(colour_bundle), Source.entry
    update_index(encoder, colour_images, index)
    Image.new("RGB", (9, 9), (200, 50, 50)).save(colour_images / "new.png")

    def interrupt(source: Source, sha256: str = "") -> Entry:
        if not sha256:  # of an image that was just embedded
            raise KeyboardInterrupt
        return entry(source, sha256)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "entry", interrupt)
        with pytest.raises(KeyboardInterrupt):
            update_index(encoder, colour_images, index)
    assert len(names(index)) == 4
    assert update_index(encoder, colour_images, index).embedded == 1


def test_a_kill_loses_only_the_work_since_the_last_save(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(colour_images, 60)
    index.mkdir()
    leftovers = [".lock", "embeddings-123.npy", ".embeddings-123.npy.abc.tmp", ".index.json.abc.tmp"]
    for name in leftovers:  # by a first run that was killed
        (index / name).write_bytes(b"x")
    monkeypatch.setattr(indexing, "SAVE_EVERY_S", -1)
    saved_counts = []
    reporter = Watch("embedding", lambda _: saved_counts.append(len(names(index)) if is_index(index) else 0))
    update_index(load(colour_bundle), colour_images, index, reporter=reporter)
    assert reporter.updates == [("embedding", done, 64) for done in (0, 32, 64)]
    assert saved_counts == [0, 0, 32]  # after each batch, all earlier batches are on disk
    assert not {path.name for path in index.iterdir()} & set(leftovers)


def test_an_index_is_searched_and_updated_on_another_device_with_a_copy_of_its_bundle(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(OrtEncoder, "placement", lambda self, tower: Placement("onnxruntime", "cuda"))
        update_index(load(colour_bundle), colour_images, index)
    there = tmp_path / "device"
    for path in (colour_bundle, colour_images, index):
        shutil.move(path, there / path.name)
    moved, bundle = there / index.name, there / colour_bundle.name
    with pytest.raises(InputError) as raised:
        search_index(moved, "red")
    assert raised.value.option == "bundle"
    (hit,) = search_index(moved, "red", top=1, bundle=bundle, folder=there / colour_images.name)
    assert hit.path == there / colour_images.name / "red.png"
    shutil.copytree(there / colour_images.name, colour_images)  # the same path here, as on a network drive
    update = update_index(load(bundle), colour_images, moved)
    assert (update.kept, update.embedded) == (4, 0)
    assert search_index(moved, "red", top=1)[0].path == colour_images / "red.png"  # the bundle's new path is kept


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_folder_that_was_moved_is_not_embedded_again(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path, keep_times: bool
) -> None:
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    moved, other = tmp_path / "disk" / "photos", tmp_path / "other"
    shutil.copytree(colour_images, moved, copy_function=shutil.copy2 if keep_times else shutil.copy)
    with pytest.raises(UsageError):  # the first one is still there
        update_index(encoder, moved, index)
    shutil.rmtree(colour_images)
    if keep_times:
        colour_images.mkdir()  # a mount point stays
    update = update_index(encoder, moved, index)
    assert (update.kept, update.embedded, update.removed) == (4, 0, 0)
    assert search_index(index, "red", top=1)[0].path == moved / "red.png"
    other.mkdir()
    shutil.copy(moved / "red.png", other)
    shutil.rmtree(moved)
    with pytest.raises(UsageError):  # one image of the same name is no evidence
        update_index(encoder, other, index)


def test_an_index_of_another_model_or_preprocessing_is_refused_and_stays(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    update_index(load(colour_bundle), colour_images, index)
    before, manifest = files(index), rewrite(colour_bundle, preprocessing={"mean": (0.5, 0.5, 0.5)})
    with pytest.raises(UsageError):
        update_index(load(colour_bundle), colour_images, index)
    assert files(index) == before
    assert model_key(rewrite(colour_bundle, text={"precision": "bf16"})) == model_key(manifest)
    assert model_key(rewrite(colour_bundle, image={"precision": "bf16"})) != model_key(manifest)  # of the same file


@pytest.mark.parametrize(
    "entries",
    ["{}", '""', '[["a",1,2,3,"b"],["a",1,2,3,4]]', "[" * 10_000 + "]" * 10_000, '[["../a",1,2,3,"b"]]',
     '[["/a",1,2,3,"b"]]', '[],"embeddings":"../e.npy"', '[],"graph":{"name":"../g","links_at":1,"crc32":1}'],
)  # fmt: skip
def test_an_index_of_another_form_or_that_names_files_elsewhere_is_damaged(tmp_path: Path, entries: str) -> None:
    content = f'{{"folder":"f","bundle":"b","model":"m","embeddings":"e.npy","entries":{entries}}}'.encode()
    (tmp_path / "index.json").write_bytes(b'{"version":1,"crc32":%d,"index":%b}' % (zlib.crc32(content), content))
    with pytest.raises(ConfigError):
        read_index(tmp_path)


QUERIES = normalise(np.random.default_rng(1).standard_normal((3, 16)))


def made_index(path: Path, rows: np.ndarray) -> None:
    entries = [
        Entry(path=f"{i}.jpg", size_bytes=i, modified_ns=i, changed_ns=i, sha256=f"{i:064x}") for i in range(len(rows))
    ]
    write_index(path, Index(folder="/f", bundle="/b", model="m", embeddings="", entries=entries), rows)


def answers(path: Path, *, memory_mapped: bool) -> list[Any]:
    known, rows = read_index(path, memory_mapped=memory_mapped)
    return [nearest(known, rows, query, top=5, checked=not memory_mapped) for query in QUERIES]


@pytest.mark.parametrize("memory_mapped", [True, False])
def test_a_flipped_bit_in_an_index_is_an_error_and_no_other_answer(index: Path, *, memory_mapped: bool) -> None:
    made_index(index, normalise(np.random.default_rng(0).standard_normal((150, 16))))
    expected, rng, refused = answers(index, memory_mapped=memory_mapped), np.random.default_rng(2), 0
    for file in index.iterdir():
        content = file.read_bytes()
        for place in (*range(0, 128, 3), *rng.integers(0, len(content), 60).tolist()):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            try:
                assert answers(index, memory_mapped=memory_mapped) == expected  # such as in what fills up a header
            except ClipRdEdgeError:
                refused += 1
        file.write_bytes(content)
    assert refused > 150


@pytest.mark.parametrize(
    ("value", "error"), [(np.nan, NotFiniteError), (np.inf, NotFiniteError), (3.0, ConfigError), (-3.0, ConfigError)]
)
def test_rows_that_are_no_unit_vectors_are_an_error_and_no_answer(
    index: Path, value: float, error: type[ConfigError]
) -> None:
    """Whoever wrote them."""
    rows = np.eye(16, dtype=np.float32)
    made_index(index, np.where(rows > 0, np.float32(value), rows))
    with pytest.raises(error):
        nearest(*read_index(index), rows[0], top=1)
    made_index(index, rows)
    assert nearest(*read_index(index), rows[0], top=1)[0].similarity == 1


def test_embeddings_that_were_damaged_on_the_disk_are_refused_and_computed_again(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage() -> None:
        (file,) = index.glob("embeddings-*.npy")
        content = bytearray(file.read_bytes())
        content[-9] ^= 64
        file.write_bytes(content)

    monkeypatch.setattr("clip_rd_edge.runtime.index._BLOCK_ROWS", 3)
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    expected = read_index(index, memory_mapped=False)
    damage()
    with pytest.raises(ConfigError):
        search_index(index, "red")
    watch = Watch()
    update = update_index(encoder, colour_images, index, reporter=watch)
    assert (update.embedded, update.kept, update.removed) == (1, 3, 0)
    assert "1 embeddings" in watch.noted[0]
    known, rows = read_index(index, memory_mapped=False)
    assert known.entries == expected[0].entries
    np.testing.assert_array_equal(rows, expected[1])
    damage()
    (colour_images / known.entries[-1].path).unlink()  # nothing is new
    assert update_index(encoder, colour_images, index).kept == 3
    assert len(read_index(index, memory_mapped=False)[0].entries) == 3


def test_the_index_and_search_commands(
    command_line: CommandLine, colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path
) -> None:
    code, output, error = command_line("index", colour_bundle, colour_images, "-o", index)
    assert (code, output, "4 embedded, 0 kept, 0 removed" in error) == (0, f"{index}\n", True)
    code, output, _ = command_line("search", index, "blue", "--top", "1")
    similarity, path = output.rstrip().split("\t")
    assert (code, path, float(similarity) > 0.9) == (0, str(colour_images / "blue.jpg"), True)
    code, output, _ = command_line("search", index, colour_images / "red.png", "--top", "2", "--json")
    first = json.loads(output.splitlines()[0])
    assert first == {"image": str(colour_images / "red.png"), "similarity": 1.0}
    (colour_images / "broken.png").write_bytes(b"not an image")
    code, output, error = command_line("index", colour_bundle, colour_images, "-o", index)
    assert (code, output, "1 image or folder could not be read" in error) == (2, f"{index}\n", True)
    assert command_line("search", index, " ")[0] == 2
    (colour_images / "blue.jpg").unlink()
    code, output, error = command_line("search", index, "blue", "--top", "2")
    assert (code, len(output.splitlines())) == (0, 2)
    assert "Of these 2 images, 1 are not there any more." in error
    moved = colour_images.rename(tmp_path / "moved")
    assert command_line("search", index, "red", "--top", "1", "--folder", moved)[::2] == (0, "")
    code, _, error = command_line("search", index, "red", "--bundle", another_model(colour_bundle, tmp_path / "other"))
    assert (code, "is not the one that created the index" in error) == (2, True)


def test_two_indexers_and_twenty_searchers_at_once_meet_no_error_and_lose_nothing(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    paint(colour_images, 92)
    program = (
        "import sys; from pathlib import Path; from clip_rd_edge import load\n"
        "from clip_rd_edge.runtime import index_update as update\n"
        "update.SAVE_EVERY_S = -1\n"
        "print(update.update_index(load(sys.argv[1]).encoder, Path(sys.argv[2]), Path(sys.argv[3])).embedded)"
    )
    command = [sys.executable, "-c", program, str(colour_bundle), str(colour_images), str(index)]
    indexers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    query = load(colour_bundle).encode_texts(["red"])

    def search_until_done() -> int:
        count = 0
        while not count or any(indexer.poll() is None for indexer in indexers):
            if is_index(index):
                hits = nearest(*read_index(index), query, top=1000)
                assert len({hit.path for hit in hits}) == len(hits) >= 32
                count += 1
        return count

    with ThreadPoolExecutor(20) as searchers:
        searches = [searchers.submit(search_until_done) for _ in range(20)]
        outputs = [indexer.communicate(timeout=300)[0] for indexer in indexers]
        assert sum(search.result() for search in searches) > len(searches)
    assert [indexer.returncode for indexer in indexers] == [0, 0]
    assert sorted(map(int, outputs)) == [0, 96]  # the one that waited embeds nothing again
    assert len(names(index)) == 96
    assert {path.suffix for path in index.iterdir()} == {".json", ".npy"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes file names of any bytes")
def test_a_name_that_is_not_utf8_is_reported_and_the_others_are_indexed(
    command_line: CommandLine, colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    (colour_images / "red.png").rename(os.fsdecode(os.fsencode(colour_images) + b"/caf\xe9.png"))
    for embedded_count in (3, 0):  # the folder that the first run leaves is taken by the second
        code, _, error = command_line("index", colour_bundle, colour_images, "-o", index)
        assert (code, rf"{colour_images}/caf\xe9.png is not UTF-8" in error) == (2, True)
        assert f"{embedded_count} embedded" in error
    assert names(index) == ["blue.jpg", "green.png", "more/yellow.webp"]


def test_a_mistyped_path_is_not_searched_for_as_a_text(
    colour_bundle: Path, colour_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_index(load(colour_bundle), colour_images, tmp_path / "index")
    monkeypatch.chdir(colour_images)
    for query in ("red.pgn", "more/yelow.webp", "./red", "more/"):
        with pytest.raises(InputError):
            search_index(tmp_path / "index", query)
    for text in ("a red/green flag", "red", "node.js", "r" * 5000):
        assert len(search_index(tmp_path / "index", text)) == 4


def test_a_search_by_text_marks_where_images_fit_no_better_than_for_random_texts(
    colour_bundle: Path, colour_images: Path, index: Path, command_line: Any
) -> None:
    nouns = normalise(np.tile([1.0, 1.0, 0.6], (8, 1)))  # the best image, yellow, has a cosine of 0.96
    write_labels(colour_bundle, LabelBank(tuple(map(str, range(8))), nouns), name=BACKGROUND)
    rewrite(colour_bundle)
    update_index(load(colour_bundle), colour_images, index)
    hits = search_index(index, "red")
    assert len(hits) == 4
    assert hits.cutoff == pytest.approx(0.96, abs=0.03)
    assert search_index(index, colour_images / "red.png").cutoff is None
    assert command_line("search", index, "red", "--fitting")[1].count("\n") == 1
    code, output, error = command_line("search", index, "red", "--json")
    assert (code, [json.loads(line)["fits"] for line in output.splitlines()]) == (0, [True, False, False, False])
    assert "random texts" in error
    assert command_line("search", index, "red", "--top", "1")[2] == ""
    assert command_line("search", index, "red", "--fitting")[1].count("\n") == 1
    (colour_images / "blue.jpg").unlink()
    shutil.rmtree(colour_images / "more")
    update_index(load(colour_bundle), colour_images, index)  # measures anew
    cutoff = read_index(index)[0].cutoff
    assert cutoff is not None
    assert cutoff < 0.9
