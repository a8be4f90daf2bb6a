from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.io import (
    disk_full_error,
    new_folder,
    read_yaml,
    remove_leftovers,
    require_free_output,
    to_yaml,
    write_text,
)


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
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"), new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/old"]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure would otherwise leave files of that name that are empty."""
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync") or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda path, target: events.append("rename") or rename(path, target))
    monkeypatch.setattr(Path, "replace", lambda path, target: events.append("rename") or replace(path, target))
    write_text(tmp_path / "file", "content")
    assert events == ["fsync", "rename"]
    events.clear()
    with new_folder(tmp_path / "out") as folder:
        (folder / "deep").mkdir()
        for name in ("a", "deep/b"):
            (folder / name).write_text(name)
    assert events == ["fsync", "fsync", "rename"]


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


def test_write_text_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "file", "content")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]


def test_an_output_in_use_is_refused_unless_forced(tmp_path: Path) -> None:
    require_free_output(tmp_path / "new", overwrite=False)
    (tmp_path / "used").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        require_free_output(tmp_path / "used", overwrite=False)
    require_free_output(tmp_path / "used", overwrite=True)


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
    assert str(error).startswith("There is no space left on the disk; no half-written")
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


class Oven(msgspec.Struct, forbid_unknown_fields=True):
    temperature: int
    grill: bool = False


class Kitchen(msgspec.Struct, forbid_unknown_fields=True):
    ovens: tuple[Oven, ...]
    spare: Oven | None = None


@pytest.mark.parametrize("text", ["ovens: [{temperature: 1, gril: true}]", "{ovens: [], spare: {gril: true}}"])
def test_a_misspelt_nested_key_gets_suggestions(tmp_path: Path, text: str) -> None:
    (tmp_path / "kitchen.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"unknown field `gril`.* Did you mean 'grill'"):
        read_yaml(tmp_path / "kitchen.yaml", Kitchen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature: hot", r"Expected `int`, got `str` - at `\$.temperature`"),
        ("temperatur: 200", r"unknown field `temperatur`.* Did you mean 'temperature'"),
        ("grill: true", "missing required field `temperature`"),
        ("temperature: [", "not valid YAML"),
        ("", "missing required field `temperature`"),
    ],
)
def test_invalid_content_is_reported_with_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "oven.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path, Oven)
    assert str(path) in str(error.value)


def test_an_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "kitchen.yaml").write_text("ovens: [{temperature: 1, door: open}]")
    with pytest.raises(ConfigError, match=r"unknown field `door` - at `\$\.ovens\[0\]`\.$") as raised:
        read_yaml(tmp_path / "kitchen.yaml", Kitchen)
    assert raised.value.hint == "the keys there are temperature, grill"


class Rate(msgspec.Struct, forbid_unknown_fields=True):
    rate: float | str | None
    name: str = ""
    steps: int = 0


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1e3", "+1.5e2", ".5", ".5e-3", "-1e+2", "1.", "0.1", "7", "1.0e-3"])
def test_numbers_in_yaml_are_those_of_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "rate.yaml").write_text(f"rate: {text}\nname: '{text}'\nsteps: 1e4\n")
    rate = read_yaml(tmp_path / "rate.yaml", Rate)
    assert rate == Rate(rate=float(text), name=text, steps=10_000)
    (tmp_path / "rate.yaml").write_text(to_yaml(rate))
    assert read_yaml(tmp_path / "rate.yaml", Rate) == rate


@pytest.mark.parametrize("text", ["e-3", "1e", "1e-3x", "1 e3", "v1e3", "1.2.3", "2026-11-26"])
def test_other_texts_in_yaml_are_no_numbers(tmp_path: Path, text: str) -> None:
    (tmp_path / "rate.yaml").write_text(f"rate: {text}\nname: x")
    if text == "2026-11-26":  # a date in YAML, which no setting is
        with pytest.raises(ConfigError, match="Expected"):
            read_yaml(tmp_path / "rate.yaml", Rate)
    else:
        assert read_yaml(tmp_path / "rate.yaml", Rate).rate == text


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        read_yaml(tmp_path / "nowhere.yaml", Oven)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[" * 5_000, "nested too deep"), ("{a: " * 5_000, "nested too deep"), ("a: 2001-99-99", "invalid value")],
)
def test_yaml_that_pyyaml_cannot_hold_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "kitchen.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"kitchen\.yaml .*{message}"):
        read_yaml(tmp_path / "kitchen.yaml", Kitchen)
