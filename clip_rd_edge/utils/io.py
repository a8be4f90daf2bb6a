"""Reading and writing: whole-or-absent files and folders, YAML and JSON as typed structs, and where files live."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, InputError, UsageError, near_matches

_FULL = (errno.ENOSPC, errno.EDQUOT)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def size_bytes(path: Path) -> int:
    """Size of a file, or of all files under a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, content.encode())


def refuse_unless_free(path: Path, *, overwrite: bool, ignoring: Collection[str] = ()) -> None:
    """Refuse an output path that is in use.

    Args:
        ignoring: names in the folder that do not count.

    Raises:
        UsageError: `path` is a file, or a folder with something in it, and `overwrite` is false.
    """
    in_use = path.is_file() or (path.is_dir() and any(each.name not in ignoring for each in path.iterdir()))
    if in_use and not overwrite:
        raise UsageError(
            f"The output {path} exists already and is not empty.",
            hint="choose another -o, or replace it with --force",
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `path` if the block ends well, replacing what stood there, else vanishes.

    What stood there is moved aside before and removed after, so that `path` is at no moment half old and half new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def full_disk(error: BaseException) -> ClipRdEdgeError | None:
    """Where `error`, or what it came of, is a disk that is full: the same in one sentence; else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            where = f" for {cause.filename}" if cause.filename else ""
            return ClipRdEdgeError(
                f"There is no space left on the disk{where}; no half-written file or folder is left behind.",
                hint="free some, or choose another -o; temporary files lie where the variable TMPDIR says",
            )
        cause = cause.__cause__ or cause.__context__
    return None


T = TypeVar("T", bound=msgspec.Struct)


def read_yaml(path: Path, kind: type[T]) -> T:
    """Read a YAML file into a struct; an unknown key or a wrong type is refused.

    Raises:
        InputError: there is no such file.
        ConfigError: the text is no YAML, or does not fit `kind`.
    """
    import yaml  # PyYAML takes 20 ms to import, and a device that reads bundles never needs it

    try:
        raw = yaml.safe_load(_read(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    return convert(raw if raw is not None else {}, kind, source=str(path))


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file into a struct; raises as `read_yaml`."""
    content = _read(path)
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError:
        return convert(msgspec.json.decode(content), kind, source=str(path))  # says what does not fit
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error


def read_versioned_json(path: Path, kind: type[T], *, newest: int) -> T:
    """Read a JSON file that names its `format_version` into a struct.

    Args:
        newest: format that is known.

    Raises:
        InputError: there is no such file.
        ConfigError: it is damaged, or of a newer format, which is said before anything that this makes not fit.
    """
    found = read_json(path, _Version).format_version
    if found > newest:
        raise ConfigError(
            f"{path} has format version {found}; this clip-rd-edge reads up to {newest}.",
            hint="pip install -U clip-rd-edge",
        )
    return read_json(path, kind)


class _Version(msgspec.Struct):
    format_version: int


def convert(raw: Any, kind: type[T], *, source: str) -> T:
    """Turn plain dicts and lists into a struct, or raise ConfigError naming `source` and the key."""
    try:
        return msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as error:
        message = str(error)
        suggestion = ""
        if "unknown field" in message:
            unknown, *place = message.split("`")[1::2]
            suggestion = near_matches(unknown, _keys_at(place[0] if place else "$", kind))
        raise ConfigError(f"{source} does not fit: {message}.{suggestion}") from error


def _keys_at(place: str, kind: type[T]) -> list[str]:
    """Keys that are known at a place such as `$.rows[2].model`."""
    kinds: list[msgspec.inspect.Type] = [msgspec.inspect.type_info(kind)]
    for key in re.sub(r"\[[^]]*\]", "", place).split(".")[1:]:
        kinds = [f.type for k in kinds for s in _structs(k) for f in s.fields if f.encode_name == key]
    return [field.encode_name for k in kinds for struct in _structs(k) for field in struct.fields]


def _structs(kind: msgspec.inspect.Type) -> list[msgspec.inspect.StructType]:
    """The structs that a type holds: itself, what a union offers, the items of a list."""
    if isinstance(kind, msgspec.inspect.StructType):
        return [kind]
    inner = getattr(kind, "types", None) or [i for i in [getattr(kind, "item_type", None)] if i]
    return [struct for part in inner for struct in _structs(part)]


def to_json(struct: Any) -> bytes:
    """A struct as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(struct), indent=2) + b"\n"


def to_yaml(struct: Any) -> str:
    """A struct as YAML, keys in the order of its fields."""
    import yaml

    text: str = yaml.safe_dump(msgspec.to_builtins(struct), sort_keys=False, allow_unicode=True)
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}.", hint="check the path") from error


def cache_home() -> Path:
    """$CLIP_RD_EDGE_CACHE, else `clip-rd-edge` in the user's cache folder; it need not exist yet."""
    base = os.environ.get("CLIP_RD_EDGE_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "clip-rd-edge"


_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Where a shipped file or folder lies, by its path in the repository, such as `benchmarks/suites/quickstart.yaml`.

    Raises:
        InputError: nothing of that name is shipped.
    """
    for root in (_PACKAGE / "_shipped", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise InputError(f"clip-rd-edge ships no {name!r}.")
