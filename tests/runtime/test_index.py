from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from support import Watch, fail_to_look_at

from clip_rd_edge.benchmarking.accuracy import retrieval
from clip_rd_edge.bundle.encoder import normalise, top_indices
from clip_rd_edge.bundle.image_files import list_images
from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.data.tasks import RetrievalTask, load_task
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, DiskFullError, InputError, NotFiniteError, UsageError
from clip_rd_edge.installation import upgrade_hint
from clip_rd_edge.runtime import index_update as index_folder
from clip_rd_edge.runtime import index_update as indexing
from clip_rd_edge.runtime.backends.onnxruntime import OrtEncoder
from clip_rd_edge.runtime.embed import embed_images
from clip_rd_edge.runtime.encoder import Placement
from clip_rd_edge.runtime.index import (
    Entry,
    GraphFiles,
    Index,
    is_index,
    model_key,
    nearest,
    read_index,
    search_index,
    write_index,
)
from clip_rd_edge.runtime.index_update import Source, update_index
from clip_rd_edge.runtime.load import load

Run = Callable[..., tuple[int, str, str]]


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


def test_only_changed_images_are_embedded(
    colour_bundle: Path, colour_images: Path, index: Path, embedded: list[int]
) -> None:
    encoder = load(colour_bundle)
    assert update_index(encoder, colour_images, index).embedded == 4
    before = files(index)
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded, update.removed) == (4, 0, 0)
    assert files(index) == before  # nothing changed, nothing written
    Image.new("RGB", (9, 9), (0, 0, 250)).save(colour_images / "red.png")  # now blue
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded, update.removed) == (3, 1, 0)
    assert sum(embedded) == 5
    assert len(files(index)) == 2  # the old embeddings file was deleted
    known, rows = read_index(index)
    best = nearest(known, rows, encoder.encode_texts(["blue"]), top=2)
    assert {hit.path.name for hit in best} == {"red.png", "blue.jpg"}


def test_an_update_decodes_the_entries_of_its_index_once(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, reads = load(colour_bundle), list[Path]()
    update_index(encoder, colour_images, index)
    monkeypatch.setattr(indexing, "read_index", lambda path: reads.append(path) or read_index(path))
    update_index(encoder, colour_images, index)
    assert len(reads) == 1


def test_nothing_is_written_while_no_image_came_or_went_though_some_cannot_be_read(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "SAVE_EVERY_S", -1.0)
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    for i in range(40):  # more than a batch
        (colour_images / f"broken{i}.png").write_bytes(b"no image")
    before = files(index)
    for _ in range(2):
        update = update_index(encoder, colour_images, index)
        assert (update.kept, update.embedded, len(update.unreadable)) == (4, 0, 40)
        assert files(index) == before
    Image.new("RGB", (9, 9), (0, 0, 250)).save(colour_images / "broken7.png")
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded, len(update.unreadable)) == (4, 1, 39)
    assert (len(names(index)), read_index(index)[0].missing) == (5, 0)
    (colour_images / "blue.jpg").unlink()
    update_index(encoder, colour_images, index)
    assert len(names(index)) == 4


def test_nothing_is_written_after_images_that_come_before_others_were_added(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    for name in ("m.bmp", "n.bmp"):  # the same content and time
        Image.new("RGB", (9, 9), (250, 0, 0)).save(colour_images / name)
        os.utime(colour_images / name, ns=(10**18, 10**18))
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    Image.new("RGB", (9, 9), (0, 0, 250)).save(colour_images / "a.png")
    (colour_images / "b.png").write_bytes((colour_images / "red.png").read_bytes())
    update_index(encoder, colour_images, index)
    before = files(index)
    assert update_index(encoder, colour_images, index).kept == 8
    assert files(index) == before


def test_moved_copied_or_touched_images_are_not_embedded_again(
    colour_bundle: Path, colour_images: Path, index: Path, embedded: list[int]
) -> None:
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    (colour_images / "green.png").rename(colour_images / "more" / "moved.png")
    (colour_images / "copy.png").write_bytes((colour_images / "red.png").read_bytes())
    os.utime(colour_images / "blue.jpg", ns=(1, 1))
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded, update.removed) == (5, 0, 0)
    assert sum(embedded) == 4
    known, rows = read_index(index)
    assert nearest(known, rows, encoder.encode_texts(["green"]), top=1)[0].path == colour_images / "more" / "moved.png"


