"""File helpers: atomic files and folders, YAML and JSON as typed structs, and standard locations."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clip_rd_edge.errors import ConfigError, DiskFullError, InputError, UsageError, near_matches
from clip_rd_edge.installation import install_command
from clip_rd_edge.utils.paths import is_file, is_folder
from clip_rd_edge.utils.yaml_text import MAX_YAML_BYTES, parse_yaml, yaml_classes

# Results and indexes of millions of images are below this, and whatever is larger would take gigabytes of memory.
MAX_JSON_BYTES = 1 << 30
MAX_TEXT_BYTES = 1 << 24  # of a list of names or templates
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex, reading it in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files under a folder, in bytes."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def is_plain_name(name: str) -> bool:
    """Return whether `name`, read from a file, is a relative path with / as separator that stays in its folder.

    Backslashes and colons are refused on every system, since they separate folders and drives on some.
    """
    return (
        bool(name)
        and not any(character in "\\:" or not character.isprintable() for character in name)
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, creating its folder if it is missing."""
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


def require_free_output(path: Path, *, overwrite: bool, ignoring: Collection[str] = ()) -> None:
    """Refuse an output path that is in use.

    Args:
        ignoring: names of files in the folder to ignore.

    Raises:
        UsageError: `path` is a file or a non-empty folder, and `overwrite` is false; or it is no path that can be
            written, such as one that is too long.
    """
    try:
        in_use = is_file(path) or (is_folder(path) and any(child.name not in ignoring for child in path.iterdir()))
    except (InputError, OSError) as error:
        raise unwritable_output(path, error) from error
    if in_use and not overwrite:
        raise UsageError(
            f"The output {path} already exists and is not empty.",
            hint="choose another -o, or replace it with --force",
        )


def require_utf8_path(path: Path) -> None:
    """Refuse a path for a model that is not UTF-8: safetensors could write its weights there, but not read them.

    Raises:
        UsageError: the path, with all folders above it, is not UTF-8.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:  # Python represents a byte that is not UTF-8 as half a surrogate pair
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise UsageError(
            f"The output {shown} cannot be written: its path is not UTF-8, as weights need.",
            hint="choose another -o, or rename the folder",
        ) from None


def unwritable_output(path: Path, error: Exception) -> UsageError:
    """Return the error for an output that cannot be written."""
    cause = error.__cause__ or error
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return UsageError(f"The output {path} cannot be written: {reason}.", hint="choose another -o")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` if the block succeeds and removed otherwise.

    Its content is on the disk before it is renamed, so that a power failure leaves no folder of empty files. An
    existing file or folder at `path` is moved aside first and removed last, so `path` never mixes old and new files; it
    is moved back if the new one cannot take its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        _remove(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there; what cannot be removed is a leftover, and no reason to fail."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


_MANY_FILES = 64  # each is waited for, which takes milliseconds; for more, the whole system is asked once


def _sync(folder: Path) -> None:
    """Wait until the files in a folder are on the disk."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if len(files) > _MANY_FILES and hasattr(os, "sync"):
        os.sync()
        return
    for path in files:
        with path.open("rb" if os.name == "posix" else "rb+") as file:  # a copied file may be read-only
            os.fsync(file.fileno())


_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.(?P<kind>tmp|old)")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of unfinished files and folders in `folder`, which nobody else may be writing.

    What `new_folder` had moved aside without having put the new one in its place is moved back.
    """
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        if match["kind"] == "old" and not path.with_name(match["name"]).exists():
            path.rename(path.with_name(match["name"]))
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def disk_full_error(error: BaseException) -> DiskFullError | None:
    """Return a one-sentence error if `error` or one of its causes is a full disk, else None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DiskFullError):
            return cause
        if _errno(cause) in _DISK_FULL:
            filename = getattr(cause, "filename", None)
            where = f" for {filename}" if filename else ""
            if _errno(cause) == errno.EFBIG:
                return DiskFullError(
                    f"A file{where} is larger than its file system, or a limit of this shell, allows; no half-written "
                    "file or folder is left behind.",
                    hint="see ulimit -f, or choose another -o; FAT keeps no file of 4 GB",
                )
            return DiskFullError(
                f"There is no space left on the disk{where}; no half-written file or folder is left behind.",
                hint="free some space, or choose another -o; temporary files are written to the folder in TMPDIR",
            )
        cause = cause.__cause__ or cause.__context__
    return None


