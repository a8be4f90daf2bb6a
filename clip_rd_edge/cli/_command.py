"""Commands whose options are declared in `settings`: see `settings.options`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from msgspec import NODEFAULT

from clip_rd_edge.cli._options import (
    GroupedCommand,
    GroupedOption,
    ManyOption,
    NameChoice,
    PathName,
    complete_data,
    complete_labels,
    complete_recipe,
    complete_student,
    complete_task,
    completed_by,
)
from clip_rd_edge.errors import spelled
from clip_rd_edge.settings.options import Declared, Settings, declared

COMPLETIONS = {
    "data": complete_data, "labels": complete_labels, "recipe": complete_recipe,
    "student": complete_student, "task": complete_task,
}  # fmt: skip


def command_of(
    settings: type[Settings], name: str, short_help: str | None = None, **types: Any
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function the command of a struct; it gets what differs from the defaults, by the names of Python.

    Parameters that only the command line has are added to the function by click's own decorators, and passed by name.

    Args:
        short_help: for the list of the commands of a group.
        types: of options whose values are neither numbers nor choices nor paths, by the name of the option.
    """
    parameters = sorted((_parameter(entry, types.get(entry.name)) for entry in declared(settings)), key=_place)

    def decorate(function: Callable[..., None]) -> click.Command:
        own: list[click.Parameter] = list(reversed(getattr(function, "__click_params__", [])))
        defaults = {entry.name: entry.default for entry in declared(settings)}
        names = {str(parameter.name) for parameter in parameters} - {parameter.name for parameter in own}

        def call(**values: Any) -> None:
            taken = {name: values.pop(name) for name in names}
            given = {name: value for name, value in taken.items() if value not in (None, (), defaults[name])}
            function(given, **values)

        kept = [parameter for parameter in parameters if parameter.name in names]
        return GroupedCommand(
            name, callback=call, params=sorted([*kept, *own], key=_place), help=function.__doc__, short_help=short_help
        )

    return decorate


_LAST_GROUPS = ("Device", "Cluster", "Output")


def _place(parameter: click.Parameter) -> int:
    """Return the key of an order in which arguments are first, and the groups that most commands have last."""
    group = getattr(parameter, "group", None)
    return -1 if group is None else 1 + _LAST_GROUPS.index(group) if group in _LAST_GROUPS else 0


def _parameter(entry: Declared, kind: click.ParamType | None) -> click.Parameter:  # type: ignore[type-arg]
    required = entry.default is NODEFAULT
    source = entry.extra["complete"]
    complete = COMPLETIONS.get(source) or (completed_by(source.split("|")) if source else None)
    settings: dict[str, Any] = {"type": kind or _click_type(entry), "shell_complete": complete}
    metavar = entry.extra["metavar"] or None
    if entry.is_argument:
        nargs = -1 if entry.several else 1
        metavar = f"{metavar}..." if metavar and entry.several else metavar
        return click.Argument([entry.name], required=required, nargs=nargs, metavar=metavar, **settings)
    flags = entry.extra["flags"] or [f"--{entry.name.replace('_', '-')}"]
    text, words = (spelled(part, _flag) for part in (entry.text, entry.extra["default"]))
    if entry.kind is bool:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"] if entry.default is True else flags
        settings = {"is_flag": True, "default": entry.default}
        default = ""
    else:
        shown = "" if required or entry.default in (None, (), "") else str(entry.default)
        default = words or shown
    return (ManyOption if entry.extra["many"] else GroupedOption)(
        [*flags, entry.name],
        group=entry.extra["group"],
        also=entry.extra["also"],
        required=required,
        multiple=entry.several or entry.extra["many"],
        metavar=metavar,
        help=f"{text}  [default: {default}]" if default else text,
        **settings,
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _click_type(entry: Declared) -> click.ParamType | None:  # type: ignore[type-arg]
    limits: dict[str, Any] = {
        "min": entry.limits.get("ge", entry.limits.get("gt")), "max": entry.limits.get("le", entry.limits.get("lt")),
        "min_open": "gt" in entry.limits, "max_open": "lt" in entry.limits,
    }  # fmt: skip
    if isinstance(entry.kind, tuple):
        return NameChoice(entry.kind, meant=entry.extra["words"])
    if entry.kind in (int, float) and not entry.limits:
        return click.INT if entry.kind is int else click.FLOAT
    if entry.kind is int:
        return click.IntRange(**limits)
    if entry.kind is float:
        return click.FloatRange(**limits)
    return PathName() if entry.extra["path"] else None
