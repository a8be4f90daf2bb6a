"""WebDataset shards, read at random: a tar is looked through once, and from then on every sample is found by its place.

A sample is what lies side by side under one name up to its first dot, as in webdataset and open_clip: `000012.jpg`,
`000012.txt`, `000012.json`. Of each, the index keeps where its picture, text, JSON and class lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.io import cache_home, write_bytes

Kind = Literal["picture", "text", "json", "class"]
_KINDS: dict[str, int] = {"jpg": 0, "jpeg": 0, "png": 0, "webp": 0, "txt": 1, "json": 2, "cls": 3}
_COLUMNS: dict[Kind, int] = {"picture": 0, "text": 1, "json": 2, "class": 3}
_SUFFIXES: dict[Kind, str] = {"picture": "", "text": ".txt", "json": ".json", "class": ".cls"}
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_META = re.compile(r"(?:.*/)?__[^/]*__(?:/|$|\.)")  # webdataset's own notes
_INDEX_FORMAT = "1"  # raise when the same tar would be indexed differently
_BLOCK = 512
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what a damaged cached index may raise


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in an uncompressed tar; it satisfies `contract.images.ImageFile`."""

    shard: Path
    name: str
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Its content. The tar is opened anew each time: 10 µs, and nothing that worker processes could share."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.size:,} bytes were expected and {len(content):,} are there")
        return content

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"


@dataclass(frozen=True)
class Shard:
    """The G samples of a tar.

    Attributes:
        names: of each sample up to its first dot, (G,), UTF-8.
        places: offset and size in bytes of picture, text, JSON and class, (G, 4, 2); offset -1 where there is none.
        damage: where the tar is damaged and was read no further, or empty.
    """

    path: Path
    names: npt.NDArray[np.bytes_]
    places: npt.NDArray[np.int64]
    damage: str

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """What a sample is called in the tar."""
        return bytes(self.names[index]).decode(errors="replace")

    def has(self, kind: Kind) -> npt.NDArray[np.bool_]:
        """Which samples have one, (G,)."""
        there: npt.NDArray[np.bool_] = self.places[:, _COLUMNS[kind], 0] >= 0
        return there

    def member(self, index: int, kind: Kind) -> TarMember | None:
        """A sample's picture, text, JSON or class, or None where it has none."""
        offset, size = self.places[index, _COLUMNS[kind]].tolist()
        if offset < 0:
            return None
        return TarMember(self.path, self.name(index) + _SUFFIXES[kind], offset, size)


def open_shard(path: Path) -> Shard:
    """A shard's index: from the cache where the tar is as it was (path, size, time of change), else made now.

    Raises:
        InputError: no such file, or not an uncompressed tar.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"Cannot read the shard {path}: {error.strerror or error}.") from error
    identity = f"{_INDEX_FORMAT}\n{path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}"
    cached = cache_home() / "shards" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    # Whatever is wrong with a cached index, it can be made again.
    with contextlib.suppress(*_DAMAGED), np.load(io.BytesIO(cached.read_bytes()), allow_pickle=False) as index:
        return Shard(path, index["names"], index["places"], str(index["damage"]))
    shard = _look_through(path)
    buffer = io.BytesIO()
    np.savez(buffer, names=shard.names, places=shard.places, damage=np.asarray(shard.damage))
    with contextlib.suppress(OSError):  # a full or read-only cache costs time, no more
        write_bytes(cached, buffer.getvalue())
    return shard


def _look_through(path: Path) -> Shard:
    names: list[bytes] = []
    places: list[list[tuple[int, int]]] = []
    damage = ""
    suffixes: set[str] = set()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in _members(archive):
                found = None if _META.match(member.name) else _NAME.fullmatch(member.name)
                if not member.isreg() or found is None:
                    continue
                name, suffix = found[1].encode(errors="surrogateescape"), found[2].lower()
                # A suffix for the second time begins a sample: names are unique within a tar only, and tars get joined.
                if not names or name != names[-1] or suffix in suffixes:
                    names.append(name)
                    places.append([(-1, 0)] * len(_COLUMNS))
                    suffixes = set()
                suffixes.add(suffix)
                column = _KINDS.get(suffix)
                if column is not None and places[-1][column][0] < 0:
                    places[-1][column] = (member.offset_data, member.size)
            damage = _damage(archive, path)
    except OSError as error:
        raise InputError(f"Cannot read the shard {path}: {error.strerror or error}.") from error
    except tarfile.TarError as error:
        if not names:
            raise InputError(
                f"{path} is not an uncompressed tar: {error}.", hint="shards are read at random: unpack .tar.gz first"
            ) from error
        damage = f"the tar ends or is damaged in or after {names.pop().decode(errors='replace')}"
        places.pop()
    return Shard(
        path,
        np.asarray(names, dtype=np.bytes_),
        np.asarray(places, dtype=np.int64).reshape(len(names), len(_COLUMNS), 2),
        damage,
    )


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all it has seen
        yield member


def _damage(archive: tarfile.TarFile, path: Path) -> str:
    """tarfile takes a damaged header for the end: what stands there tells it from a real one, which is zeros."""
    with path.open("rb") as file:
        file.seek(archive.offset)
        return f"the tar is damaged at byte {archive.offset:,}" if any(file.read(_BLOCK)) else ""
