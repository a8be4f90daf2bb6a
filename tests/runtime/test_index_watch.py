from __future__ import annotations

import builtins
import errno
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image
from support import PATIENCE_S, Watch, fail_to_look_at, wait_until

from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.runtime import index_update
from clip_rd_edge.runtime import index_update as index_folder
from clip_rd_edge.runtime import index_update as index_watch
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.index import model_key, read_index
from clip_rd_edge.runtime.index_update import BROKEN_S, POLL_S, Update, Watched, update_index, watch_index
from clip_rd_edge.runtime.load import load
from clip_rd_edge.utils.outputs import exclusive_writer


class Folder:
    """A watched folder under a clock of its own: `steps` happen during the pauses, one per pause; then it ends."""

    def __init__(self, bundle: Path, folder: Path, index: Path) -> None:
        self.folder, self.index = folder, index
        self.encoder = load(bundle, threads=1)
        self.now, self.pauses = 1000.0, list[float]()

    def watch(self, *steps: Callable[[], object]) -> list[Update]:
        """Return what each update has done."""
        stop, left = threading.Event(), list(steps)

        def wait(seconds: float) -> None:
            self.pauses.append(seconds)
            self.now += seconds
            if not left:
                stop.set()
            else:
                left.pop(0)()

        clock = lambda: self.now  # noqa: E731
        return list(watch_index(self.encoder, self.folder, self.index, stop=stop, wait=wait, clock=clock))

    def skip(self, seconds: float) -> Callable[[], None]:
        def pass_time() -> None:
            self.now += seconds

        return pass_time

    def names(self) -> list[str]:
        return sorted(entry.path for entry in read_index(self.index)[0].entries)


@pytest.fixture
def watched(colour_bundle: Path, colour_images: Path, tmp_path: Path) -> Folder:
    for path in colour_images.rglob("*.*"):
        os.utime(path, (1, 1))  # nobody is writing to them
    return Folder(colour_bundle, colour_images, tmp_path / "photos.index")


def nothing() -> None:
    pass


def paint(path: Path, colour: tuple[int, int, int] = (0, 0, 250)) -> Callable[[], None]:
    return lambda: Image.new("RGB", (9, 9), colour).save(path)


ALL = ["blue.jpg", "green.png", "more/yellow.webp", "red.png"]


def test_images_that_come_change_and_go_are_followed(watched: Folder) -> None:
    folder = watched.folder
    updates = watched.watch(
        paint(folder / "new.png"),
        nothing,
        paint(folder / "red.png", (0, 200, 0)),
        nothing,
        (folder / "green.png").unlink,
        nothing,
    )
    done = [(update.embedded, update.kept, update.removed) for update in updates]
    assert done == [(4, 0, 0), (1, 4, 0), (1, 4, 0), (0, 4, 1)]
    assert watched.names() == sorted({*ALL, "new.png"} - {"green.png"})
    assert set(watched.pauses) == {POLL_S}


def test_nothing_is_written_while_nothing_changes(watched: Folder) -> None:
    watched.watch()
    before = {path: path.stat().st_mtime_ns for path in watched.index.iterdir()}
    (update,) = watched.watch(nothing, nothing, nothing)
    assert (update.embedded, update.kept) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in watched.index.iterdir()} == before


def test_a_file_that_is_still_being_written_is_not_taken_as_broken(watched: Folder) -> None:
    path = watched.folder / "upload.png"
    Image.effect_noise((64, 64), 80).save(path)
    content = path.read_bytes()
    path.unlink()

    def write(share: float) -> Callable[[], None]:
        return lambda: path.write_bytes(content[: int(share * len(content))]) and None

    # It grows at each look, then pauses for longer than SETTLE_S in the middle, and is complete at last.
    steps = [write(0.1), write(0.2), write(0.4), nothing, nothing, nothing, write(1), nothing]
    updates = watched.watch(*steps)
    assert [message for update in updates for message in update.unreadable] == []
    assert watched.names() == sorted([*ALL, "upload.png"])


