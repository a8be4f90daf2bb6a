"""YAML and JSON as typed structs: a wrong key or type is a sentence that names file and key."""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import msgspec
from msgspec import Meta

from clip_rd_edge.errors import ConfigError, InputError, in_one_line, near_matches
from clip_rd_edge.utils.files import MAX_TEXT_BYTES, read_limited
from clip_rd_edge.utils.paths import Recorded
from clip_rd_edge.utils.text import as_unicode, each_text

if TYPE_CHECKING:
    import yaml

# Results and indexes of millions of images are below this, and whatever is larger would take gigabytes of memory.
MAX_JSON_BYTES = 1 << 30
_COMMENT_WIDTH = 80  # columns, as many as a terminal has at least
_ATTRIBUTE = re.compile(r"( *)(\w+(?:, \w+)*): (.+)")


T = TypeVar("T")


def read_yaml(path: Path, kind: type[T]) -> T:
    """Read a YAML file into a struct, refusing unknown keys and wrong types."""
    raw = parse_yaml(read_limited(path, MAX_TEXT_BYTES), source=path)
    return convert(raw if raw is not None else {}, kind, source=str(path))


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON file into a struct; raises the same errors as `read_yaml`."""
    # Editors on Windows put a byte order mark before what is UTF-8.
    return _decode_json(read_limited(path, MAX_JSON_BYTES).removeprefix(BOM_UTF8), kind, source=path)


def _decode_json(content: bytes, kind: type[T], *, source: Path, hint: str = "") -> T:
    with _named(str(source), kind, hint):
        return msgspec.json.decode(content, type=kind, dec_hook=_recorded)


@contextmanager
def _named(source: str, kind: Any, hint: str = "") -> Iterator[None]:
    """Within the block, an error of msgspec, which decodes a `kind`, becomes a ConfigError that names the source."""
    try:
        yield
    except msgspec.ValidationError as error:
        unknown = re.search("unknown field `(.*?)`", str(error))
        near = near_matches(unknown[1], _keys(kind)) if unknown else ""
        raise ConfigError(f"{source} is invalid: {str(error).rstrip('.')}.{near}", hint=hint) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid JSON: {in_one_line(error)}.", hint=hint) from error


def _keys(kind: Any) -> Iterator[str]:
    """Yield the keys of a struct and of those in it."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for field in msgspec.structs.fields(kind):
            yield field.encode_name
            yield from _keys(field.type)
    for inner in get_args(kind):
        yield from _keys(inner)


class UnknownFieldError(InputError):
    """A client sent a field that its request does not have."""


def decode_request(body: bytes, kind: type[T], *, strict: bool = True) -> T:
    """Decode JSON that a client sent; without `strict`, numbers may be texts, as in a form."""
    try:
        with _named("The request", kind):
            return msgspec.json.decode(body, type=kind, strict=strict)
    except ConfigError as error:
        raised = UnknownFieldError if "unknown field" in str(error) else InputError
        raise raised(str(error)) from error


def read_versioned_json(
    path: Path,
    kind: type[T],
    *,
    newest: int,
    key: str = "format_version",
    max_bytes: int = MAX_JSON_BYTES,
    hint: str = "",
) -> T:
    """Read a JSON file with the version of its format into a struct.

    Args:
        newest: latest supported format version.
        key: what the file calls its version.
        max_bytes: limit on the size of the file.
    """
    content = read_limited(path, max_bytes)
    header = msgspec.defstruct("Header", [(key, int)])
    (version,) = msgspec.structs.astuple(_decode_json(content, header, source=path, hint=hint))
    if version > newest:
        raise ConfigError(
            f"{path} has format version {version}; this clip-rd-edge reads up to {newest}.",
            hint="install a newer clip-rd-edge",
        )
    return _decode_json(content, kind, source=path, hint=hint)


def convert(raw: Any, kind: type[T], *, source: str) -> T:
    """Convert plain dicts and lists to a struct; raise ConfigError naming `source` and the key if they do not match."""
    with _named(source, kind):
        return msgspec.convert(raw, kind, strict=True, dec_hook=_recorded)


