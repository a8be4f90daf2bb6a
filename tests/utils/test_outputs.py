from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import wait_until

from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils import files
from clip_rd_edge.utils import outputs as folders
from clip_rd_edge.utils import outputs as lock
from clip_rd_edge.utils.files import write_text
from clip_rd_edge.utils.outputs import exclusive_writer, new_folder, remove_leftovers, require_free_output


def test_new_folder_leaves_nothing_behind_when_interrupted(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_new_folder_keeps_the_old_folder_when_interrupted(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_new_folder_keeps_what_another_process_has_put_there_meanwhile(tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out", overwrite=False) as folder:
            (folder / "mine").touch()
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").touch()

    with pytest.raises(UsageError, match="already exists and is not empty"):
        write()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/theirs"]


def test_new_folder_replaces_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_is_moved_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    replace = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with (
        pytest.raises(UsageError, match="out cannot be written: Input/output error"),
        new_folder(tmp_path / "out") as folder,
    ):
        (folder / "new").write_text("new")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/old"]


def test_on_windows_a_folder_that_another_window_is_in_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> Path:
        if path.name == "best":
            raise PermissionError(13, "The process cannot access the file", str(path), None, str(target))
        return replace(path, target)

    replace = Path.replace
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "old").touch()
    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    monkeypatch.setattr(files, "_PATIENCE_S", 0.1)
    with (
        pytest.raises(UsageError, match=r"[/\\]best cannot be written: another program has it open"),
        new_folder(tmp_path / "best") as folder,
    ):
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["best", "old"]


def test_what_a_kill_left_goes_after_a_day_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    folders._beside(tmp_path / "out", "tmp").mkdir()
    for days, left in ((0.5, 1), (1.5, 0)):
        monkeypatch.setattr(folders.time, "time", itertools.repeat(time.time() + days * 86_400).__next__)
        with new_folder(tmp_path / "out"):
            pass
        assert len(list(tmp_path.glob(".out.*.tmp"))) == left


def test_what_a_kill_left_is_removed_or_moved_back(tmp_path: Path) -> None:
    mark = "0123456789abcdef" * 2
    for name in ("kept", f".kept.{mark}.old", f".lost.{mark}.old", f".new.{mark}.tmp", ".hidden.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    (tmp_path / f".file.{mark}.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden.old", "kept", "lost"]
    assert (tmp_path / "kept" / "content").read_text() == "kept"
    assert (tmp_path / "lost" / "content").read_text() == f".lost.{mark}.old"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot lock folders")
def test_what_another_process_is_writing_is_no_leftover(tmp_path: Path) -> None:
    """Such as several exports into a run's folder, of which the first would be missing, while the run is resumed."""
    with new_folder(tmp_path / "bundles") as bundles:
        write_text(bundles / "cpu-x86" / "image.onnx", "content")
        remove_leftovers(tmp_path)
        write_text(bundles / "cpu-arm" / "image.onnx", "content")
    assert sorted(path.name for path in (tmp_path / "bundles").iterdir()) == ["cpu-arm", "cpu-x86"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot lock folders")
def test_a_later_folder_of_the_same_name_removes_what_a_kill_left_but_not_what_is_being_written(tmp_path: Path) -> None:
    program = (
        "import sys, os; from pathlib import Path; from clip_rd_edge.utils.outputs import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'large').write_text('x'); print(folder, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert Path(killed.stdout.strip(), "large").is_file()
    other = tmp_path / f".others.{'0123456789abcdef' * 2}.tmp"
    other.mkdir()
    with new_folder(tmp_path / "out") as first, new_folder(tmp_path / "out") as second:
        assert sorted(path for path in tmp_path.iterdir() if path != other) == sorted([first, second])
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot lock folders")
@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_what_another_machine_is_writing_is_kept_for_a_day_as_its_locks_may_not_be_seen_here(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("platform.node", lambda: "elsewhere")
        others = folders._beside(tmp_path / "out", kind)
    others.mkdir()
    changed = others.stat().st_ctime
    for days, names in ((0, [others.name, "out"]), (2, ["out"])):
        monkeypatch.setattr(folders.time, "time", lambda days=days: changed + 86_400 * days)
        with new_folder(tmp_path / "out"):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_what_a_killed_process_moved_aside_is_removed_once_there_is_a_new_one(tmp_path: Path) -> None:
    mark = folders._mark() + "0123456789abcdef01234567"
    old, other = tmp_path / f".out.{mark}.old", tmp_path / f".others.{mark}.old"
    for folder in (old, other):
        folder.mkdir()
        (folder / "content").write_text("old")
    with pytest.raises(KeyError), new_folder(tmp_path / "out"):
        raise KeyError
    assert (old / "content").is_file()  # killed between two renames, it is all that there is
    with new_folder(tmp_path / "out") as new:
        (new / "content").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may remove everything")
def test_a_folder_that_its_owner_has_protected_is_replaced_without_a_trace(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
    for path in ("out/deep/file", "out/deep", "out"):
        (tmp_path / path).chmod(0o555)
    with new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_an_output_in_use_is_refused_unless_forced(tmp_path: Path) -> None:
    require_free_output(tmp_path / "new", overwrite=False)
    (tmp_path / "used").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        require_free_output(tmp_path / "used", overwrite=False)
    require_free_output(tmp_path / "used", overwrite=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes in folders")
def test_a_pipe_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    """As root, the user of most containers, /dev/null could be, and every other program would miss it."""
    os.mkfifo(tmp_path / "pipe")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="pipe is a pipe; expected a folder"):
            require_free_output(tmp_path / "pipe", overwrite=overwrite)
        with pytest.raises(UsageError, match=f"{os.devnull} is a device or a socket; expected a folder"):
            require_free_output(Path(os.devnull), overwrite=overwrite)
    with pytest.raises(UsageError, match="is a pipe"), new_folder(tmp_path / "pipe"):
        pass
    assert [path.name for path in tmp_path.iterdir() if path.is_fifo()] == ["pipe"]


def test_an_output_that_cannot_be_put_in_its_place_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "volume").mkdir()
    with pytest.raises(UsageError, match=r"bundle cannot be written: .*file is a file"):
        require_free_output(tmp_path / "file" / "deep" / "bundle", overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)  # permissions do not stop root
        with pytest.raises(UsageError, match=r"bundle cannot be written: the folder .* cannot be written to"):
            require_free_output(tmp_path / "deep" / "bundle", overwrite=False)
        require_free_output(tmp_path / "volume", overwrite=False, replaced=False)
    monkeypatch.setattr(os.path, "ismount", lambda path: path.name == "volume")
    # Of Windows, before Python 3.12.
    monkeypatch.setattr(Path, "is_mount", lambda path: pytest.fail("Path.is_mount() is unsupported on this system"))
    with pytest.raises(UsageError, match="is where a volume is mounted, which cannot be replaced") as raised:
        require_free_output(tmp_path / "volume", overwrite=False)
    assert raised.value.hint == f"name a folder in it: output {tmp_path / 'volume' / 'new'}"
    require_free_output(tmp_path / "volume" / "new", overwrite=False)


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UsageError, match=r"out cannot be written: (File exists|Not a directory)"),
        new_folder(tmp_path / "file/out"),
    ):
        pass


def test_an_output_on_a_drive_that_is_not_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "exists", lambda path: False)  # not even the root, as on Windows
    with pytest.raises(UsageError, match="cannot be written: there is no /"):
        require_free_output(tmp_path / "out", overwrite=True)


def test_a_link_in_the_place_of_a_new_folder_is_replaced_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").touch()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["old"]


def test_a_link_that_was_moved_aside_is_a_leftover_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / f".best.{'0' * 32}.old").symlink_to(tmp_path / "disk")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "disk"]


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