def test_a_file_that_stays_broken_is_reported_once(watched: Folder) -> None:
    broken = watched.folder / "broken.png"
    steps = [
        lambda: broken.write_bytes(b"no image") and None,
        nothing,
        nothing,
        watched.skip(BROKEN_S),
        nothing,
        nothing,
    ]
    updates = watched.watch(*steps)
    (message,) = [message for update in updates for message in update.unreadable]
    assert str(broken) in message
    assert watched.names() == ALL
    assert [update.kept + update.embedded for update in updates] == [4, 4, 4]  # the last of them tells the message
    steps = [paint(broken), nothing, nothing]
    assert watched.watch(*steps)[-1].embedded == 1
    assert watched.names() == sorted([*ALL, "broken.png"])


@pytest.mark.parametrize("for_long", [False, True])
def test_a_file_that_another_program_keeps_to_itself_is_taken_when_it_can_be_read(
    watched: Folder, monkeypatch: pytest.MonkeyPatch, *, for_long: bool
) -> None:
    """As on Windows."""
    locked = watched.folder / "locked.png"
    plain = io.open

    def refuse(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file) == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return plain(file, *arguments, **options)

    def lock() -> None:
        paint(locked)()
        for module in (io, builtins):
            monkeypatch.setattr(module, "open", refuse)

    pause = watched.skip(BROKEN_S) if for_long else nothing
    updates = watched.watch(lock, nothing, nothing, pause, nothing, monkeypatch.undo, nothing, nothing)
    messages = [message for update in updates for message in update.unreadable]
    assert messages == ([f"Cannot read the image {locked}: Permission denied."] if for_long else [])
    assert [update.embedded for update in updates if update.embedded] == [4, 1]
    assert len(updates) == 3 + for_long  # not one per look
    assert "locked.png" in watched.names()


def test_a_link_to_nothing_is_reported_once_and_followed_when_there_is_something(
    watched: Folder, tmp_path: Path
) -> None:
    (watched.folder / "link.png").symlink_to(tmp_path / "late.png")
    updates = watched.watch(nothing, nothing, watched.skip(BROKEN_S), nothing, nothing)
    (message,) = [message for update in updates for message in update.unreadable]
    assert "link.png: it is a link to something that does not exist" in message
    assert watched.watch(paint(tmp_path / "late.png"), nothing, nothing)[-1].embedded == 1
    assert "link.png" in watched.names()


