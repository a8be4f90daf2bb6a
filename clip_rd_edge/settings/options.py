"""One declaration of an option: the field of a struct, which the command line and Python take under one name.

    class Search(Settings, frozen=True):
        index: Annotated[AnyPath, argument("Folder of the index.", path=True)]
        top: Annotated[int, option("Number of images.", group="Query", metavar="N", ge=1)] = 10

    @keywords_of(Search)
    def search(request: Search) -> Hits: ...

`search` then takes the fields as arguments, which type checkers see, too; `cli.options.command_of` makes flags of them.
A text that names another option writes it in braces, as in "requires {views}": each front end spells it its own way.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import msgspec
from msgspec import NODEFAULT, Meta

from clip_rd_edge.errors import UsageError, near_matches, require_known_options
from clip_rd_edge.utils.paths import AnyPath, require_paths
from clip_rd_edge.utils.structs import CheckedError, check_numbers

if TYPE_CHECKING:
    from typing_extensions import Unpack

P = ParamSpec("P")
S = TypeVar("S", bound="Settings")
R = TypeVar("R")
Resume = Literal["same", "content", "free"]
_PATH_TYPES = frozenset(get_args(AnyPath))


class Details(TypedDict, total=False):
    """What few options need.

    Keys:
        flags: of the command line. Default: the name of the field, with hyphens.
        many: one flag takes all values up to the next flag.
        path: the value names a file or a folder, and nothing else.
        complete: what the shell completes it by: a key of `cli.options.COMPLETIONS`, or names joined by `|`.
        common: `--help` lists it; where no option of a command is common, all are listed.
        also: another name for this option, in errors that several commands share.
        resume: what must stay when a run is resumed: the `same` value, only the `content` of what it names, or nothing
            (`free`).
        ge, gt, le, lt: limits of a number.
    """

    flags: Sequence[str]
    many: bool
    path: bool
    complete: str
    common: bool
    also: str
    resume: Resume
    ge: float
    gt: float
    le: float
    lt: float


_LIMITS = ("ge", "gt", "le", "lt")


def option(text: str, *, group: str, metavar: str = "", default: str = "", **details: Unpack[Details]) -> Meta:
    """Describe a field as an option.

    Args:
        text: what it does, in a sentence or two.
        group: the heading in `--help` that it stands under.
        metavar: what stands for its value in `--help`.
        default: what holds without it, in words, where the field's default does not show it.
    """
    given: dict[str, Any] = {"group": group, "metavar": metavar, "default": default, **details}
    limits = {name: given.pop(name) for name in _LIMITS if name in given}
    return Meta(description=text, extra={**_PLAIN, **given}, **limits)


_PLAIN = {
    "flags": (),
    "many": False,
    "path": False,
    "complete": "",
    "common": False,
    "also": "",
    "resume": "same",
}


def argument(text: str, *, metavar: str = "", path: bool = False, complete: str = "") -> Meta:
    """Describe a field as an argument: the command line takes it by its place."""
    extra = {"argument": True, "metavar": metavar, "path": path, "complete": complete}
    return Meta(description=text, extra=extra)


class Declared(NamedTuple):
    """A field that is an option or an argument.

    Attributes:
        kind: `int`, `float`, `bool`, `str`, or the choices of a `Literal`.
        several: whether it takes several values.
        default: NODEFAULT if it must be given.
        limits: `ge`, `gt`, `le` and `lt`, where they are set.
    """

    name: str
    text: str
    kind: type | tuple[str, ...]
    several: bool
    default: Any
    limits: Mapping[str, float]
    extra: Mapping[str, Any]

    @property
    def is_argument(self) -> bool:
        """Whether the command line takes it by its place."""
        return bool(self.extra.get("argument"))


class Settings(msgspec.Struct, frozen=True):
    """Base class of what is asked for: numbers are within their limits, choices exist, paths are paths."""

    def __post_init__(self) -> None:
        for name, kind in _numbers(type(self)).items():
            try:
                check_numbers(name, getattr(self, name), kind)
            except CheckedError as error:
                raise UsageError(f"{error}.", option=name) from error
        for name, (choices, takes_path, is_optional) in _checks(type(self)).items():
            value = getattr(self, name)
            if choices and value not in choices:
                if takes_path and isinstance(value, str | os.PathLike | int | float):
                    continue
                near = near_matches(value, map(str, choices)) if isinstance(value, str) else ""
                known = ", ".join(str(choice) for choice in choices if choice is not None)
                raise UsageError(f"{name} is {value!r}; expected one of {known}.{near}", option=name)
            if takes_path and not choices and not (value is None and is_optional):
                require_paths(name, value)


@functools.cache
def _numbers(settings: type[Settings]) -> Mapping[str, Any]:
    types = {field.name: field.type for field in msgspec.structs.fields(settings)}
    numeric = [entry for entry in declared(settings) if entry.kind in (int, float) and not entry.several]
    return {entry.name: types[entry.name] for entry in numeric}


@functools.cache
def _checks(settings: type[Settings]) -> Mapping[str, tuple[tuple[Any, ...], bool, bool]]:
    """Return the choices of fields, whether they take paths, and whether they may be None."""
    found: dict[str, tuple[tuple[Any, ...], bool, bool]] = {}
    for field in msgspec.structs.fields(settings):  # unlike type hints, with the types of a generic struct
        name, members = field.name, _members(field.type)
        choices = tuple(choice for member in members if get_origin(member) is Literal for choice in get_args(member))
        others = [member for member in members if get_origin(member) is not Literal and member is not type(None)]
        is_optional = type(None) in members
        if choices:
            found[name] = ((*choices, None) if is_optional else choices, bool(others), is_optional)
        elif Any not in members and any(member in _PATH_TYPES - {str} for member in members):
            found[name] = ((), True, is_optional)
    return found


def keywords_of(settings: Callable[P, S]) -> Callable[[Callable[[S], R]], Callable[P, R]]:
    """Let a function of a struct be called with the struct's fields."""
    fields = signature(settings)
    parameters = fields.parameters

    def decorate(function: Callable[[S], R]) -> Callable[P, R]:
        command = function.__name__

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            require_known_options(kwargs, parameters, command=command)
            return function(settings(*args, **kwargs))

        call.__signature__ = fields  # type: ignore[attr-defined]
        call.settings = settings  # type: ignore[attr-defined]
        return call

    return decorate


