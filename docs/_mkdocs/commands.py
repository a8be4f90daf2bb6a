"""The command reference as Markdown, made from the click commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

# Options that only say how a command prints; functions return values instead.
PRINTING = {"as_json", "as_csv", "open_page"}


def commands(group: click.Group, name: str = "clip-rd-edge") -> Iterator[tuple[click.Context, click.Command]]:
    """Every command that does something, with its context, in the order of `--help`; sub-groups are descended into."""
    parent = click.Context(group, info_name=name)
    yield from _below(group, parent)


def _below(group: click.Group, parent: click.Context) -> Iterator[tuple[click.Context, click.Command]]:
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent)
        if isinstance(command, click.Group):
            yield from _below(command, context)
        else:
            yield context, command


def reference(group: click.Group) -> str:
    """The page: what holds for every command, then one section per command."""
    context = click.Context(group, info_name="clip-rd-edge")
    parts = ["# Command reference", *_paragraphs(group.help or "")]
    parts.append(_table([row for parameter in group.get_params(context) if (row := _row(parameter, context))]))
    parts.append("This page is generated from the commands' own `--help`.")
    for inner, command in commands(group):
        parts += _section(inner, command)
    return "\n\n".join(parts) + "\n"


def examples(command: click.Command) -> Iterator[str]:
    r"""The blocks of example commands in a command's help: the paragraphs marked with `\b`."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b"):
            yield paragraph.removeprefix("\b").strip("\n")


def _section(context: click.Context, command: click.Command) -> list[str]:
    path = context.command_path
    arguments = " ".join(command.collect_usage_pieces(context))
    parts = [f"## {path.removeprefix('clip-rd-edge ')}", f"```text\n{path} {arguments}\n```"]
    parts += _paragraphs(command.help or "")
    groups: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        if row := _row(parameter, context):
            groups.setdefault(getattr(parameter, "group", ""), []).append(row)
    for heading, rows in groups.items():
        if heading:
            parts.append(f"**{heading}**")
        elif len(groups) > 1:
            parts.append("**Other options**")
        parts.append(_table(rows))
    if renamed := _other_names(command):
        parts.append(f"In Python: {renamed}.")
    return parts


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            example = paragraph.removeprefix("\b").strip("\n")
            yield f"```sh\n{example}\n```"
        else:
            yield paragraph.strip()


def _table(rows: list[str]) -> str:
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows])


def _row(parameter: click.Parameter, context: click.Context) -> str:
    """A row of the table of options; nothing for arguments, which the usage line shows, and for --help."""
    record = parameter.get_help_record(context)
    if record is None or isinstance(parameter, click.Argument) or parameter.name == "help":
        return ""
    names, meaning = (" ".join(text.split()).replace("|", "&#124;") for text in record)
    meaning = meaning.replace("[", "\\[").replace("<", "&lt;") if "`" not in meaning else meaning
    return f"| <code>{names.replace('<', '&lt;')}</code> | {meaning} |"


def _other_names(command: click.Command) -> str:
    """Options that are called otherwise as arguments of the function, such as `--task` → `tasks`."""
    renamed = []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in PRINTING:
            longest = max(parameter.opts, key=len)
            if parameter.name != longest.lstrip("-").replace("-", "_"):
                renamed.append(f"`{longest}` is `{parameter.name}`")
    return ", ".join(renamed)