def test_a_file_that_cannot_be_looked_at_is_reported_once_and_keeps_its_entry(
    watched: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = lambda: fail_to_look_at(  # noqa: E731
        monkeypatch, lambda path: path.name == "red.png", OSError(errno.EIO, "Input/output error")
    )
    updates = watched.watch(failing, nothing, nothing, watched.skip(BROKEN_S), nothing, nothing)
    (message,) = [message for update in updates for message in update.unreadable]
    assert "red.png: Input/output error" in message
    assert watched.names() == ALL


def test_a_file_that_is_written_when_the_watch_starts_is_waited_for(watched: Folder) -> None:
    late = watched.folder / "late.png"
    late.write_bytes(b"only the beg")  # written just now
    updates = watched.watch(paint(late), nothing)
    assert [(update.embedded, update.unreadable) for update in updates] == [(4, []), (1, [])]


def test_an_image_that_is_overwritten_keeps_its_entry_until_it_is_complete(watched: Folder) -> None:
    red = watched.folder / "red.png"
    counts = list[int]()

    def look() -> None:
        counts.append(len(read_index(watched.index)[0].entries))

    steps = [lambda: red.write_bytes(b"half") and None, paint(red, (250, 250, 0)), look, look]
    paint(watched.folder / "new.png")()
    assert [update.embedded for update in watched.watch(*steps)] == [4, 1, 1]
    assert counts == [5, 5]


@pytest.mark.parametrize("out_of_sight", [False, True])
def test_renamed_images_keep_their_embeddings_and_never_leave_the_index(
    watched: Folder, tmp_path: Path, *, out_of_sight: bool
) -> None:
    """A listing takes time: what is renamed meanwhile may be in it under neither name."""
    old, away, new = watched.folder / "more", tmp_path / "away", watched.folder / "renamed"
    for i in range(20):
        paint(old / f"{i}.png", (i, 0, 99))()
        os.utime(old / f"{i}.png", (1, 1))
    shutil.copy2(old / "0.png", old / "copy.png")
    counts = list[int]()

    def look() -> None:
        counts.append(len(watched.names()))

    steps = [lambda: old.rename(away), lambda: away.rename(new)] if out_of_sight else [lambda: old.rename(new)]
    updates = watched.watch(*steps, look, look, look)
    assert [(update.embedded, update.kept, update.removed) for update in updates] == [(25, 0, 0), (0, 25, 0)]
    assert set(counts) == {25}
    assert len([name for name in watched.names() if name.startswith("renamed/")]) == 22


@pytest.mark.parametrize("after_listing", [False, True])
def test_images_that_are_renamed_as_an_update_begins_keep_their_embeddings(
    watched: Folder, monkeypatch: pytest.MonkeyPatch, *, after_listing: bool
) -> None:
    def rename() -> None:
        (watched.folder / "more").rename(watched.folder / "renamed")

    def list_and_rename(folder: Path) -> object:
        found = stamps(folder)
        monkeypatch.setattr(index_watch, "_stamps", stamps)
        rename()
        return found

    def rename_later() -> None:
        monkeypatch.setattr(index_watch, "_stamps", list_and_rename)

    stamps = index_watch._stamps
    new = paint(watched.folder / "new.png")  # settled when the other image is renamed
    updates = watched.watch(new, rename_later if after_listing else rename, nothing, nothing, nothing)
    assert [(update.embedded, update.removed) for update in updates] == [(4, 0), (1, 0), (0, 0)]
    assert watched.names() == ["blue.jpg", "green.png", "new.png", "red.png", "renamed/yellow.webp"]


def test_removed_images_leave_the_index_though_others_are_always_being_written(watched: Folder) -> None:
    busy, broken = watched.folder / "busy.png", watched.folder / "broken.png"
    broken.write_bytes(b"no image")
    os.utime(broken, (1, 1))

    def remove() -> None:
        broken.unlink()
        (watched.folder / "red.png").unlink()

    write = lambda: busy.write_bytes(os.urandom(9)) and None  # noqa: E731
    updates = watched.watch(remove, *[write] * int(BROKEN_S / POLL_S + 3))
    assert [(update.removed, update.unreadable) for update in updates] == [(0, []), (1, [])]
    assert "red.png" not in watched.names()


@pytest.mark.skipif(sys.platform == "win32", reason="has no time of change")
def test_a_file_of_the_same_size_whose_time_was_put_back_is_embedded_and_one_with_another_mode_is_not(
    watched: Folder,
) -> None:
    frame, other = watched.folder / "frame.bmp", watched.folder / "blue.jpg"
    paint(frame, (250, 0, 0))()
    os.utime(frame, (1, 1))

    def replace() -> None:
        paint(frame, (0, 250, 0))()
        os.utime(frame, (1, 1))
        other.chmod(0o600)

    updates = watched.watch(replace, nothing, nothing, nothing)
    assert [(update.embedded, update.kept) for update in updates] == [(5, 0), (1, 4)]


def test_an_unmounted_folder_empties_no_index(watched: Folder) -> None:
    away = watched.folder.with_name("away")
    updates = watched.watch(
        lambda: watched.folder.rename(away) and None, nothing, watched.folder.mkdir, nothing, watched.folder.rmdir,
        lambda: away.rename(watched.folder) and None, nothing,
    )  # fmt: skip
    assert watched.names() == ALL
    assert sum(update.removed for update in updates) == 0
    with pytest.raises(InputError, match="does not exist"):
        next(iter(watch_index(watched.encoder, away, watched.index)))


def test_an_index_that_is_removed_or_put_back_to_an_older_copy_is_brought_up_to_date(
    watched: Folder, tmp_path: Path
) -> None:
    old = tmp_path / "old"

    def put_back() -> None:
        shutil.rmtree(watched.index)
        shutil.copytree(old, watched.index)

    updates = watched.watch(
        lambda: shutil.copytree(watched.index, old) and None, paint(watched.folder / "new.png"), nothing, nothing,
        lambda: shutil.rmtree(watched.index), nothing, put_back, nothing, nothing,
    )  # fmt: skip
    assert [update.embedded for update in updates] == [4, 1, 5, 1]
    assert "new.png" in watched.names()


@pytest.mark.parametrize("first", ["index.json", "embeddings-*.npy"])
def test_an_older_copy_that_is_still_being_copied_over_the_index_is_waited_for(
    first: str, watched: Folder, tmp_path: Path
) -> None:
    old = tmp_path / "old"

    def begin() -> None:
        shutil.rmtree(watched.index)
        watched.index.mkdir()
        (file,) = old.glob(first)
        (watched.index / file.name).write_bytes(file.read_bytes()[:100])

    def complete() -> None:
        shutil.copytree(old, watched.index, dirs_exist_ok=True)

    updates = watched.watch(
        lambda: shutil.copytree(watched.index, old) and None, paint(watched.folder / "new.png"), nothing, nothing,
        begin, complete, nothing, nothing,
    )  # fmt: skip
    assert [update.embedded for update in updates] == [4, 1, 1]
    assert "new.png" in watched.names()


def test_a_damaged_index_that_is_put_there_ends_the_watch_after_a_while(watched: Folder) -> None:
    damage = lambda: (watched.index / "index.json").write_text("{")  # noqa: E731
    updates = watched.watch(damage, nothing, watched.skip(BROKEN_S / 2))
    assert [update.embedded for update in updates] == [4]
    (watched.index / "index.json").unlink()
    with pytest.raises(ConfigError, match=r"index\.json"):
        watched.watch(damage, nothing, watched.skip(BROKEN_S), nothing)


@pytest.fixture
def other(colour_bundle: Path, tmp_path: Path) -> BundleEncoder:
    """Another model."""
    shutil.copytree(colour_bundle, tmp_path / "other")
    with (tmp_path / "other" / "image.onnx").open("ab") as file:
        file.write(b"\x3a\x00")
    write_manifest(tmp_path / "other", read_manifest(tmp_path / "other"))
    return load(tmp_path / "other", threads=1)


def test_another_models_index_that_is_put_there_is_kept_and_ends_the_watch(
    watched: Folder, other: BundleEncoder
) -> None:
    with pytest.raises(UsageError, match="Another model's index has been put at"):
        watched.watch(lambda: update_index(other, watched.folder, watched.index) and None, nothing, nothing)
    assert read_index(watched.index)[0].model == model_key(other.manifest)


def test_another_models_index_that_an_update_waited_for_is_kept_and_ends_the_watch(
    watched: Folder, other: BundleEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def wait_for_the_other(*args: Any, **options: Any) -> Iterator[bool]:
        monkeypatch.undo()
        update_index(other, watched.folder, watched.index)
        with exclusive_writer(*args, **options) as may_write:
            yield may_write

    def begin() -> None:
        paint(watched.folder / "new.png")()
        monkeypatch.setattr(index_update, "exclusive_writer", wait_for_the_other)

    with pytest.raises(UsageError, match="Another model's index has been put at"):
        watched.watch(begin, nothing, nothing)
    assert read_index(watched.index)[0].model == model_key(other.manifest)


def test_another_models_index_is_replaced_when_the_watch_starts(watched: Folder, other: BundleEncoder) -> None:
    update_index(other, watched.folder, watched.index)
    (update,) = watched.watch()
    assert update.embedded == 4
    assert read_index(watched.index)[0].model == model_key(watched.encoder.manifest)


def test_an_empty_folder_is_waited_for(colour_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "camera").mkdir()
    watched = Folder(colour_bundle, tmp_path / "camera", tmp_path / "index")
    updates = watched.watch(paint(tmp_path / "camera" / "1.png"), nothing, nothing)
    assert [update.embedded for update in updates] == [1]


def test_a_watch_that_waits_for_images_embeds_them_with_the_bundle_that_it_started_with(
    colour_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "camera").mkdir()
    watched = Folder(colour_bundle, tmp_path / "camera", tmp_path / "index")
    remove = lambda: shutil.rmtree(colour_bundle)  # noqa: E731 — as an update does before it writes the new one
    updates = watched.watch(remove, paint(tmp_path / "camera" / "1.png"), nothing, nothing)
    assert [update.embedded for update in updates] == [1]


def test_a_link_that_is_switched_to_another_bundle_changes_no_index(
    colour_bundle: Path, watched: Folder, tmp_path: Path
) -> None:
    current = tmp_path / "current"
    current.symlink_to(colour_bundle)
    watched.encoder = load(current, threads=1)

    def switch() -> None:
        shutil.copytree(colour_bundle, tmp_path / "new")
        current.unlink()
        current.symlink_to(tmp_path / "new")

    watched.watch(switch, paint(watched.folder / "new.png"), nothing, nothing)
    assert "new.png" in watched.names()
    assert read_index(watched.index)[0].bundle == str(colour_bundle)


@pytest.mark.parametrize(
    ("update_s", "embedding_s", "pause_s"), [(1, 0, 20), (3, 0, 60), (7200, 0, 60), (7200, 7200, 2), (8, 7, 20)]
)
def test_the_pause_grows_with_the_time_that_an_update_takes_beside_embedding_up_to_a_minute(
    watched: Folder, monkeypatch: pytest.MonkeyPatch, update_s: float, embedding_s: float, pause_s: float
) -> None:
    def slow(*arguments: object, **options: object) -> Update:
        watched.now += update_s
        update = update_index(*arguments, **options)  # type: ignore[arg-type]
        update.embedding_s = embedding_s
        return update

    monkeypatch.setattr(index_watch, "update_index", slow)
    watched.watch()
    assert watched.pauses == [pause_s]


@pytest.fixture
def slow_listing(watched: Folder, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    stamps = index_watch._stamps

    def take(seconds: float) -> None:
        def list_slowly(folder: Path) -> object:
            watched.now += seconds
            return stamps(folder)

        monkeypatch.setattr(index_watch, "_stamps", list_slowly)

    return take


@pytest.mark.parametrize(("listing_s", "pause_s"), [(0.05, 2), (1, 20), (4, 60), (400, 60)])
def test_the_pause_grows_with_the_time_that_a_listing_takes_up_to_a_minute(
    watched: Folder, slow_listing: Callable[[float], None], listing_s: float, pause_s: float
) -> None:
    slow_listing(listing_s)
    watched.watch(nothing)
    assert watched.pauses[-1] == pytest.approx(pause_s)


def test_a_new_image_waits_for_no_second_listing_of_a_large_folder(
    watched: Folder, slow_listing: Callable[[float], None]
) -> None:
    slow_listing(4)
    counts, growing = list[int](), watched.folder / "growing.png"

    def bring() -> None:
        paint(watched.folder / "new.png")()
        paint(watched.folder / "fleeting.png")()
        growing.write_bytes(b"the beg")

    def go_on() -> None:
        paint(growing, (2, 2, 2))()
        (watched.folder / "fleeting.png").unlink()

    updates = watched.watch(bring, go_on, paint(growing, (9, 9, 9)), lambda: counts.append(len(watched.names())))
    assert [update.embedded for update in updates] == [4, 1, 1]
    assert [message for update in updates for message in update.unreadable] == []
    assert counts == [5]
    assert watched.pauses == [60, 2, 60, 2, 60]
    assert watched.names() == sorted([*ALL, "growing.png", "new.png"])


def test_the_time_that_embedding_takes_does_not_include_saves(watched: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def embed(*arguments: Any) -> Iterator[object]:
        for batch in embed_images(*arguments):
            now[0] += 30
            yield batch

    def save(*arguments: Any) -> object:
        now[0] += 100
        return write_index(*arguments)

    embed_images, write_index = index_update.embed_images, index_update.write_index
    monkeypatch.setattr(index_update, "embed_images", embed)
    monkeypatch.setattr(index_update, "write_index", save)
    monkeypatch.setattr(index_update.time, "monotonic", lambda: now[0])
    for i in range(40):
        paint(watched.folder / f"{i:02}.png", (i, 0, 0))()
    assert update_index(watched.encoder, watched.folder, watched.index).embedding_s == 60  # two batches
    assert now == [60 + 200]


def test_a_stop_saves_what_is_embedded(watched: Folder) -> None:
    for i in range(100):
        Image.new("RGB", (9, 9), (i, 50, 50)).save(watched.folder / f"{i:03}.png")
        os.utime(watched.folder / f"{i:03}.png", (1, 1))
    stop = threading.Event()
    stop.set()
    names = {path.relative_to(watched.folder).as_posix() for path in watched.folder.rglob("*.*")}
    update = update_index(watched.encoder, watched.folder, watched.index, watched=Watched(names), stop=stop)
    assert update.embedded == len(watched.names()) == 32


def test_a_stop_ends_the_wait_for_another_writer(watched: Folder) -> None:
    stop, reporter, updates = threading.Event(), Watch(), list[Update]()
    watch = watch_index(watched.encoder, watched.folder, watched.index, stop=stop, reporter=reporter)
    thread = threading.Thread(target=lambda: updates.extend(watch))
    with exclusive_writer(watched.index):
        thread.start()
        wait_until(lambda: reporter.said)
        stop.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert updates == []


def test_a_signal_is_handled_soon_in_a_long_pause(watched: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, that is when a wait is over."""

    class Stop(threading.Event):
        waits: ClassVar = list[float]()

        def wait(self, timeout: float | None = None) -> bool:
            self.waits.append(timeout or math.inf)
            if len(self.waits) == 3:
                self.set()
            return self.is_set()

    monkeypatch.setattr(index_watch, "POLL_S", 60.0)
    stop = Stop()
    assert len(list(watch_index(watched.encoder, watched.folder, watched.index, stop=stop))) == 1
    assert len(stop.waits) == 3
    assert max(stop.waits) <= 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.usefixtures("hang_up")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_ends_the_command_with_everything_saved(
    name: str, colour_bundle: Path, colour_images: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    for path in colour_images.rglob("*.*"):
        os.utime(path, (1, 1))
    command = [sys.executable, "-m", "clip_rd_edge", "index", colour_bundle, colour_images, "-o", index, "--watch"]
    process = subprocess.Popen([*map(str, command)], stdout=-1, stderr=-1, text=True)
    wait_until((index / "index.json").is_file)
    process.send_signal(signal.Signals[name])
    output, error = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (0, f"{index}\n"), error
    assert "4 embedded, 0 removed: 4 images in the index" in error
    assert len(read_index(index)[0].entries) == 4


def test_an_image_that_was_unmounted_before_it_was_embedded_is_embedded_later(
    watched: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = index_folder.list_images
    lists = iter([listed, lambda *_, **__: [], listed])  # gone between the watch's own list and the second update's
    monkeypatch.setattr(index_folder, "list_images", lambda *args, **options: next(lists)(*args, **options))
    updates = watched.watch(paint(watched.folder / "new.png"), nothing, nothing, nothing)
    assert [update.embedded for update in updates] == [4, 1]
    assert watched.names() == sorted([*ALL, "new.png"])


def test_a_folder_that_goes_away_as_an_update_begins_does_not_end_the_watch(
    watched: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = watched.folder.with_name("away")
    stamps = index_watch._stamps
    counts = iter(range(99))

    def list_and_unmount(folder: Path) -> object:
        found = stamps(folder)
        if next(counts) == 2:
            folder.rename(away)
        return found

    monkeypatch.setattr(index_watch, "_stamps", list_and_unmount)
    back = lambda: away.rename(watched.folder)  # noqa: E731
    updates = watched.watch(paint(watched.folder / "new.png"), nothing, back, nothing)
    assert [update.embedded for update in updates] == [4, 1]
    assert watched.names() == sorted([*ALL, "new.png"])


def test_images_that_are_unmounted_while_they_are_embedded_are_embedded_later(
    watched: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = watched.folder.with_name("away")
    embed, calls = index_update.embed_images, iter(range(99))

    def unmount_and_embed(*args: Any) -> object:
        if next(calls) == 1:
            watched.folder.rename(away)
        return embed(*args)

    monkeypatch.setattr(index_update, "embed_images", unmount_and_embed)
    back = lambda: away.rename(watched.folder)  # noqa: E731
    updates = watched.watch(paint(watched.folder / "new.png"), nothing, nothing, back, nothing, nothing)
    assert [update.embedded for update in updates] == [4, 0, 1]
    assert watched.names() == sorted([*ALL, "new.png"])


def test_an_image_whose_disk_is_away_for_a_moment_as_an_update_begins_is_embedded_later(
    watched: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = index_folder.list_images
    without = lambda *args, **options: [path for path in listed(*args, **options) if path.name != "new.png"]  # noqa: E731
    lists = iter([listed, without, listed])
    monkeypatch.setattr(index_folder, "list_images", lambda *args, **options: next(lists)(*args, **options))
    updates = watched.watch(paint(watched.folder / "new.png"), nothing, nothing, nothing)
    assert [update.embedded for update in updates] == [4, 0, 1]
    assert watched.names() == sorted([*ALL, "new.png"])
