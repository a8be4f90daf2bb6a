"""Hints that fit the command: code that several commands share may name an option that only some of them have."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import click

_OPTION = re.compile(r"(?<![\w/-])(?:--[a-z][a-z-]*|-[a-zA-Z0-9])(?![\w-])")
_ALTERNATIVE = ", or "
# Alternatives that begin with one of these are about another command.
_ELSEWHERE = ("export ", "run the export ", "train ", "pip ", "uv ", "pipx ", "clip-rd-edge ")
_ALWAYS = {"-h", "--help", "--debug", "--version"}
# What an option of other commands is called in a command.
_RENAMED = {
    "distill": {"--pretrained": "--teacher-pretrained"},
    "embed": {"--pretrained": "--teacher-pretrained", "--teacher-cache": "-o"},
}


def fitting_hint(hint: str, group: click.Group, arguments: Sequence[str]) -> str:
    """Return a hint without the alternatives that name options which the command lacks; empty if none is left.

    Args:
        hint: one or more alternatives, joined by `, or `.
        group, arguments: determine the command.
    """
    command = _command(group, arguments)
    if command is None:
        return hint
    for name, renamed in _RENAMED.get(command.name or "", {}).items():
        hint = re.sub(rf"(?<![\w-]){name}(?![\w-])", renamed, hint)
    options = _ALWAYS.union(*((*parameter.opts, *parameter.secondary_opts) for parameter in command.params))
    return _ALTERNATIVE.join(part for part in hint.split(_ALTERNATIVE) if _fits(part, options))


def _fits(part: str, options: Collection[str]) -> bool:
    if part.startswith(_ELSEWHERE) or ": clip-rd-edge " in part:
        return True
    return all(option in options for option in _OPTION.findall(part))


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
