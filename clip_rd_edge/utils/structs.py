"""YAML and JSON as typed structs: a wrong key or type is a sentence that names file and key."""

from __future__ import annotations

import inspect
import re
import textwrap
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clip_rd_edge.errors import ConfigError, InputError, near_matches
from clip_rd_edge.installation import upgrade_hint
from clip_rd_edge.utils.files import read_limited
from clip_rd_edge.utils.printable import as_unicode, each_text
from clip_rd_edge.utils.trust import Recorded
from clip_rd_edge.utils.yaml_text import MAX_YAML_BYTES, parse_yaml, yaml_classes

# Results and indexes of millions of images are below this, and whatever is larger would take gigabytes of memory.
MAX_JSON_BYTES = 1 << 30
_COMMENT_WIDTH = 80  # columns, as many as a terminal has at least
_ATTRIBUTE = re.compile(r"( *)(\w+(?:, \w+)*): (.+)")


T = TypeVar("T", bound=msgspec.Struct)


def read_yaml(path: Path, kind: type[T]) -> T:
    """Read a YAML file into a struct, refusing unknown keys and wrong types."""
    raw = parse_yaml(read_limited(path, MAX_YAML_BYTES), source=path)
    return convert(raw if raw is not None else {}, kind, source=str(path))


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file into a struct; raises the same errors as `read_yaml`."""
    return _decode_json(_read_json_text(path), kind, source=path)


def read_json_objects(path: Path) -> Any:
    """Return the content of a JSON file as dicts, lists, texts and numbers; raises the same errors as `read_yaml`."""
    return _json_objects(_read_json_text(path), path)


def _read_json_text(path: Path) -> bytes:
    # Editors on Windows put a byte order mark before what is UTF-8.
    return read_limited(path, MAX_JSON_BYTES).removeprefix(BOM_UTF8)


def _decode_json(content: bytes, kind: type[T], *, source: Path) -> T:
    try:
        return msgspec.json.decode(content, type=kind, dec_hook=_recorded)
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


class UnknownFieldError(InputError):
    """A client sent a field that its request does not have."""


def decode_request(body: bytes, kind: type[V]) -> V:
    """Decode JSON that a client sent."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        reason = str(error).rstrip(".")
        if "unknown field" in reason:
            suggestion, hint = _near_keys(reason, kind)
            raise UnknownFieldError(f"The request is invalid: {reason}.{suggestion}", hint=f"{hint}.") from error
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
    key: str = "format_version",
    upgrade: Callable[[bytes], bytes] | None = None,
    max_bytes: int = MAX_JSON_BYTES,
    foreign: tuple[str, ConfigError] | None = None,
) -> T:
    """Read a JSON file with the version of its format into a struct.

    Args:
        newest: latest supported format version.
        key: what the file calls its version.
        upgrade: rewrites the content of an older version to the newest one's keys.
        max_bytes: limit on the size of the file.
        foreign: a key that only another kind of file has, and the error for such a file.
    """
    content = read_limited(path, max_bytes)
    mark = foreign[0] if foreign else ""
    header = msgspec.defstruct("Header", [(key, int), ("mark", msgspec.Raw, msgspec.Raw())], rename={"mark": mark})
    version, found = msgspec.structs.astuple(_decode_json(content, header, source=path))
    if foreign and bytes(found):
        raise foreign[1]
    if version > newest:
        raise ConfigError(
            f"{path} has format version {version}; this clip-rd-edge reads up to {newest}.",
            hint=upgrade_hint(),
        )
    if upgrade is not None and version < newest:
        content = upgrade(content)
    return _decode_json(content, kind, source=path)


def convert(raw: Any, kind: type[T], *, source: str) -> T:
    """Convert plain dicts and lists to a struct; raise ConfigError naming `source` and the key if they do not match."""
    try:
        return msgspec.convert(raw, kind, strict=True, dec_hook=_recorded)
    except msgspec.ValidationError as error:
        message = str(error)
        suggestion = hint = ""
        if "unknown field" in message:
            suggestion, hint = _near_keys(message, kind)
        raise ConfigError(f"{source} is invalid: {message}.{suggestion}", hint=hint) from error


def _recorded(kind: type[Any], value: Any) -> Any:
    """Return a value of a type that msgspec has not: a text, or several, that is not to be opened."""
    texts = value if isinstance(value, list) else [value]
    if kind is Recorded and all(isinstance(text, str) for text in texts):
        return Recorded(value)
    raise ValueError(f"Expected `str`, got `{type(value).__name__}`")


def _near_keys(message: str, kind: type[Any]) -> tuple[str, str]:
    """Return, for msgspec's message about an unknown field, the keys that are near it, and a hint with all keys."""
    unknown, *location = message.split("`")[1::2]
    keys = _keys_at(location[0] if location else "$", kind)
    return near_matches(unknown, keys), f"the keys there are {', '.join(dict.fromkeys(keys))}"


def _keys_at(location: str, kind: type[Any]) -> list[str]:
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
    """Encode a struct as indented JSON with a trailing newline, as `encode_json` does."""
    return msgspec.json.format(encode_json(struct), indent=2) + b"\n"


def encode_json(value: Any) -> bytes:
    """Encode structs, dicts and lists as JSON; bytes of a path that are not UTF-8 become escapes (`as_unicode`)."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(each_text(msgspec.to_builtins(value), as_unicode))


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


def commented_yaml(struct: msgspec.Struct) -> str:
    """Return a struct as YAML in which each key is preceded by what its docstring says about it.

    `read_yaml` reads it back as the same struct. A nested struct is commented, too; one in a list is not.
    """
    return "\n".join(_commented_lines(struct, indent="")) + "\n"


def _commented_lines(struct: msgspec.Struct, *, indent: str) -> list[str]:
    comments = attribute_comments(type(struct))
    lines: list[str] = []
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        if comment := comments.pop(field.name, ""):
            lines += comment_lines(comment, indent=indent)
        if isinstance(value, msgspec.Struct):
            lines += [f"{indent}{field.encode_name}:", *_commented_lines(value, indent=indent + "  ")]
        else:
            entry = to_yaml({field.encode_name: value}, short_lists_inline=isinstance(value, list | tuple))
            lines += [indent + line for line in entry.rstrip("\n").split("\n")]
    return lines


def comment_lines(text: str, *, indent: str = "") -> list[str]:
    """Return a text as the lines of a comment."""
    return textwrap.wrap(
        text, _COMMENT_WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
    )


def attribute_comments(kind: type[Any]) -> dict[str, str]:
    """Return the descriptions in the `Attributes:` of a docstring by name; one for several names is at the first."""
    comments: dict[str, str] = {}
    margin, name = None, ""
    _, _, block = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    for line in block.splitlines():
        entry = _ATTRIBUTE.fullmatch(line)
        if entry and (margin is None or entry[1] == margin):
            margin = entry[1]
            name, _, others = entry[2].partition(", ")
            comments[name] = f"{others and entry[2] + ': '}{entry[3]}"
        elif name:
            comments[name] += f" {line.strip()}"
    return {name: comment.replace("`", "").strip() for name, comment in comments.items()}
