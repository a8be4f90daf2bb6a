from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import PATIENCE_S, Watch, wait_until

from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime import index_update, index_watch
from clip_rd_edge.runtime.index import read_index
from clip_rd_edge.runtime.index_update import Update, update_index
from clip_rd_edge.runtime.index_watch import BROKEN_S, POLL_S, watch_index
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


def messages(updates: list[Update]) -> list[str]:
    return [message for update in updates for message in update.unreadable]


ALL = ["blue.jpg", "green.png", "more/yellow.webp", "red.png"]


def test_images_that_come_change_and_go_are_followed_and_nothing_else_is_written(watched: Folder) -> None:
    folder = watched.folder
    updates = watched.watch(
        paint(folder / "new.png"), nothing, paint(folder / "red.png", (0, 200, 0)), nothing,
        (folder / "green.png").unlink, nothing,
    )  # fmt: skip
    done = [(update.embedded, update.kept, update.removed) for update in updates]
    assert done == [(4, 0, 0), (1, 4, 0), (1, 4, 0), (0, 4, 1)]
    assert watched.names() == sorted({*ALL, "new.png"} - {"green.png"})
    assert set(watched.pauses) == {POLL_S}
    before = {path: path.stat().st_mtime_ns for path in watched.index.iterdir()}
    (update,) = watched.watch(nothing, nothing, nothing)
    assert (update.embedded, update.kept) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in watched.index.iterdir()} == before


def test_a_file_that_is_still_being_written_is_not_taken_as_broken(watched: Folder) -> None:
    path, late = watched.folder / "upload.png", watched.folder / "late.png"
    Image.effect_noise((64, 64), 80).save(path)
    content = path.read_bytes()
    path.unlink()
    late.write_bytes(b"only the beg")  # as the watch begins

    def write(share: float) -> Callable[[], None]:
        return lambda: path.write_bytes(content[: int(share * len(content))]) and None

    # It grows at each look, then pauses for longer than SETTLE_S in the middle, and is complete at last.
    steps = [write(0.1), write(0.2), write(0.4), nothing, nothing, nothing, write(1), nothing]
    assert messages(watched.watch(paint(late), *steps)) == []
    assert watched.names() == sorted([*ALL, "late.png", "upload.png"])


def test_what_stays_broken_costs_an_update_a_minute_and_not_at_each_look(
    watched: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (watched.folder / "broken.png").write_bytes(b"no image")
    (watched.folder / "link.png").symlink_to(tmp_path / "nothing.png")
    update, times = index_update.Indexer.update, list[float]()

    def noted(*arguments: Any) -> Update | None:
        times.append(watched.now)
        return update(*arguments)

    monkeypatch.setattr(index_update.Indexer, "update", noted)
    watched.watch(*[nothing] * int(3 * BROKEN_S / POLL_S))
    assert 3 <= len(times) <= 5  # the first two as the files settle


def test_a_file_that_stays_broken_is_reported_once(watched: Folder, tmp_path: Path) -> None:
    broken = watched.folder / "broken.png"
    (watched.folder / "link.png").symlink_to(tmp_path / "late.png")
    begin = lambda: broken.write_bytes(b"no image") and None  # noqa: E731
    updates = watched.watch(begin, nothing, nothing, watched.skip(BROKEN_S), nothing, nothing)
    assert sorted(message.partition(":")[0] for message in messages(updates)) == [
        f"Cannot read the image {broken}", f"Cannot read the image {watched.folder / 'link.png'}"
    ]  # fmt: skip
    assert watched.names() == ALL
    paint(tmp_path / "late.png")()
    assert watched.watch(paint(broken, (9, 9, 9)), nothing, nothing)[-1].embedded == 1
    assert watched.names() == sorted([*ALL, "broken.png", "link.png"])


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
    look = lambda: counts.append(len(watched.names()))  # noqa: E731
    steps = [lambda: old.rename(away), lambda: away.rename(new)] if out_of_sight else [lambda: old.rename(new)]
    updates = watched.watch(*steps, look, look, look)
    assert [(update.embedded, update.removed) for update in updates] == [(25, 0)]
    assert set(counts) == {25}
    assert len([name for name in watched.names() if name.startswith("renamed/")]) == 22


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


def test_an_unmounted_folder_empties_no_index(watched: Folder) -> None:
    away = watched.folder.with_name("away")
    updates = watched.watch(
        lambda: watched.folder.rename(away) and None, nothing, watched.folder.mkdir, nothing, watched.folder.rmdir,
        lambda: away.rename(watched.folder) and None, nothing,
    )  # fmt: skip
    assert watched.names() == ALL
    assert sum(update.removed for update in updates) == 0
    with pytest.raises(InputError):
        next(iter(watch_index(watched.encoder, away, watched.index)))


@pytest.mark.parametrize("moment", ["listed", "opened", "embedding"])
def test_images_whose_folder_goes_away_as_they_are_taken_are_embedded_later(
    moment: str, watched: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, counts = watched.folder.with_name("away"), iter(range(99))
    module, name, at = {
        "listed": (index_watch, "Listing", 2),
        "opened": (index_update, "remember", 1),
        "embedding": (index_update, "embed_images", 1),
    }[moment]
    plain = getattr(module, name)

    def unmount(*arguments: Any) -> object:
        result = plain(*arguments)
        if next(counts) == at:
            watched.folder.rename(away)
        return result

    monkeypatch.setattr(module, name, unmount)
    back = lambda: away.rename(watched.folder) if away.exists() else None  # noqa: E731
    updates = watched.watch(paint(watched.folder / "new.png"), nothing, nothing, back, nothing, nothing)
    assert [update.embedded for update in updates if update.embedded] == [4, 1]
    assert messages(updates) == []
    assert watched.names() == sorted([*ALL, "new.png"])


def test_a_stop_saves_what_is_embedded(watched: Folder) -> None:
    for i in range(100):
        paint(watched.folder / f"{i:03}.png", (i, 50, 50))()
    stop = threading.Event()
    stop.set()
    update = update_index(watched.encoder, watched.folder, watched.index, stop=stop)
    assert update.embedded == len(watched.names()) == 32


def test_a_stop_ends_the_wait_for_another_writer(watched: Folder) -> None:
    stop, reporter, updates = threading.Event(), Watch(), list[Update]()
    watch = watch_index(watched.encoder, watched.folder, watched.index, stop=stop, reporter=reporter)
    thread = threading.Thread(target=lambda: updates.extend(watch))
    with exclusive_writer(watched.index):
        thread.start()
        wait_until(lambda: reporter.noted)
        stop.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert updates == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_the_command_with_everything_saved(colour_bundle: Path, watched: Folder, tmp_path: Path) -> None:
    index = tmp_path / "index"
    command = [sys.executable, "-m", "clip_rd_edge", "index", colour_bundle, watched.folder, "-o", index, "--watch"]
    process = subprocess.Popen([*map(str, command)], stdout=-1, stderr=-1, text=True)
    wait_until((index / "index.json").is_file)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (0, f"{index}\n"), error
    assert "4 embedded, 0 removed: 4 images in the index" in error
    assert len(read_index(index)[0].entries) == 4
