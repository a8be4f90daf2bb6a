from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils import files
from clip_rd_edge.utils.files import disk_full_error, is_plain_name, read_limited, write_text
from clip_rd_edge.utils.outputs import new_folder


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure would otherwise leave files of that name that are empty."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync") or fsync(file))
    monkeypatch.setattr(Path, "replace", lambda path, target: events.append("replace") or replace(path, target))
    write_text(tmp_path / "file", "content")
    assert events == ["fsync", "replace"]
    events.clear()
    with new_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        for name in ("a", "deep/b"):
            (folder / name).write_text(name)
    assert events[-3:] == ["fsync", "fsync", "replace"]


@pytest.mark.parametrize("opened_for", [3, 1000])
def test_on_windows_a_file_is_replaced_as_soon_as_no_program_has_it_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened_for: int
) -> None:
    replace, refused = Path.replace, []

    def refuse(path: Path, target: Path) -> Path:
        refused.append(path)
        if len(refused) <= opened_for:
            raise PermissionError(13, "Access is denied", str(path), None, str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    monkeypatch.setattr(files, "_PATIENCE_S", 0.5)
    (tmp_path / "index.json").write_text("old")
    if opened_for < 10:
        write_text(tmp_path / "index.json", "new")
    else:
        with pytest.raises(UsageError, match=r"index.json cannot be written: another program has it open") as raised:
            write_text(tmp_path / "index.json", "new")
        assert raised.value.hint.startswith("close it there")
    assert (tmp_path / "index.json").read_text() == ("new" if opened_for < 10 else "old")
    assert len(list(tmp_path.iterdir())) == 1


def test_on_windows_a_file_is_read_although_it_is_being_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file, refused = Path.open, []

    def refuse(path: Path, mode: str) -> IO[bytes]:
        refused.append(path)
        if len(refused) < 3:
            raise PermissionError(13, "Access is denied", str(path))
        return open_file(path, mode)

    (tmp_path / "index.json").write_text("new")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Cannot read"):
        files.read_limited(tmp_path / "index.json", 100)
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    assert files.read_limited(tmp_path / "index.json", 100) == b"new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes with a name")
@pytest.mark.parametrize(("size", "fits"), [(1 << 16, True), (1 << 23, False)])
def test_a_pipe_is_read_up_to_the_limit_and_no_further(tmp_path: Path, size: int, *, fits: bool) -> None:
    pipe, written = tmp_path / "pipe", list[int]()
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb", buffering=0) as file, suppress(BrokenPipeError):
            for _ in range(size >> 12):
                written.append(file.write(bytes(1 << 12)))

    thread = threading.Thread(target=write)
    thread.start()
    if fits:
        assert read_limited(pipe, 1 << 16) == bytes(size)
    else:
        with pytest.raises(InputError, match="is larger than"):
            read_limited(pipe, 1 << 16)
    thread.join()
    assert (sum(written) == size) == fits  # whoever writes endlessly would never let go


@pytest.mark.parametrize("name", ["image.onnx", "deep/er/a b.txt", "..a", "a..", "猫.png"])
def test_a_name_that_stays_in_its_folder_is_plain(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "a/..", "..", ".", "./x", "", "/etc/passwd", "a//b", "a/", "C:\\x", "C:x", "..\\x", "\\\\h",
     "a\0b", "a\n", "\x1b[31mx"],
)  # fmt: skip
def test_a_name_that_may_lead_out_of_its_folder_is_not_plain(name: str) -> None:
    assert not is_plain_name(name)


def test_a_full_disk_leaves_nothing_behind_and_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised, new_folder(tmp_path / "bundle") as folder:
        write_text(folder / "image.onnx", "content")
    assert list(tmp_path.iterdir()) == []
    error = disk_full_error(raised.value)
    assert error is not None
    assert str(error) == "There is no space left on the disk."
    wrapped = RuntimeError("the exporter failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "Quota exceeded", "/mnt/image.onnx")
    assert "on the disk for /mnt/image.onnx" in str(disk_full_error(wrapped))
    assert disk_full_error(PermissionError(errno.EACCES, "Permission denied")) is None
    rust = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")  # of safetensors
    assert "on the disk" in str(disk_full_error(rust))
    assert disk_full_error(RuntimeError("Permission denied (os error 13)")) is None
    assert "larger than its file system" in str(
        disk_full_error(OSError(errno.EFBIG, "File too large", "/mnt/state.pt"))
    )
