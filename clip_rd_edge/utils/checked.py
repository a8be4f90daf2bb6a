"""Structs whose numbers are checked: range and finiteness, however they are made, from a file or in Python.

msgspec checks the limits of `Annotated[float, Meta(ge=0)]` when it decodes a file, but not when Python code makes a
struct, and it accepts NaN and infinity where no limit excludes them. A `CheckedStruct` checks both in both cases.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta, inspect

from clip_rd_edge.errors import ConfigError

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

    Integers must fit into 64 bits, as whatever they are passed on to expects.
    """

    def __post_init__(self) -> None:
        for name, kind in _numeric_fields(type(self)):
            _check(name, getattr(self, name), kind)


@functools.cache
def _numeric_fields(struct: type[msgspec.Struct]) -> tuple[tuple[str, inspect.Type], ...]:
    """Return the fields that hold numbers, alone or in containers, with their types."""
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    return tuple((field.name, field.type) for field in info.fields if _has_numbers(field.type))


def _members(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    if isinstance(kind, inspect.UnionType):
        return tuple(kind.types)
    if isinstance(kind, inspect.TupleType):
        return tuple(kind.item_types)
    if isinstance(kind, inspect.VarTupleType | inspect.ListType):
        return (kind.item_type,)
    if isinstance(kind, inspect.DictType):
        return (kind.value_type,)
    return ()


def _has_numbers(kind: inspect.Type) -> bool:
    return isinstance(kind, inspect.IntType | inspect.FloatType) or any(map(_has_numbers, _members(kind)))


def _check(name: str, value: Any, kind: inspect.Type) -> None:
    if isinstance(kind, inspect.UnionType):
        numbers = [member for member in kind.types if _has_numbers(member)]
        is_number = isinstance(value, int | float | list | tuple | dict) and not isinstance(value, bool)
        is_optional = all(_has_numbers(member) or isinstance(member, inspect.NoneType) for member in kind.types)
        if len(numbers) == 1 and (is_number or (is_optional and value is not None)):
            _check(name, value, numbers[0])
    elif isinstance(kind, inspect.IntType | inspect.FloatType):
        check_number(name, value, kind)
    elif isinstance(kind, inspect.TupleType):
        if not isinstance(value, list | tuple) or len(value) != len(kind.item_types):
            raise CheckedError(f"{name} is {value!r}; expected {len(kind.item_types)} numbers")
        for item, member in zip(value, kind.item_types, strict=True):
            _check(name, item, member)
    elif isinstance(kind, inspect.DictType):
        for key, item in value.items():
            _check(f"{name}[{key!r}]", item, kind.value_type)
    else:
        for item in value:
            _check(name, item, *_members(kind))


def check_number(name: str, value: Any, kind: inspect.IntType | inspect.FloatType) -> None:
    """Raise CheckedError if a value is not a finite number within the limits of its kind."""
    valid = isinstance(value, int) or (isinstance(kind, inspect.FloatType) and isinstance(value, float))
    if isinstance(value, int):
        valid = abs(value) < _INT64
    if not (
        valid
        and math.isfinite(value)
        and (kind.ge is None or value >= kind.ge)
        and (kind.gt is None or value > kind.gt)
        and (kind.le is None or value <= kind.le)
        and (kind.lt is None or value < kind.lt)
    ):
        raise CheckedError(f"{name} is {value!r}; expected {_describe(kind)}")


def _describe(kind: inspect.IntType | inspect.FloatType) -> str:
    noun = "an integer" if isinstance(kind, inspect.IntType) else "a finite number"
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    limits = [f"{text} {getattr(kind, key):,}" for key, text in words.items() if getattr(kind, key) is not None]
    return f"{noun} {' and '.join(limits)}".rstrip()