# How libraries in Rust, such as safetensors and tokenizers, report an error of the operating system.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _RUST_ERROR.search(str(error))
    return int(match[1]) if match else None


T = TypeVar("T", bound=msgspec.Struct)


def read_yaml(path: Path, kind: type[T]) -> T:
    """Read a YAML file into a struct, refusing unknown keys and wrong types.

    Raises:
        InputError: the file cannot be read.
        ConfigError: it is not valid YAML, or does not match `kind`.
    """
    raw = parse_yaml(read_limited(path, MAX_YAML_BYTES), source=path)
    return convert(raw if raw is not None else {}, kind, source=str(path))


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file into a struct; raises the same errors as `read_yaml`."""
    return _decode_json(read_limited(path, MAX_JSON_BYTES), kind, source=path)


def read_json_objects(path: Path) -> Any:
    """Return the content of a JSON file as dicts, lists, texts and numbers; raises the same errors as `read_yaml`."""
    return _json_objects(read_limited(path, MAX_JSON_BYTES), path)


def _decode_json(content: bytes, kind: type[T], *, source: Path) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError:
        return convert(_json_objects(content, source), kind, source=str(source))  # raises with the offending key
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        _json_objects(content, source)
        raise


def _json_objects(content: bytes, source: Path) -> Any:
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{source} is not valid JSON: {error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8: {error.reason}.") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is not valid JSON for this: its values are nested too deep.") from error


V = TypeVar("V")


def decode_request(body: bytes, kind: type[V]) -> V:
    """Decode JSON that a client sent; raise InputError, without a place, if it is not JSON or of another form."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        reason = str(error).rstrip(".")
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8: {error.reason} at byte {error.start:,}"
    except RecursionError:
        reason = "its values are nested too deep"
    raise InputError(f"The request is invalid: {reason}.")


def read_versioned_json(
    path: Path,
    kind: type[T],
    *,
    newest: int,
    upgrade: Callable[[bytes], bytes] | None = None,
    max_bytes: int = MAX_JSON_BYTES,
) -> T:
    """Read a JSON file with a `format_version` into a struct.

    Args:
        newest: latest supported format version.
        upgrade: rewrites the content of an older version to the newest one's keys.
        max_bytes: limit on the size of the file.

    Raises:
        InputError: the file cannot be read.
        ConfigError: it is damaged, or its format is newer. The version is checked before anything else.
    """
    content = read_limited(path, max_bytes)
    version = _decode_json(content, _Version, source=path).format_version
    if version > newest:
        raise ConfigError(
            f"{path} has format version {version}; this clip-rd-edge reads up to {newest}.",
            hint=install_command(options="-U"),
        )
    if upgrade is not None and version < newest:
        content = upgrade(content)
    return _decode_json(content, kind, source=path)


class _Version(msgspec.Struct):
    format_version: int


def convert(raw: Any, kind: type[T], *, source: str) -> T:
    """Convert plain dicts and lists to a struct; raise ConfigError naming `source` and the key if they do not match."""
    try:
        return msgspec.convert(raw, kind, strict=True)
    except msgspec.ValidationError as error:
        message = str(error)
        suggestion = hint = ""
        if "unknown field" in message:
            unknown, *location = message.split("`")[1::2]
            keys = _keys_at(location[0] if location else "$", kind)
            suggestion = near_matches(unknown, keys)
            hint = f"the keys there are {', '.join(dict.fromkeys(keys))}"
        raise ConfigError(f"{source} is invalid: {message}.{suggestion}", hint=hint) from error


def _keys_at(location: str, kind: type[T]) -> list[str]:
    """Return the known keys at a location such as `$.rows[2].model`."""
    kinds: list[msgspec.inspect.Type] = [msgspec.inspect.type_info(kind)]
    for key in re.sub(r"\[[^]]*\]", "", location).split(".")[1:]:
        kinds = [f.type for k in kinds for s in _structs(k) for f in s.fields if f.encode_name == key]
    return [field.encode_name for k in kinds for struct in _structs(k) for field in struct.fields]