def test_copies_of_an_image_that_are_moved_are_not_removed_and_one_that_is_deleted_is(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    encoder, copies = load(colour_bundle), [colour_images / f"copy{i}.png" for i in range(3)]
    for copy in copies:
        shutil.copy(colour_images / "red.png", copy)
    update_index(encoder, colour_images, index)
    copies[0].unlink()
    os.utime(copies[1], (1, 1))
    assert update_index(encoder, colour_images, index).removed == 1
    for path in (colour_images / "red.png", *copies[1:]):
        path.rename(colour_images / "more" / path.name)
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded, update.removed) == (6, 0, 0)
    (colour_images / "more" / "copy1.png").unlink()
    assert update_index(encoder, colour_images, index).removed == 1


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
def test_images_of_the_same_size_and_time_that_change_places_are_noticed(
    colour_bundle: Path, colour_images: Path, index: Path, embedded: list[int]
) -> None:
    pair = [colour_images / name for name in ("1.bmp", "2.bmp")]
    for path, colour in zip(pair, ((250, 0, 0), (0, 250, 0)), strict=True):
        Image.new("RGB", (9, 9), colour).save(path)
        os.utime(path, ns=(10**18, 10**18))
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    pair[0].rename(colour_images / "aside")
    pair[1].rename(pair[0])
    (colour_images / "aside").rename(pair[1])
    assert update_index(encoder, colour_images, index).embedded == 0
    assert sum(embedded) == 6
    known, rows = read_index(index)
    found = [hit.path for hit in nearest(known, rows, encoder.encode_texts(["green"]), top=2)]
    assert pair[0] in found
    assert pair[1] not in found


def test_an_index_is_written_without_a_copy_of_its_embeddings(index: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(20_000, 100)).astype(np.float32)
    entries = [
        Entry(path=str(number), size_bytes=1, modified_ns=1, changed_ns=1, sha256="") for number in range(len(rows))
    ]
    empty = Index(folder="", bundle="", model="", embeddings="", entries=entries)
    tracemalloc.start()
    write_index(index, empty, rows)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < rows.nbytes / 2
    np.testing.assert_array_equal(read_index(index)[1], rows)


def test_images_that_may_only_be_unmounted_stay(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk" / "sub").mkdir(parents=True)
    Image.new("RGB", (9, 9), (0, 0, 250)).save(tmp_path / "disk" / "sub" / "blue.png")
    (colour_images / "disk").symlink_to(tmp_path / "disk")
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    before = names(index)
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.removed, names(index)) == (5, 0, before)
    assert "disk: it is a link to something that does not exist" in update.unreadable[0]
    (colour_images / "disk").unlink()
    assert update_index(encoder, colour_images, index).removed == 1
    colour_images.rename(tmp_path / "away")
    colour_images.mkdir()
    with pytest.raises(InputError, match=r"has no images, but .* has 4 of it, and stays as it is"):
        update_index(encoder, colour_images, index)
    assert len(names(index)) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="needs links, and the time of a folder's last change")
def test_images_on_a_disk_below_the_folder_stay_while_its_mount_point_is_empty(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path
) -> None:
    for name in ("mounted/2020", "mount point"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (9, 9), (0, 0, 250)).save(tmp_path / "mounted" / "2020" / "blue.png")
    (colour_images / "disk").symlink_to(tmp_path / "mounted")
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    before = names(index)
    (colour_images / "disk").unlink()
    (colour_images / "disk").symlink_to(tmp_path / "mount point")  # as unmounting does: the folder beneath appears
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.removed, names(index)) == (5, 0, before)
    (message,) = update.unreadable
    assert "disk is empty; 1 image of it stays in the index" in message
    time.sleep(0.02)  # file systems keep times to some milliseconds
    (tmp_path / "mount point" / "new.txt").write_bytes(b"")
    (tmp_path / "mount point" / "new.txt").unlink()  # as when the images in it are deleted: now it has changed
    os.utime(tmp_path / "mount point", (1, 1))  # as rsync -a sets it
    update = update_index(encoder, colour_images, index)
    assert (update.removed, update.unreadable) == (1, [])


@pytest.mark.skipif(sys.platform == "win32", reason="needs the time of a folder's last change")
def test_images_that_are_moved_out_of_a_folder_while_they_are_embedded_leave_the_index(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = indexing.embed_images

    def embed_and_move(*args: Any) -> Any:
        time.sleep(0.02)  # file systems keep times to some milliseconds
        yield from embed(*args)
        (colour_images / "more" / "yellow.webp").rename(colour_images / "yellow.webp")
        time.sleep(0.02)

    encoder = load(colour_bundle)
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "embed_images", embed_and_move)
        update_index(encoder, colour_images, index)
    update = update_index(encoder, colour_images, index)
    assert (update.removed, update.unreadable) == (0, [])
    assert names(index) == ["blue.jpg", "green.png", "red.png", "yellow.webp"]


