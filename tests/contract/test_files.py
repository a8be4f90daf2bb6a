from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from clip_rd_edge.contract.files import full_disk, new_folder, refuse_unless_free, write_text
from clip_rd_edge.errors import UsageError


def test_new_folder_leaves_nothing_when_interrupted(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_new_folder_keeps_the_old_one_when_interrupted(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_new_folder_replaces_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_write_text_leaves_no_temporary(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "file", "content")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_an_output_in_use_is_refused_unless_forced(tmp_path: Path) -> None:
    refuse_unless_free(tmp_path / "new", overwrite=False)
    (tmp_path / "used").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        refuse_unless_free(tmp_path / "used", overwrite=False)
    refuse_unless_free(tmp_path / "used", overwrite=True)


def test_a_full_disk_leaves_nothing_and_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised, new_folder(tmp_path / "bundle") as folder:
        write_text(folder / "image.onnx", "content")
    assert list(tmp_path.iterdir()) == []
    said = full_disk(raised.value)
    assert said is not None
    assert str(said).startswith("There is no space left on the disk; no half-written")
    wrapped = RuntimeError("the exporter failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "Quota exceeded", "/mnt/image.onnx")
    assert "on the disk for /mnt/image.onnx" in str(full_disk(wrapped))
    assert full_disk(PermissionError(errno.EACCES, "Permission denied")) is None
