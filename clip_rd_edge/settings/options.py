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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Meta

from clip_rd_edge.errors import UsageError, near_matches, require_known_options
from clip_rd_edge.utils.paths import AnyPath, require_paths
from clip_rd_edge.utils.structs import CheckedError, check_numbers
from clip_rd_edge.utils.text import SILENT, Reporter

P = ParamSpec("P")
S = TypeVar("S", bound="Settings")
R = TypeVar("R")
_LIMITS = ("ge", "gt", "le", "lt")
_PATH_TYPES = {kind for kind in get_args(AnyPath) if kind is not str}


class Option(NamedTuple):
    """What is declared of an option beside its text and its limits.

    Attributes:
        group: the heading in `--help` that it stands under.
        metavar: what stands for its value in `--help`.
        default: what holds without it, in words, where the field's default does not show it.
        flags: of the command line. Default: the name of the field, with hyphens.
        many: one flag takes all values up to the next flag.
        path: the value names a file or a folder, and nothing else.
        complete: what the shell completes it by: a key of `cli.options.COMPLETIONS`, or names joined by `|`.
        common: `--help` lists it; where no option of a command is common, all are listed.
        also: another name for this option, in errors that several commands share.
        resume: what must stay when a run is resumed: the `same` value, only the `content` of what it names, or nothing
            (`free`).
        is_argument: the command line takes it by its place.
    """

    group: str = ""
    metavar: str = ""
    default: str = ""
    flags: Sequence[str] = ()
    many: bool = False
    path: bool = False
    complete: str = ""
    common: bool = False
    also: str = ""
    resume: Literal["same", "content", "free"] = "same"
    is_argument: bool = False


def option(text: str, **details: Any) -> Meta:
    """Describe a field as an option, in a sentence or two.

    Args:
        details: fields of `Option`, and `ge`, `gt`, `le` and `lt`, limits of a number.
    """
    limits = {name: details.pop(name) for name in _LIMITS if name in details}
    return Meta(description=text, extra={"option": Option(**details)}, **limits)


def output_to(text: str, *, metavar: str = "FOLDER", **details: Any) -> Meta:
    """Describe a field as the option of what is written."""
    return option(text, group="Output", flags=("-o", "--output"), metavar=metavar, path=True, **details)


argument = functools.partial(option, is_argument=True)


class Declared(NamedTuple):
    """A field that is an option or an argument.

    Attributes:
        annotation: its type as it was declared.
        choices: of the `Literal` in it.
        others: the other types that it may have.
        is_optional: whether it may be None.
        kind: `int`, `float`, `bool`, `str`, or the choices where there is nothing else.
        several: whether it takes several values.
        default: NODEFAULT if it must be given.
        limits: `ge`, `gt`, `le` and `lt`, where they are set.
    """

    name: str
    text: str
    annotation: Any
    choices: tuple[str, ...]
    others: Sequence[Any]
    is_optional: bool
    kind: type | tuple[str, ...]
    several: bool
    default: Any
    limits: Mapping[str, float]
    option: Option

    def require(self, value: Any) -> None:
        """Raise UsageError if the field cannot have a value."""
        if self.kind in (int, float) and not self.several:
            try:
                check_numbers(self.name, value, self.annotation)
            except CheckedError as error:
                raise UsageError(f"{error}.", option=self.name) from error
        elif value is None and self.is_optional:
            return
        elif self.choices:
            if value not in self.choices and not (self.others and isinstance(value, str | os.PathLike | int | float)):
                near = near_matches(value, self.choices) if isinstance(value, str) else ""
                known = ", ".join(self.choices)
                raise UsageError(f"{self.name} is {value!r}; expected one of {known}.{near}", option=self.name)
        elif Any not in self.others and any(kind in _PATH_TYPES for kind in self.others):
            require_paths(self.name, value)


class Settings(msgspec.Struct, frozen=True):
    """Base class of what is asked for: numbers are within their limits, choices exist, paths are paths."""

    def __post_init__(self) -> None:
        for entry in declared(type(self)):
            entry.require(getattr(self, entry.name))


class Reported(Settings, frozen=True, kw_only=True):
    """Base class of what takes a while."""

    reporter: Reporter = SILENT


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


@functools.cache
def declared(settings: type[Settings]) -> tuple[Declared, ...]:
    """Return the options and arguments of a struct, in its order; other fields, such as a reporter, are left out."""
    return tuple(_declared(settings))


def _declared(settings: type[Settings]) -> Iterator[Declared]:
    for field in msgspec.structs.fields(settings):  # unlike type hints, with the types of a generic struct
        for meta in _metas(field.type):
            if meta.extra is not None:
                members = _members(field.type)
                literals = [member for member in members if get_origin(member) is Literal]
                choices = tuple(choice for literal in literals for choice in get_args(literal))
                others = [member for member in members if member not in (*literals, type(None))]
                kinds = [] if choices else [kind for kind in (bool, int, float) if kind in others]
                yield Declared(
                    name=field.name,
                    text=meta.description or "",
                    annotation=field.type,
                    choices=choices,
                    others=others,
                    is_optional=type(None) in members,
                    kind=choices if choices and not others else next(iter(kinds), str),
                    several=any(get_origin(member) in (tuple, list, Sequence, Iterable) for member in others),
                    default=field.default if field.default_factory is NODEFAULT else field.default_factory(),
                    limits={name: value for name in _LIMITS if (value := getattr(meta, name)) is not None},
                    option=meta.extra["option"],
                )


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