def test_images_that_cannot_be_looked_at_for_a_moment_stay(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
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
    assert (update.kept, update.removed) == (6, 0)
    assert update.unreadable == [f"Cannot read the folder {colour_images / 'more'}: Permission denied."]
    assert update_index(encoder, colour_images, index).embedded == 0


def test_an_indexed_link_to_an_image_on_an_unmounted_disk_keeps_its_entry(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (colour_images / "red.png").rename(tmp_path / "disk" / "red.png")
    (colour_images / "red.png").symlink_to(tmp_path / "disk" / "red.png")
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    (tmp_path / "disk").rename(tmp_path / "away")
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.removed, len(update.unreadable)) == (4, 0, 1)
    (tmp_path / "away").rename(tmp_path / "disk")
    assert update_index(encoder, colour_images, index).embedded == 0


def test_a_folder_that_goes_away_after_it_was_listed_empties_no_index(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    listed = list_images

    def list_and_remove(folder: Path, **options: Any) -> list[Path]:
        images = listed(folder, **options)
        away.rename(tmp_path / f"away-{away.name}")
        return images

    monkeypatch.setattr(index_folder, "list_images", list_and_remove)
    away = colour_images / "red.png"
    assert update_index(encoder, colour_images, index).removed == 1
    away = colour_images
    with pytest.raises(InputError, match=r"has no images, but .* has 3 of it, and stays as it is"):
        update_index(encoder, colour_images, index)
    assert len(names(index)) == 3


def test_an_interrupted_update_keeps_its_progress(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(100):
        Image.new("RGB", (9, 9), (i, 50, 50)).save(colour_images / f"{i:03}.png")
    encoder = load(colour_bundle)

    def interrupt(done: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_index(encoder, colour_images, index, reporter=Watch("embedding", interrupt))
    assert len(names(index)) == 64
    known, rows = read_index(index)
    assert len(nearest(known, rows, encoder.encode_texts(["red"]), top=100)) == 64
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded) == (64, 40)


def test_ctrl_c_within_a_batch_damages_no_index(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    Image.new("RGB", (9, 9), (200, 50, 50)).save(colour_images / "new.png")

    entry = Source.entry

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
    for i in range(60):
        Image.new("RGB", (9, 9), (i, 50, 50)).save(colour_images / f"{i:03}.png")
    monkeypatch.setattr(indexing, "SAVE_EVERY_S", -1)
    saved_counts = []
    reporter = Watch("embedding", lambda _: saved_counts.append(_count(index)))
    update_index(load(colour_bundle), colour_images, index, reporter=reporter)
    assert reporter.updates == [("embedding", done, 64) for done in (0, 32, 64)]
    assert saved_counts == [0, 0, 32]  # after each batch, all earlier batches are on disk
    # A partly written file beside them is ignored.
    (index / ".index.json.abc.tmp").write_text("{")
    assert len(names(index)) == 64


def test_saving_a_large_index_takes_a_small_share_of_the_time(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(40):
        Image.new("RGB", (9, 9), (i, 50, 50)).save(colour_images / f"{i:03}.png")
    clock, saves, write_index, embed_images = [0.0], list[float](), indexing.write_index, indexing.embed_images

    def write_slowly(*arguments: Any) -> Any:
        saves.append(clock[0])
        clock[0] += 10
        return write_index(*arguments)

    def embed(*arguments: Any) -> Iterator[Any]:
        for batch in embed_images(*arguments, batch_size=1):
            clock[0] += 30
            yield batch

    monkeypatch.setattr(indexing, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(indexing, "write_index", write_slowly)
    monkeypatch.setattr(indexing, "embed_images", embed)
    update_index(load(colour_bundle), colour_images, index)
    assert saves[:2] == [30, 250]  # of 10 s each; a save every 20 s would take a quarter of the time
    assert len(saves) == 8  # with the last one
    assert len(names(index)) == 44


def test_a_full_disk_keeps_what_was_saved_before_and_says_so(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(60):
        Image.new("RGB", (9, 9), (i, 50, 50)).save(colour_images / f"{i:03}.png")
    encoder, write_index, free = load(colour_bundle), indexing.write_index, [0]
    monkeypatch.setattr(indexing, "SAVE_EVERY_S", -1)

    def write(*arguments: Any) -> Any:
        if not free[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        free[0] -= 1
        return write_index(*arguments)

    monkeypatch.setattr(indexing, "write_index", write)
    with pytest.raises(DiskFullError, match=r"no space left on the disk; .* is no index yet\."):
        update_index(encoder, colour_images, index)
    free[0] = 1
    with pytest.raises(DiskFullError, match="is an index of the 32 images that were saved before") as error:
        update_index(encoder, colour_images, index)
    assert "run the same command again" in error.value.hint
    free[0] = 9
    assert update_index(encoder, colour_images, index).kept == 32


def _count(path: Path) -> int:
    return len(names(path)) if is_index(path) else 0


def test_an_unreadable_image_is_reported_and_tried_again(colour_bundle: Path, colour_images: Path, index: Path) -> None:
    (colour_images / "broken.png").write_bytes(b"not an image")
    encoder = load(colour_bundle)
    update = update_index(encoder, colour_images, index)
    assert update.embedded == 4
    assert "broken.png" in update.unreadable[0]
    Image.new("RGB", (9, 9)).save(colour_images / "broken.png")
    assert update_index(encoder, colour_images, index).embedded == 1


def test_a_large_file_that_is_no_image_is_not_read_into_memory(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (colour_images / "scan.tif").write_bytes(b"II*\0" + bytes(10_000))
    Image.effect_noise((99, 99), 80).save(colour_images / "large.png")
    read, plain = list[str](), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or plain(path))
    monkeypatch.setattr(index_folder, "_LARGE_BYTES", 5_000)
    update = update_index(load(colour_bundle), colour_images, index)
    assert update.embedded == 5
    assert "scan.tif: it is a TIFF of a kind" in update.unreadable[0]
    assert "large.png" in read
    assert "scan.tif" not in read


def test_a_link_to_nothing_is_reported_and_a_linked_folder_is_indexed(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path
) -> None:
    (tmp_path / "phone").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "phone" / "1.png")
    (colour_images / "phone").symlink_to(tmp_path / "phone")
    (colour_images / "dead.png").symlink_to(tmp_path / "gone.png")
    update = update_index(load(colour_bundle), colour_images, index)
    assert update.embedded == 5
    assert "phone/1.png" in names(index)
    (message,) = update.unreadable
    assert "dead.png: it is a link to something that does not exist" in message


def test_a_strip_in_a_folder_is_embedded_and_does_not_end_the_others(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    Image.new("RGB", (2_000_000, 1)).save(colour_images / "strip.png")
    assert update_index(load(colour_bundle), colour_images, index).embedded == 5


def test_an_image_that_is_in_no_known_format_is_named(
    command_line: Run, colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    (colour_images / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    code, _, error = command_line("index", colour_bundle, colour_images, "-o", index)
    assert code == 2
    assert f"error: Cannot read the image {colour_images / 'postscript.png'}: it is in none of the formats" in error
    assert len(names(index)) == 4


def test_images_that_this_processor_embeds_wrongly_are_not_kept(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(colour_bundle)
    image = msgspec.structs.replace(manifest.image, instruction_sets=("x86-64-vnni", "aarch64"))
    write_manifest(colour_bundle, msgspec.structs.replace(manifest, image=image))
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: True)
    with pytest.raises(
        UsageError, match=r"image\.onnx of colours gives wrong answers here: its INT8 holds for x86-64-vnni and"
    ):
        update_index(load(colour_bundle), colour_images, index)
    assert not index.exists()


def test_another_model_embeds_everything_again(colour_bundle: Path, colour_images: Path, index: Path) -> None:
    update_index(load(colour_bundle), colour_images, index)
    with (colour_bundle / "image.onnx").open("ab") as file:
        file.write(b"\x3a\x00")  # an empty graph, which protobuf merges: the same model in a different file
    write_manifest(colour_bundle, read_manifest(colour_bundle))
    watch = Watch()
    assert update_index(load(colour_bundle), colour_images, index, reporter=watch).embedded == 4
    said = f"another model made {index}: its 4 images are embedded again, and it stays until then"
    assert watch.said == [said]


def test_another_models_index_stays_whole_until_all_images_are_embedded_again(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(100):
        Image.new("RGB", (9, 9), (i, 50, 50)).save(colour_images / f"{i:03}.png")
    old = load(colour_bundle)
    update_index(old, colour_images, index)
    shutil.copytree(colour_bundle, tmp_path / "other")
    with (tmp_path / "other" / "image.onnx").open("ab") as file:
        file.write(b"\x3a\x00")
    write_manifest(tmp_path / "other", read_manifest(tmp_path / "other"))
    encoder = load(tmp_path / "other")
    monkeypatch.setattr(indexing, "SAVE_EVERY_S", -1)

    def interrupt(done: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_index(encoder, colour_images, index, reporter=Watch("embedding", interrupt))
    hits = search_index(index, "red", top=200)
    assert (len(hits), hits.missing) == (104, 0)
    update = update_index(encoder, colour_images, index)
    assert (update.kept, update.embedded) == (64, 40)
    hits = search_index(index, "red", top=200)
    assert (len(hits), hits.missing, read_index(index)[0].model) == (104, 0, model_key(encoder.manifest))
    assert {path.suffix for path in index.iterdir()} == {".json", ".npy"}


def test_what_was_begun_with_another_model_and_given_up_is_removed(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    update_index(load(colour_bundle), colour_images, index)
    shutil.copytree(index, index / "next")
    update_index(load(colour_bundle), colour_images, index)
    assert not (index / "next").exists()


def test_search_says_that_an_index_is_unfinished(
    command_line: Run, colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    for i in range(100):
        Image.new("RGB", (9, 9), (i, 50, 50)).save(colour_images / f"{i:03}.png")

    def interrupt(done: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_index(load(colour_bundle), colour_images, index, reporter=Watch("embedding", interrupt))
    code, output, error = command_line("search", index, "red", "--top", "1")
    assert (code, len(output.splitlines())) == (0, 1)
    assert "has 64 of 104 images: indexing was interrupted" in " ".join(error.split())
    assert command_line("index", colour_bundle, colour_images, "-o", index)[0] == 0
    assert command_line("search", index, "red", "--top", "1")[2] == ""


@pytest.mark.parametrize("disk", ["", "disk"])
def test_search_warns_of_images_whose_disk_went_away_while_they_were_embedded(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    for name in ("mounted", "mount point"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
    for i in range(2):
        Image.new("RGB", (9, 9), (i, 50, 50)).save(tmp_path / "mounted" / f"{i}.png")
    (colour_images / "broken.png").write_bytes(b"no image")
    (colour_images / "disk").symlink_to(tmp_path / "mounted")
    embed = indexing.embed_images

    def unmount_and_embed(*args: Any) -> object:
        time.sleep(0.02)  # file systems keep times to some milliseconds
        mounted = colour_images / disk
        mounted.rename(tmp_path / "away")
        if disk:
            mounted.symlink_to(tmp_path / "mount point")
        else:
            mounted.mkdir()
        return embed(*args)

    encoder = load(colour_bundle)
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "embed_images", unmount_and_embed)
        update = update_index(encoder, colour_images, index)
    assert (update.embedded, len(update.unreadable)) == ((4, 3) if disk else (0, 7))
    assert read_index(index)[0].missing == (2 if disk else 7)  # without the broken one, if it can be seen
    mounted = colour_images / disk
    mounted.unlink() if disk else mounted.rmdir()
    (tmp_path / "away").rename(mounted)
    assert update_index(encoder, colour_images, index).kept == (4 if disk else 0)
    assert (len(names(index)), read_index(index)[0].missing) == (6, 0)


def test_images_that_are_deleted_while_others_are_embedded_are_not_missing(
    colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = indexing.embed_images

    def delete_and_embed(*args: Any) -> object:
        time.sleep(0.02)
        (colour_images / "more" / "yellow.webp").unlink()
        return embed(*args)

    monkeypatch.setattr(indexing, "embed_images", delete_and_embed)
    assert len(update_index(load(colour_bundle), colour_images, index).unreadable) == 1
    assert read_index(index)[0].missing == 0


def test_a_bundle_in_bfloat16_is_another_model_than_the_float32_one_with_the_same_file(colour_bundle: Path) -> None:
    manifest = read_manifest(colour_bundle)
    image = msgspec.structs.replace(manifest.image, precision="bf16")
    assert model_key(manifest) != model_key(msgspec.structs.replace(manifest, image=image))
    text = msgspec.structs.replace(manifest.text, precision="bf16")
    assert model_key(manifest) == model_key(msgspec.structs.replace(manifest, text=text))


def test_an_index_is_searched_and_updated_on_another_device_with_a_copy_of_its_bundle(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrtEncoder, "placement", lambda self, tower: Placement("onnxruntime", "cuda"))
    update_index(load(colour_bundle), colour_images, index)
    monkeypatch.undo()
    there = tmp_path / "device"
    for path in (colour_bundle, colour_images, index):
        shutil.move(path, there / path.name)
    moved = there / index.name
    with pytest.raises(InputError) as raised:
        search_index(moved, "red")
    assert raised.value.option == "bundle"
    (hit,) = search_index(moved, "red", top=1, bundle=there / colour_bundle.name, folder=there / colour_images.name)
    assert hit.path == there / colour_images.name / "red.png"
    assert hit.path.is_file()
    shutil.copytree(there / colour_images.name, colour_images)  # the same path here, as on a network drive
    update = update_index(load(there / colour_bundle.name), colour_images, moved)
    assert (update.kept, update.embedded) == (4, 0)


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_folder_that_was_moved_is_not_embedded_again(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path, keep_times: bool
) -> None:
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    moved = tmp_path / "disk" / "photos"
    shutil.copytree(colour_images, moved, copy_function=shutil.copy2 if keep_times else shutil.copy)
    with pytest.raises(UsageError, match="index of another folder"):  # the first one is still there
        update_index(encoder, moved, index)
    shutil.rmtree(colour_images)
    if keep_times:
        colour_images.mkdir()  # a mount point stays
    update = update_index(encoder, moved, index)
    assert (update.kept, update.embedded, update.removed) == (4, 0, 0)
    (hit,) = search_index(index, "red", top=1)
    assert hit.path == moved / "red.png"
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(moved / "red.png", other)
    shutil.rmtree(moved)
    with pytest.raises(UsageError, match="index of another folder"):  # one image of the same name is no evidence
        update_index(encoder, other, index)


def test_a_folder_that_has_none_of_the_images_is_refused(
    colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path
) -> None:
    update_index(load(colour_bundle), colour_images, index)
    for folder, message in (
        (tmp_path / "photo", r"photo does not exist\. Did you mean '.*photos'"),
        (colour_images / "red.png", r"red\.png is not a folder"),
        (tmp_path, r"has none of the 4 images of the index .*, such as blue\.jpg"),
    ):
        with pytest.raises(InputError, match=message):
            search_index(index, "red", folder=folder)
    (colour_images / "blue.jpg").unlink()  # one that is gone is no reason
    assert len(search_index(index, "red", folder=colour_images)) == 4


def test_other_preprocessing_embeds_everything_again(colour_bundle: Path, colour_images: Path, index: Path) -> None:
    update_index(load(colour_bundle), colour_images, index)
    manifest = read_manifest(colour_bundle)
    preprocessing = msgspec.structs.replace(manifest.preprocessing, mean=(0.5, 0.5, 0.5))
    write_manifest(colour_bundle, msgspec.structs.replace(manifest, preprocessing=preprocessing))
    assert update_index(load(colour_bundle), colour_images, index).embedded == 4


@pytest.mark.parametrize("count", [1, 3, 50, 90])
def test_top_indices_match_a_full_sort(count: int) -> None:
    values = np.random.default_rng(0).integers(0, 9, 50).astype(np.float32)  # many ties
    np.testing.assert_array_equal(top_indices(values, count), np.argsort(-values, kind="stable")[:count])


def test_what_is_not_an_index_is_refused(colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path) -> None:
    encoder = load(colour_bundle)
    with pytest.raises(UsageError, match="exists and is not an index"):
        update_index(encoder, colour_images, colour_bundle)
    update_index(encoder, colour_images, index)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="index of another folder"):
        update_index(encoder, tmp_path / "other", index)
    with pytest.raises(InputError, match="has no images"):
        update_index(encoder, tmp_path / "other", tmp_path / "other.index")
    with pytest.raises(InputError, match="is not an index"):
        read_index(tmp_path)
    next(index.glob("*.npy")).write_bytes(b"")
    with pytest.raises(ConfigError, match="is damaged") as raised:
        read_index(index)
    assert raised.value.hint == "delete it and index the folder again"
    (index / "index.json").write_bytes(b'{"version"')
    with pytest.raises(ConfigError, match=r"is damaged: .* is not valid JSON") as raised:
        read_index(index)
    assert raised.value.hint == "delete it and index the folder again"


@pytest.mark.parametrize("name", ["a", '],["', '"],["', '\\"],["', "],[", "\\"])
def test_an_index_is_read_in_parts_whatever_is_in_its_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    entries = [
        Entry(path=path, size_bytes=i, modified_ns=10**18 + i, changed_ns=10**18 + i, sha256="f" * 64)
        for i in range(300)
        for path in (f"é{i}.jpg", f"{name}{i}.jpg", f"{i}{name}", name)
    ]
    graph = GraphFiles(file="graph", rows="rows", keys=1200)
    index = Index(folder="/[[", bundle="b", model="m", embeddings="", entries=entries, graph=graph)
    written = write_index(tmp_path, index, np.zeros((1200, 1), dtype=np.float32))
    whole, decoded, decoder = read_index(tmp_path)[0], list[bytes](), msgspec.json.Decoder

    class Recorder:
        def __init__(self, kind: Any) -> None:
            self._decoder = decoder(kind)

        def decode(self, text: bytes) -> Any:
            decoded.append(text)
            return self._decoder.decode(text)

    monkeypatch.setattr("clip_rd_edge.runtime.index._PART_BYTES", 1000)
    monkeypatch.setattr("msgspec.json.Decoder", Recorder)
    assert read_index(tmp_path)[0] == whole == written
    if name == "a":
        assert max(map(len, decoded)) < 1500


@pytest.mark.parametrize(
    "entries",
    ["{}", '""', '[["a",1,2,3,"b"],["a",1,2,3,4]]', '[["a",1,2,3,"b"]],["a",1,2,3,"b"]', "[" * 10_000 + "]" * 10_000],
)
def test_an_index_of_another_form_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: str) -> None:
    monkeypatch.setattr("clip_rd_edge.runtime.index._PART_BYTES", 2)
    content = f'{{"folder":"f","bundle":"b","model":"m","embeddings":"e.npy","entries":{entries}}}'.encode()
    (tmp_path / "index.json").write_bytes(b'{"version":1,"crc32":%d,"index":%b}' % (zlib.crc32(content), content))
    with pytest.raises(ConfigError, match="is damaged"):
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
        for place in (*range(0, 128, 3), *rng.integers(0, len(content), 150).tolist()):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            try:
                assert answers(index, memory_mapped=memory_mapped) == expected  # such as in what fills up a header
            except ClipRdEdgeError:
                refused += 1
        file.write_bytes(content)
    assert refused > 300


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
    with pytest.raises(ConfigError, match="expected 15"):
        nearest(*read_index(index), rows[0, :15], top=1)


def damage(index: Path) -> None:
    (file,) = index.glob("embeddings-*.npy")
    content = bytearray(file.read_bytes())
    content[-9] ^= 64
    file.write_bytes(content)


def test_embeddings_that_were_damaged_on_the_disk_are_refused_and_computed_again(
    command_line: Run, colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_rd_edge.runtime.index._BLOCK_ROWS", 3)
    encoder = load(colour_bundle)
    update_index(encoder, colour_images, index)
    expected = read_index(index, memory_mapped=False)
    damage(index)
    code, output, error = command_line("search", index, "red")
    assert (code, output) == (2, "")
    assert "index the folder again" in error
    watch = Watch()
    update = update_index(encoder, colour_images, index, reporter=watch)
    assert (update.embedded, update.kept, update.removed) == (1, 3, 0)
    assert "1 embeddings" in watch.said[0]
    known, rows = read_index(index, memory_mapped=False)
    assert known.entries == expected[0].entries
    np.testing.assert_array_equal(rows, expected[1])
    damage(index)
    (colour_images / known.entries[-1].path).unlink()  # nothing is new
    assert update_index(encoder, colour_images, index).kept == 3
    assert len(read_index(index, memory_mapped=False)[0].entries) == 3


def test_an_index_of_a_newer_version_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"version": 2, "shards": []}')
    with pytest.raises(ConfigError, match="has format version 2; this clip-rd-edge reads up to 1") as caught:
        read_index(tmp_path)
    assert caught.value.hint == upgrade_hint()


def test_search_matches_the_recall_of_the_evaluation(colour_bundle: Path, pairs_csv: Path, index: Path) -> None:
    task, encoder = load_task(str(pairs_csv)), load(colour_bundle)
    assert isinstance(task, RetrievalTask)
    update_index(encoder, pairs_csv.parent / "pictures", index)
    known, rows = read_index(index)
    hits = [
        task.images[image_number] in [hit.path for hit in nearest(known, rows, encoder.encode_texts([caption]), top=5)]
        for caption, image_number in zip(task.captions, task.caption_images, strict=True)
    ]
    assert np.mean(hits) == retrieval(encoder, task).score.text_to_image.at5
    assert 0.5 < np.mean(hits) < 1  # six images per colour: not all are found


def test_an_interrupted_index_says_that_it_goes_on(
    command_line: Run, colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(encoder: OrtEncoder, images: list[Source]) -> Iterator[Any]:
        yield from embed_images(encoder, images[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "embed_images", interrupted)
        code, _, error = command_line("index", colour_bundle, colour_images, "-o", index)
    assert code == 75
    assert error.endswith(
        "error: Interrupted; what is embedded is saved.\nhint: run the same command again, which embeds the others\n"
    )
    assert "2 embedded, 2 kept" in command_line("index", colour_bundle, colour_images, "-o", index)[2]


def test_the_index_and_search_commands(
    command_line: Run, colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    code, output, error = command_line("index", colour_bundle, colour_images, "-o", index)
    assert (code, output) == (0, f"{index}\n")
    assert "4 embedded, 0 kept, 0 removed" in error
    code, output, _ = command_line("search", index, "blue", "--top", "1")
    assert code == 0
    similarity, path = output.rstrip().split("\t")
    assert path == str(colour_images / "blue.jpg")
    assert float(similarity) > 0.9
    code, output, _ = command_line("search", index, colour_images / "red.png", "--top", "2", "--json")
    first = json.loads(output.splitlines()[0])
    assert first == {"image": str(colour_images / "red.png"), "similarity": 1.0}
    (colour_images / "broken.png").write_bytes(b"not an image")
    code, output, error = command_line("index", colour_bundle, colour_images, "-o", index)
    assert (code, output) == (2, f"{index}\n")
    assert "1 image or folder could not be read" in error
    code, _, error = command_line("search", index, " ")
    assert (code, "The query is empty" in error) == (2, True)
    with (colour_bundle / "image.onnx").open("ab") as file:
        file.write(b"\x3a\x00")
    write_manifest(colour_bundle, read_manifest(colour_bundle))
    code, _, error = command_line("search", index, "red")
    assert (code, "is not the one that created the index" in error) == (2, True)


def test_search_says_that_images_are_gone(
    command_line: Run, colour_bundle: Path, colour_images: Path, index: Path, tmp_path: Path
) -> None:
    update_index(load(colour_bundle), colour_images, index)
    (colour_images / "blue.jpg").unlink()
    code, output, error = command_line("search", index, "blue", "--top", "2")
    assert (code, len(output.splitlines())) == (0, 2)
    assert "warning: Of these 2 images, 1 are not there any more." in error
    assert "--folder" in error
    colour_images.rename(tmp_path / "moved")
    code, output, error = command_line("search", index, "red", "--top", "1", "--folder", tmp_path / "moved")
    assert (code, error) == (0, "")


def test_images_that_this_account_may_not_look_at_are_not_called_gone(
    command_line: Run, colour_bundle: Path, colour_images: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_index(load(colour_bundle), colour_images, index)
    fail_to_look_at(monkeypatch, lambda path: path.parent == colour_images, PermissionError(13, "Permission denied"))
    code, output, error = command_line("search", index, "red", "--top", "2")
    assert (code, len(output.splitlines()), error) == (0, 2, "")


def test_two_indexers_and_twenty_searchers_at_once_meet_no_error_and_lose_nothing(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    for i in range(320):
        Image.new("RGB", (9, 9), (i % 256, i // 4, 50)).save(colour_images / f"{i:03}.png")
    program = (
        "import sys; from pathlib import Path; from clip_rd_edge import load\n"
        "from clip_rd_edge.runtime.index import update\n"
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
    assert sorted(map(int, outputs)) == [0, 324]  # the one that waited embeds nothing again
    assert len(names(index)) == 324
    assert {path.suffix for path in index.iterdir()} == {".json", ".npy"}


def test_embeddings_that_are_missing_for_good_are_damage(colour_bundle: Path, colour_images: Path, index: Path) -> None:
    update_index(load(colour_bundle), colour_images, index)
    next(index.glob("*.npy")).unlink()
    with pytest.raises(ConfigError, match="is damaged"):
        read_index(index)


def test_a_folder_that_a_killed_first_run_leaves_is_not_refused(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    index.mkdir()
    leftovers = [".lock", "embeddings-123.npy", ".embeddings-123.npy.abc.tmp", ".index.json.abc.tmp"]
    for name in leftovers:
        (index / name).write_bytes(b"x")
    assert update_index(load(colour_bundle), colour_images, index).embedded == 4
    assert not {path.name for path in index.iterdir()} & set(leftovers)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes file names of any bytes")
def test_a_name_that_is_not_utf8_is_reported_and_the_others_are_indexed(
    command_line: Run, colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    (colour_images / "red.png").rename(os.fsdecode(os.fsencode(colour_images) + b"/caf\xe9.png"))
    for embedded_count in (3, 0):  # the folder that the first run leaves is taken by the second
        code, _, error = command_line("index", colour_bundle, colour_images, "-o", index)
        assert code == 2
        assert rf"The name of {colour_images}/caf\xe9.png is not UTF-8" in error
        assert f"{embedded_count} embedded" in error
    assert names(index) == ["blue.jpg", "green.png", "more/yellow.webp"]
    folder = Path(os.fsdecode(os.fsencode(colour_images) + b"-\xe9"))
    colour_images.rename(folder)
    with pytest.raises(InputError, match=r"photos-\\xe9 is not UTF-8"):
        update_index(load(colour_bundle), folder, index.with_name("other"))
    assert not index.with_name("other").exists()


def test_a_mistyped_path_is_not_searched_for_as_a_text(
    colour_bundle: Path, colour_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_index(load(colour_bundle), colour_images, tmp_path / "index")
    monkeypatch.chdir(colour_images)
    for query, message in {
        "red.pgn": "no such file. Did you mean 'red.png'",
        "redd.png": "no such file. Did you mean 'red.png'",
        "more/yelow.webp": r"no such file. Did you mean 'more/yellow\.webp'",
        "./red": "no such file",
        "more/": "is a folder",
    }.items():
        with pytest.raises(InputError, match=message):
            search_index(tmp_path / "index", query)
    for text in ("a red/green flag", "red", "node.js", "r" * 5000):
        assert len(search_index(tmp_path / "index", text)) == 4


def test_the_bundles_new_path_is_kept_though_no_image_is_new(
    colour_bundle: Path, colour_images: Path, index: Path, embedded: list[int]
) -> None:
    update_index(load(colour_bundle), colour_images, index)
    embedded.clear()
    moved = colour_bundle.rename(colour_bundle.with_name("moved"))
    assert update_index(load(moved), colour_images, index).kept == 4
    assert embedded == []
    assert search_index(index, "red", top=1)[0].path.name == "red.png"


@pytest.mark.usefixtures("_no_time_of_change")
def test_an_image_that_changes_within_a_second_that_the_file_system_does_not_divide_is_noticed(
    colour_bundle: Path, colour_images: Path, index: Path
) -> None:
    """FAT, zip archives and some network shares keep whole seconds, or two of them."""
    second = int(time.time())
    images = [Image.new("RGB", (40, 30), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    path, sizes = colour_images / "frame.bmp", set()
    for image, name in zip(images, ("red", "green"), strict=True):
        image.save(path)
        os.utime(path, (second, second))
        sizes.add(path.stat().st_size)
        update_index(load(colour_bundle), colour_images, index)
        similarities = {hit.path.name: hit.similarity for hit in search_index(index, name)}
        assert similarities["frame.bmp"] > 0.99
    assert len(sizes) == 1
    os.utime(path, (second - 60, second - 60))
    update_index(load(colour_bundle), colour_images, index)
    assert {entry.path: entry.modified_ns for entry in read_index(index)[0].entries}["frame.bmp"] == (
        second - 60
    ) * 10**9
    before = files(index)
    update_index(load(colour_bundle), colour_images, index)
    assert files(index) == before