def _structs(kind: msgspec.inspect.Type) -> list[msgspec.inspect.StructType]:
    """Return the structs in a type: the type itself, the members of a union or the items of a list."""
    if isinstance(kind, msgspec.inspect.StructType):
        return [kind]
    inner = getattr(kind, "types", None) or [item for item in [getattr(kind, "item_type", None)] if item]
    return [struct for member in inner for struct in _structs(member)]


def to_json(struct: Any) -> bytes:
    """Encode a struct as indented JSON with a trailing newline."""
    return msgspec.json.format(msgspec.json.encode(struct), indent=2) + b"\n"


def to_yaml(struct: Any, *, short_lists_inline: bool = False) -> str:
    """Encode a struct as YAML, with keys in field order.

    Args:
        short_lists_inline: write lists and objects that hold no others as `[…]` and `{…}`.
    """
    import yaml

    text: str = yaml.dump(
        msgspec.to_builtins(struct),
        Dumper=yaml_classes()[1],
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None if short_lists_inline else False,
    )
    return text


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file, or raise InputError if it cannot be read or is larger than a limit.

    The size of a regular file is checked before it is read; a device or a pipe is read up to the limit.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            is_regular = stat.S_ISREG(status.st_mode)
            too_large = is_regular and status.st_size > max_bytes
            content = b"" if too_large else file.read() if is_regular else file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Cannot read {path}: {reason}.{near_files(path)}", hint="check the path") from error
    if too_large or len(content) > max_bytes:
        raise InputError(f"{path} is larger than the {max_bytes:,} bytes that such a file may have.")
    return content


def read_text_limited(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the content of a UTF-8 text file; raise InputError as `read_limited`, or if it is not UTF-8."""
    try:
        return read_limited(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.", hint="save it as UTF-8"
        ) from error


# /data, ./data, ../data, ~/data, C:\data and \\server\data; not a/b, which may be words.
_ROOTED = re.compile(r"(\.{0,2}|~)/|\.{1,2}\\|[A-Za-z]:[\\/]|\\\\")
_NAME_WITH_SUFFIX = re.compile(r"\S{1,255}\.\w{1,5}")


def looks_like_path(text: str, *, suffixes: Collection[str]) -> bool:
    """Return whether a text that could also be words was probably meant as a path.

    It was if it begins like one, ends in one of `suffixes`, has a / after the name of an existing folder, or is one
    word with a suffix that is close to the name of an existing file.
    """
    folder, slash, _ = text.rpartition("/")
    return bool(
        _ROOTED.match(text)
        or text.lower().endswith(tuple(suffixes))
        or (slash and _exists(Path(folder), Path.is_dir))
        or (_NAME_WITH_SUFFIX.fullmatch(text) and near_files(Path(text)))
    )


def near_files(path: Path) -> str:
    """Return ` Did you mean …?` with the files in the folder of a missing file whose names are close to its own."""
    if not _exists(path.parent, Path.is_dir):
        return ""
    prefix = "" if path.parent == Path() else f"{path.parent}{os.sep}"
    names = [file.name for file in path.parent.iterdir() if not file.name.startswith(".")]
    return near_matches(path.name, names, prefix=prefix)


def _exists(path: Path, predicate: Callable[[Path], bool]) -> bool:
    """Return predicate(path), or False for what cannot be a path, such as a text that is too long or has a NUL."""
    try:
        return predicate(path)
    except (OSError, ValueError):
        return False


def now_in(folder: Path) -> float:
    """Return the time by the clock that gives the files in a folder their times, in seconds as `time.time`.

    That of a shared folder is its server's, from which this machine's may differ by any amount.

    Raises:
        OSError: nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def cache_home() -> Path:
    """Return $CLIP_RD_EDGE_CACHE, or else `clip-rd-edge` in the user's cache folder; it may not exist yet."""
    override = os.environ.get("CLIP_RD_EDGE_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "clip-rd-edge"


_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_path(name: str) -> Path:
    """Return the location of a shipped file or folder, given by its path in the repository.

    Args:
        name: such as `benchmarks/suites/quickstart.yaml`.

    Raises:
        InputError: no such file or folder is shipped.
    """
    for root in (_PACKAGE / "_shipped", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise InputError(f"clip-rd-edge does not ship {name!r}.")