def _recorded(kind: type[Any], value: Any) -> Any:
    """Return a value of a type that msgspec lacks: a text, or several, that is not to be opened."""
    if issubclass(kind, dict):  # which checks its own keys and values
        return kind(value)
    texts = value if isinstance(value, list) else [value]
    if kind is Recorded and all(isinstance(text, str) for text in texts):
        return Recorded(value)
    raise ValueError(f"Expected `str`, got `{type(value).__name__}`")


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
    """Encode a struct as YAML, with keys in field order, and if asked to with short lists and objects in one line."""
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
    """Return a struct as YAML in which each key is preceded by its description in the docstring.

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


PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
_INT64 = 2**63
_MAX_DIGITS = 10
_LIST_OF_TEXTS = re.compile(r"""\[\s*(?:(["'])(?:\\.|(?!\1)[^\\])*\1[\s,]*)*\]""", re.DOTALL)


def is_natural(text: str) -> bool:
    """Return whether a text is a natural number below a billion: Python refuses to read those of very many digits."""
    return text.isdecimal() and len(text) < _MAX_DIGITS


def is_list_of_texts(text: str) -> bool:
    """Return whether a text without white space around it is a list of texts, as JSON, Python or NumPy write it.

    Such as `['a dog', 'two dogs']`: a table of lists has that in its cells when it is saved as CSV.
    """
    return text.startswith("[") and _LIST_OF_TEXTS.fullmatch(text) is not None


class CheckedError(ConfigError, ValueError):
    """A field has a value that is not allowed. As a ValueError, msgspec adds the field's location in the file to it."""


class CheckedStruct(msgspec.Struct, frozen=True):
    """Base class of structs whose numbers must be finite and within the limits of their annotations.

    msgspec checks neither NaN nor what Python code passes. Integers must fit into 64 bits, as whatever they are passed
    on to expects.
    """

    def __post_init__(self) -> None:
        for name, kind in _numeric_fields(type(self)).items():
            check_numbers(name, getattr(self, name), kind)


@cache
def _numeric_fields(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(struct) if _has_numbers(field.type)}


def _has_numbers(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_has_numbers, get_args(annotation)))


def check_numbers(name: str, value: Any, kind: Any) -> None:
    """Raise CheckedError if a value is not of its type, or has numbers that are not finite or exceed 64 bits."""
    try:
        msgspec.convert(msgspec.to_builtins(value, enc_hook=float), kind)  # float: for a number of NumPy
    except (TypeError, ValueError) as error:
        reason = str(error).partition(" - at ")[0].replace("`", "")
        raise CheckedError(f"{name} is {value!r}; {reason[:1].lower()}{reason[1:]}") from error
    if not all(abs(number) < (_INT64 if isinstance(number, int) else math.inf) for number in _numbers(value)):
        raise CheckedError(f"{name} is {value!r}; expected finite numbers of at most 64 bits")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value


MAX_YAML_BYTES = 1_000_000  # a file is read at some 100 kB/s; a suite of a hundred rows has 10 kB
MAX_VALUES = 1_000_000  # in a file, each as often as aliases repeat it: nine lines can stand for a billion


def parse_yaml(content: bytes | str, *, source: Path) -> Any:
    """Return the content of a YAML file as plain Python objects."""
    try:
        if len(content) > MAX_YAML_BYTES:
            raise ValueError(f"it has more than {MAX_YAML_BYTES:,} bytes; a list of labels may be a text or JSON file")
        loader = yaml_classes()[0](content)
        node = loader.get_single_node()
        if _count_values(node, {}) > MAX_VALUES:
            raise ValueError(f"its aliases (*name) stand for more than {MAX_VALUES:,} values, or for themselves")
        return None if node is None else loader.construct_document(node)
    except Exception as error:  # PyYAML ends with any error, such as for `!!int ''` or the date 2001-99-99
        raise ConfigError(
            f"{source} is not valid YAML: {in_one_line(error)}.",
            hint="compare it with a valid file: clip-rd-edge recipe clip-rd, or clip-rd-edge benchmark --init",
        ) from error


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """Return the number of values in a node, above the limit for one that is in itself; refuse halves of characters."""
    if node is not None and id(node) not in counts:
        counts[id(node)] = MAX_VALUES + 1
        value = node.value
        if isinstance(value, str):
            value.encode()
            value = []
        children = (child for part in value for child in (part if isinstance(part, tuple) else (part,)))
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts.get(id(node), 0)


# As in YAML 1.2 and JSON. PyYAML follows YAML 1.1, where 1e-3 is a text: it has neither a point nor a signed exponent.
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)$")


@cache
def yaml_classes() -> tuple[type[yaml.SafeLoader], type[yaml.SafeDumper]]:
    """Return PyYAML's safe loader and dumper with numbers such as 1e-3."""
    import yaml  # takes 20 ms to import, and running a bundle does not need it

    class Loader(yaml.SafeLoader):
        def construct_yaml_float(self, node: Any) -> float:
            number: float = super().construct_yaml_float(node)
            # 1e4 may stand where an integer is expected; an integer is accepted wherever a float is.
            return int(number) if "e" in node.value.lower() and number.is_integer() else number

    Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_yaml_float)

    class Dumper(yaml.SafeDumper):
        pass

    for kind in (Loader, Dumper):  # the dumper quotes texts that would be read as numbers
        kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return Loader, Dumper
