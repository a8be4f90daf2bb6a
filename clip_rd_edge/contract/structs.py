"""YAML and JSON files read into typed structs, with errors that name file, key and what was expected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clip_rd_edge.errors import ConfigError, InputError, near_matches

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
