"""The formats of a bundle: what writes each, what runs it, and what an ONNX file refers to outside itself.

A converter (an `exporting.formats.Format`) and an encoder (a `runtime.encoder.BundleEncoder`) are named as
`module:class` and imported when they are used, because each needs packages of its own. Another package adds a format by
an entry point of the group `clip_rd_edge.formats`, with the format's name, that leads to a FormatInfo.
"""

from __future__ import annotations

import importlib
import mmap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clip_rd_edge.errors import ConfigError, UsageError, near_matches

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

EXTERNAL_DATA_SUFFIX = ".data"  # added to the name of an ONNX file whose weights are in a file of their own
GROUP = "clip_rd_edge.formats"
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Runtime = Literal["onnxruntime", "openvino", "tensorrt", "litert", "executorch", "coreml"]
_CONVERTERS, _ENCODERS = "clip_rd_edge.exporting.formats", "clip_rd_edge.runtime.backends"


@dataclass(frozen=True, kw_only=True)
class FormatInfo:
    """One format.

    Attributes:
        title: its name in messages.
        precisions: those that it supports; the first is the default.
        runtime: runs it, and is the first word of a manifest's target, which may add a device after a space.
        converter: writes a bundle in it.
        encoder: runs a bundle in it.
        extras: the extras of this package that it needs, each with what it is for.
        aliases: other names that users give it.
        is_onnx: whether the towers' files are ONNX, which other runtimes run as well.
    """

    title: str
    precisions: tuple[Precision, ...]
    runtime: str
    converter: str
    encoder: str
    extras: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    is_onnx: bool = False


def _own(title: str, runtime: str, precisions: str, converter: str, encoder: str, **rest: Any) -> FormatInfo:
    kinds: Any = tuple(precisions.split())
    writes, runs = f"{_CONVERTERS}.{converter}", f"{_ENCODERS}.{encoder}"
    return FormatInfo(title=title, runtime=runtime, precisions=kinds, converter=writes, encoder=runs, **rest)


FORMATS: dict[str, FormatInfo] = {
    "onnx": _own(
        "ONNX", "onnxruntime", "fp32 fp16 int8", "onnx:Onnx", "onnxruntime:OrtEncoder", aliases=("onnxruntime",),
        is_onnx=True,
    ),
    "openvino": _own(
        "OpenVINO", "openvino", "fp32 bf16 int8", "openvino:OpenVino", "openvino:OpenVinoEncoder", is_onnx=True,
        extras={"openvino": "export --format openvino, and running its bundles"},
    ),
    "trt": _own(
        "TensorRT", "tensorrt", "fp32 fp16 int8", "tensorrt:TensorRt", "tensorrt:TensorRtEncoder",
        extras={"rtx": "export --format trt for RTX cards, and running the engines on them",
                "tensorrt": "running engines of the full TensorRT, which a Jetson has"},
        aliases=("tensorrt",), is_onnx=True,
    ),
    "litert": _own(
        "LiteRT", "litert", "fp32 fp16 int8", "litert:LiteRt", "one_input:LiteRtEncoder", aliases=("tflite",),
        extras={"litert": "running bundles of export --format litert", "litert-torch": "export --format litert"},
    ),
    "executorch": _own(
        "ExecuTorch", "executorch", "fp32 int8", "executorch:ExecuTorch", "one_input:ExecuTorchEncoder",
        extras={"executorch": "export --format executorch, and running its bundles"}, aliases=("pte",),
    ),
    "coreml": _own(
        "Core ML", "coreml", "fp32 fp16", "coreml:CoreMl", "one_input:CoreMlEncoder",
        extras={"coreml": "export --format coreml, and running its bundles on a Mac"}, aliases=("core-ml", "mlpackage"),
    ),
}  # fmt: skip


def format_named(name: str) -> FormatInfo:
    """Return the format of this name, of this package or of another one."""
    if name in FORMATS:
        return FORMATS[name]
    others = _others()
    if name in others:
        info: FormatInfo = others[name].load()
        return info
    known = [*FORMATS, *others]
    meant = next((f" Did you mean {key!r}?" for key, info in FORMATS.items() if name in info.aliases), "")
    raise UsageError(
        f"format is {name!r}; expected one of {', '.join(known)}.{meant or near_matches(str(name), known)}",
        option="format",
    )


def format_of(target: str) -> FormatInfo:
    """Return the format of a bundle by its manifest's target; ONNX for a target that no installed package has."""
    for info in FORMATS.values():  # a target `tensorrt-rtx sm89` is TensorRT's, too
        if target.startswith(info.runtime):
            return info
    loaded = (point.load() for point in _others().values())
    return next((info for info in loaded if target.split()[:1] == [info.runtime]), FORMATS["onnx"])


def encoder_of(runtime: str) -> Any:
    """Return the class that runs bundles in a runtime."""
    return import_named(format_of(runtime).encoder)


def _others() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # which takes a while, and few need it

    return {point.name: point for point in entry_points(group=GROUP)}


def import_named(reference: str) -> Any:
    """Return what a `module:name` refers to."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


# A device has no package `onnx`, and a runtime opens whatever file a tensor names: so a bundle's files are looked
# through before any runtime reads them. Of protobuf, this reads no more than the lengths of fields. It finds more than
# a runtime uses: also what a later field replaces or adds to, and tensors that nothing needs.
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
    value = 0
    for place in range(10):
        byte = content[start + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, start + place + 1
    return 1 << 70, start + 10
