"""How a command names the options that an error is about; see `ClipRdEdgeError.hint_for`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from clip_rd_edge.errors import Spell


def spelling(group: click.Group, arguments: Sequence[str]) -> Spell:
    """Return what names an option as the command that the arguments call does, and None for one that it lacks."""
    command = _command(group, arguments)
    if command is None:
        return lambda name: f"--{name.replace('_', '-')}"
    names: dict[str, str] = {}
    for parameter in command.params:
        named = (
            max(parameter.opts, key=len)
            if isinstance(parameter, click.Option)
            else parameter.metavar or str(parameter.name).upper()
        )
        names |= {name: named for name in (str(parameter.name), getattr(parameter, "also", "")) if name}
    return names.get


def _command(group: click.Group, arguments: Sequence[str]) -> click.Command | None:
    """Return the command that the arguments call, or None if they call none."""
    command: click.Command = group
    for name in arguments:
        if name.startswith("-"):
            continue
        if not isinstance(command, click.Group):
            break
        subcommand = command.get_command(click.Context(command), name)
        if subcommand is None:
            return None
        command = subcommand
    return None if isinstance(command, click.Group) else command
