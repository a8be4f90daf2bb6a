"""What an ONNX file refers to outside itself, read from its bytes: a device has no package `onnx`.

A runtime opens whatever file a tensor names, so a bundle's files are looked through before any runtime reads them. Of
protobuf, this reads no more than the lengths of fields. It finds more than a runtime uses: also what a later field
replaces or adds to, and tensors that nothing needs.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from clip_rd_edge.bundle.manifest import EXTERNAL_DATA_SUFFIX
from clip_rd_edge.errors import ConfigError

# By message, the numbers of the fields that lead to tensors and operators, and what they hold, as in onnx.proto.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 10: "own domain", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {4: "operator", 5: "attribute", 7: "domain"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external data"},
    "external data": {1: "key", 2: "value"},
}
_DOMAINS = {"", "ai.onnx", "com.microsoft"}  # of the operators that runtimes have by themselves
_READING_FILES = {"EPContext"}  # of those, the operators whose attributes name files
_MAX_NAME = 1_000  # bytes of a name or path that are looked at
_FIXED_SIZES = {1: 8, 5: 4}  # by the type of a field
_WITH_LENGTH = 2


def require_self_contained(path: Path) -> None:
    """Raise ConfigError if a file is not ONNX, or names other files than NAME.data or operators that runtimes lack."""
    if fault := _fault(path):
        raise ConfigError(f"{path} {fault}.", hint="export the bundle again, or do not use it if a stranger made it")


def _fault(path: Path) -> str:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = _names(content)
    except (ValueError, IndexError) as error:  # also of an empty file, which cannot be mapped
        return f"is not an ONNX file: {error}"
    own = path.name + EXTERNAL_DATA_SUFFIX
    if others := found["location"] - {own}:
        return f"has weights in {min(others)!r}; expected none outside {own}"
    foreign = found["domain"] - found["own domain"] - _DOMAINS or found["operator"] & _READING_FILES
    return f"has operators of {min(foreign)!r}, which no runtime may have" if foreign else ""


def _names(content: mmap.mmap) -> dict[str, set[str]]:
    """Return the operators, domains and locations of weights that a file names, or raise ValueError or IndexError."""
    found = defaultdict[str, set[str]](set)
    waiting = [("model", 0, len(content))]
    while waiting:
        message, start, end = waiting.pop()
        kinds, is_location = _FIELDS[message], False
        for number, first, last in _fields(content, start, end):
            kind = kinds.get(number)
            if kind in _FIELDS:
                waiting.append((kind, first, last))
            elif kind is not None:
                name = content[first : min(last, first + _MAX_NAME)].decode(errors="backslashreplace")
                is_location |= (kind, name) == ("key", "location")
                found[kind].add(name)
        values = found.pop("value", set())
        if is_location:
            found["location"] |= values
    return found


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number, start and end of each field of a message that has a length."""
    while start < end:
        tag, start = _varint(content, start)
        kind = tag & 7 if tag < 1 << 32 else None  # of larger ones, other readers drop the upper bits
        if kind == _WITH_LENGTH:
            length, start = _varint(content, start)
            yield tag >> 3, start, start + length
            start += length
        elif kind == 0:
            _, start = _varint(content, start)
        elif kind in _FIXED_SIZES:
            start += _FIXED_SIZES[kind]
        else:  # ONNX has no groups
            end = -1
    if start != end:
        raise ValueError(f"the field before byte {start:,} is damaged")


def _varint(content: mmap.mmap, start: int) -> tuple[int, int]:
    """Return a number of up to ten bytes, or one above all others, and the position after it."""
    value = content[start]
    if value < 128:
        return value, start + 1
    value &= 127
    for place in range(1, 10):
        byte = content[start + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, start + place + 1
    return 1 << 70, start + 10
