from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import wait_until

from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils import outputs as lock
from clip_rd_edge.utils.outputs import exclusive_writer


def test_a_second_writer_is_refused_with_the_holders_process_id(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with exclusive_writer(folder):
        with pytest.raises(UsageError, match=rf"is being written by another run, process {os.getpid()}\."):
            exclusive_writer(folder).__enter__()
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]
    with exclusive_writer(folder):
        pass


def test_windows_locks_none_of_the_bytes_that_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, no other process can read a byte that is locked."""
    locked = list[int]()
    look = lambda file, mode, count: locked.append(os.lseek(file, 0, os.SEEK_CUR))  # noqa: E731
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=look, LK_NBLCK=2))
    with exclusive_writer(tmp_path):
        content = (tmp_path / ".lock").read_bytes()
    assert content == str(os.getpid()).encode()
    assert locked[0] > len(content)


def test_the_lock_file_is_removed_on_windows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, no open file can be removed."""
    unlink = Path.unlink

    def refuse_open(path: Path, missing_ok: bool = False) -> None:
        if lock._held_locks:
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(lock, "_IS_WINDOWS", True)
    monkeypatch.setattr(Path, "unlink", refuse_open)
    with exclusive_writer(tmp_path / "folder"):
        pass
    assert not (tmp_path / "folder").exists()


def test_a_new_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with exclusive_writer(tmp_path / "folder"):
        pass
    assert not (tmp_path / "folder").exists()


def test_a_killed_process_releases_its_lock(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from clip_rd_edge.utils.outputs import exclusive_writer\n"
        "with exclusive_writer(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == 9
    (tmp_path / ".lock").write_text(f"{10**9}\nof a process with a longer number")
    with exclusive_writer(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed")
@pytest.mark.parametrize("another_began", [True, False])
def test_a_lock_file_that_is_removed_between_opening_and_locking_lets_no_second_writer_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, another_began: bool
) -> None:
    real = lock._lock

    def end_first(file: int) -> None:
        monkeypatch.setattr(lock, "_lock", real)
        (tmp_path / ".lock").unlink()  # as its holder does in the end
        if another_began:
            others.enter_context(exclusive_writer(tmp_path))
        real(file)

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(lock, "_lock", end_first)
    with ExitStack() as others:
        if not another_began:
            others.enter_context(exclusive_writer(tmp_path))
        with pytest.raises(UsageError, match="is being written by another run"):
            exclusive_writer(tmp_path).__enter__()


@pytest.fixture
def lock_of_another_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock file of a process that was killed, in a folder that several accounts may write."""
    path, open_file = tmp_path / ".lock", os.open
    path.write_text("7")
    theirs = path.stat()

    def refuse_to_write(name: Path, flags: int, *mode: int, **options: Any) -> int:
        if flags & os.O_RDWR and path.exists() and os.path.samestat(path.stat(), theirs):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return open_file(name, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refuse_to_write)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed")
def test_the_lock_that_a_killed_process_of_another_account_left_is_replaced(lock_of_another_account: Path) -> None:
    with exclusive_writer(lock_of_another_account.parent):
        assert lock_of_another_account.read_text() == str(os.getpid())
    assert not lock_of_another_account.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="reads a file that another process has locked")
def test_a_writer_of_another_account_is_told_of(lock_of_another_account: Path) -> None:
    with lock_of_another_account.open() as file:
        lock._lock(file.fileno())
        with pytest.raises(UsageError, match=r"is being written by another run, process 7\."):
            exclusive_writer(lock_of_another_account.parent).__enter__()
    assert lock_of_another_account.read_text() == "7"


@pytest.mark.skipif(sys.platform == "win32", reason="locks every file that may be read")
def test_a_lock_of_another_account_that_cannot_be_tried_is_not_passed_over(
    lock_of_another_account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file has to be open for writing."""
    monkeypatch.setattr(lock, "_lock", lambda file: os.write(file, b""))
    with pytest.raises(UsageError, match="cannot be written: Permission denied"):
        exclusive_writer(lock_of_another_account.parent).__enter__()


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


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UsageError, match="cannot be written: Permission denied"):
        exclusive_writer(tmp_path).__enter__()
    tmp_path.chmod(0o755)


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(UsageError, match="No space left"):
            exclusive_writer(tmp_path).__enter__()
    with exclusive_writer(tmp_path):
        pass


def test_a_folder_that_goes_while_it_is_looked_at_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, is_dir = tmp_path / "making-room", Path.is_dir
    folder.mkdir()

    def remove_and_tell(path: Path) -> bool:  # as its last holder does between the two calls of Path.mkdir
        if path == folder:
            monkeypatch.setattr(Path, "is_dir", is_dir)
            folder.rmdir()
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", remove_and_tell)
    with exclusive_writer(folder):
        assert (folder / ".lock").is_file()


@pytest.mark.parametrize("target", ["nothing", "a file"])
def test_a_link_that_leads_to_no_folder_is_refused(tmp_path: Path, target: str) -> None:
    if target == "a file":
        (tmp_path / target).touch()
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match="link"):
        exclusive_writer(tmp_path / "link").__enter__()


def test_a_link_to_nothing_above_the_folder_is_named(tmp_path: Path) -> None:
    """Such as to a disk that is not mounted."""
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    with pytest.raises(UsageError, match=rf"runs is a link to {tmp_path}/disk/runs, which is not there\."):
        exclusive_writer(tmp_path / "runs" / "first").__enter__()


def test_a_folder_whose_parent_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        exclusive_writer(tmp_path / "file" / "folder").__enter__()


def test_a_file_system_without_locks_is_written_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", refuse)
    with exclusive_writer(tmp_path / "folder"):
        (tmp_path / "folder" / "result").touch()
    assert (tmp_path / "folder" / "result").exists()


def test_a_writer_that_may_wait_says_so_once_and_goes_on_when_the_first_ends(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    said: list[str] = []
    order: list[str] = []

    def second() -> None:
        with exclusive_writer(folder, on_wait=said.append):
            order.append("second")

    thread = threading.Thread(target=second)
    with exclusive_writer(folder):
        thread.start()
        wait_until(lambda: said)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert said == [f"{folder} is being written by another run, process {os.getpid()}: waiting for it"]
