"""Folders are whole or absent, whatever is killed or fails, and one process writes to them at a time."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils import outputs
from clip_rd_edge.utils.files import write_text
from clip_rd_edge.utils.outputs import (
    exclusive_writer,
    new_folder,
    remove_leftovers,
    require_apart,
)

KEY = "0123456789abcdef" * 2


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def with_old(folder: Path) -> Path:
    folder.mkdir()
    (folder / "old").touch()
    return folder


def failing(real: Callable[..., Path], fails: Callable[[Path], bool], error: OSError) -> Callable[..., Path]:
    def call(path: Path, *arguments: Path) -> Path:
        if fails(path):
            raise error
        return real(path, *arguments)

    return call


@pytest.mark.parametrize("is_new", [True, False])
def test_an_interrupted_block_leaves_all_as_it_was(tmp_path: Path, *, is_new: bool) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    if not is_new:
        with_old(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ([] if is_new else ["out", "out/old"])


def test_an_old_folder_is_moved_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_old(tmp_path / "out")
    fail = failing(Path.replace, lambda path: path.suffix == ".tmp", OSError(errno.EIO, "Input/output error"))
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match="Input/output error"), new_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["out", "out/old"]


def test_what_a_kill_left_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f".out.{KEY}.tmp").mkdir()
    for days, left in ((0.5, 1), (1.5, 0)):
        monkeypatch.setattr(outputs.time, "time", itertools.repeat(time.time() + days * 86_400).__next__)
        with new_folder(tmp_path / "out"):
            pass
        assert len(list(tmp_path.glob(".out.*.tmp"))) == left


def test_what_a_kill_left_is_removed_or_moved_back(tmp_path: Path) -> None:
    for name in ("kept", f".kept.{KEY}.old", f".lost.{KEY}.old", f".new.{KEY}.tmp", ".hidden.old", "disk"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / f".file.{KEY}.tmp").write_text("half")
    (tmp_path / f".disk.{KEY}.old").symlink_to(tmp_path / "disk")
    remove_leftovers(tmp_path)
    lost = f"lost/.lost.{KEY}.old"
    expected = [".hidden.old", ".hidden.old/.hidden.old", "disk", "disk/disk", "kept", "kept/kept", "lost", lost]
    assert names(tmp_path) == expected


def test_what_another_process_is_writing_is_no_leftover(tmp_path: Path) -> None:
    """Such as several exports into a run's folder, of which the first would be missing, while the run is resumed."""
    with new_folder(tmp_path / "bundles") as bundles:
        write_text(bundles / "cpu-x86", "content")
        remove_leftovers(tmp_path, of=("student",))
        write_text(bundles / "cpu-arm", "content")
    assert names(tmp_path) == ["bundles", "bundles/cpu-arm", "bundles/cpu-x86"]


def test_what_a_killed_process_moved_aside_is_removed_once_there_is_a_new_one(tmp_path: Path) -> None:
    old, other = (with_old(tmp_path / f".{name}.{KEY}.old") for name in ("out", "others"))
    with pytest.raises(KeyError), new_folder(tmp_path / "out"):
        raise KeyError
    assert (old / "old").is_file()  # killed between two renames, it is all that there is
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


def test_what_an_output_is_made_from_or_where_one_works_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_old(tmp_path / "model")
    for output in (source, tmp_path):
        with pytest.raises(UsageError):
            require_apart(output, [source])
    require_apart(source / "bundle", [source, Path("x" * 5_000)])
    monkeypatch.chdir(source)
    with pytest.raises(UsageError):
        require_apart(tmp_path, [])


@pytest.mark.parametrize("name", ["file/out", "volume"])
def test_an_output_that_cannot_be_put_in_its_place_is_refused_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path.name == "volume")
    with pytest.raises(UsageError), new_folder(tmp_path / name):
        pytest.fail("the work has begun")


def test_a_second_writer_is_refused_with_the_holders_process_id(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with exclusive_writer(folder):
        with pytest.raises(UsageError, match=rf"process {os.getpid()}\."):
            exclusive_writer(folder).__enter__()
        (folder / "result").touch()
    assert names(folder) == ["result"]
    with exclusive_writer(folder):
        pass


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from clip_rd_edge.utils.outputs import exclusive_writer\n"
        "with exclusive_writer(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 9
    assert names(tmp_path) == [".lock"]
    with exclusive_writer(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed")
def test_the_lock_file_is_removed_while_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removed later, it may be one that another process has locked, while a third one locks a new file."""
    unlink, refused = Path.unlink, list[str]()

    def try_to_write(path: Path, missing_ok: bool = False) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        with pytest.raises(UsageError) as raised:
            exclusive_writer(tmp_path).__enter__()
        refused.append(str(raised.value))
        unlink(path, missing_ok=missing_ok)

    with exclusive_writer(tmp_path):
        monkeypatch.setattr(Path, "unlink", try_to_write)
    assert len(refused) == 1
    assert names(tmp_path) == []


def test_writers_that_come_and_go_are_never_two_at_once(tmp_path: Path) -> None:
    inside, together = list[int](), list[int]()

    def write(number: int) -> None:
        for _ in range(20):
            with exclusive_writer(tmp_path / "folder", on_wait=lambda message: None):
                inside.append(number)
                together.append(len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(4) as threads:
        for writer in [threads.submit(write, number) for number in range(4)]:
            writer.result()
    assert together == [1] * 80
    assert set(names(tmp_path)) <= {"folder"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_hold_its_parents_lock(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path; from clip_rd_edge.utils.outputs import exclusive_writer\n"
        "with exclusive_writer(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0: os.close(1); time.sleep(60)\n"
        "    print(child, flush=True); os._exit(9)"
    )
    process = subprocess.run([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, check=False)
    try:
        with exclusive_writer(tmp_path):
            pass
    finally:
        os.kill(int(process.stdout), signal.SIGKILL)


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(OSError, match="No space left"):
            exclusive_writer(tmp_path).__enter__()
    with exclusive_writer(tmp_path), monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(UsageError):
            exclusive_writer(tmp_path).__enter__()
    with exclusive_writer(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_written_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(file: int, operation: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive_writer(tmp_path / "folder") as may_write:
        assert may_write
        assert names(tmp_path) == ["folder"]  # and nothing that a kill would leave