def declared(settings: type[Settings]) -> Iterator[Declared]:
    """Yield the options and arguments of a struct, in its order; other fields, such as a reporter, are left out."""
    for field in msgspec.structs.fields(settings):
        for meta in _metas(field.type):
            if meta.extra is not None:
                kind, several = _kind(field.type)
                limits = {name: value for name in _LIMITS if (value := getattr(meta, name)) is not None}
                default = field.default if field.default_factory is NODEFAULT else field.default_factory()
                yield Declared(field.name, meta.description or "", kind, several, default, limits, meta.extra)


def _metas(annotation: Any) -> list[Meta]:
    if get_origin(annotation) is Annotated:
        inner, *metas = get_args(annotation)
        return [*(meta for meta in metas if isinstance(meta, Meta)), *_metas(inner)]
    if get_origin(annotation) in (Union, UnionType):
        return [meta for member in get_args(annotation) for meta in _metas(member)]
    return []


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union, or the type itself, without annotations and type aliases."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _members(member)]
    return [annotation]


def _kind(annotation: Any) -> tuple[type | tuple[str, ...], bool]:
    members = [member for member in _members(annotation) if member is not type(None)]
    several = any(get_origin(member) in (tuple, Sequence, list) or getattr(get_origin(member), "__name__", "") in
                  ("Sequence", "Iterable") for member in members)  # fmt: skip
    choices = tuple(choice for member in members if get_origin(member) is Literal for choice in get_args(member))
    if choices:
        return choices if len(members) == 1 else str, several
    for kind in (bool, int, float):
        if kind in members:
            return kind, several
    return str, several
