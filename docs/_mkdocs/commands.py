"""The reference of the commands as Markdown, a page each, made from the click commands and their settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

import clip_rd_edge as edge
from clip_rd_edge.cli.main import COMMANDS
from clip_rd_edge.settings.options import declared

# The Python of a command, where it is not the function of its name.
FUNCTIONS = {
    "classify": ("Model.classify", "Model.classify_camera"),
    "index": ("index", "watch_index"),
    "benchmark": ("benchmark", "compare", "recommend"),
}
# Options that only say how a command prints; functions return values instead.
PRINTING = {"as_json", "as_csv", "open_page", "all_extras"}


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


def name_of(context: click.Context) -> str:
    """The command without the program's name, such as `evidence run`."""
    return context.command_path.removeprefix("clip-rd-edge ")


def functions_of(name: str) -> tuple[str, ...]:
    """The names of `clip_rd_edge` that do what a command does."""
    return FUNCTIONS.get(name) or (name.replace(" ", "_").replace("-", "_"),)


def page_of(name: str) -> str:
    """The page of a command, in the folder of the overview, which is index.md."""
    return f"{name.replace(' ', '-')}.md" if name != "index" else "index-command.md"


def pages(group: click.Group) -> dict[str, str]:
    """The text of each page by its name: the overview `index.md`, and one per command."""
    context = click.Context(group, info_name="clip-rd-edge")
    options = _table([row for parameter in group.get_params(context) if (row := _row(parameter, context))])
    rows: dict[str, list[str]] = {}
    made = {}
    for inner, command in commands(group):
        name = name_of(inner)
        first = next(_paragraphs(command.help or "")).replace("\n", " ")
        python = ", ".join(f"[`{function}`][clip_rd_edge.{function}]" for function in functions_of(name))
        row = f"| [`{name}`]({page_of(name)}) | {first.partition('. ')[0].rstrip('.')} | {python} |"
        rows.setdefault(COMMANDS[name.split()[0]][0], []).append(row)
        made[page_of(name)] = "\n\n".join(_page(inner, command)) + "\n"
    tables = [
        "\n".join([f"## {heading}\n", "| command | does | in Python |", "| --- | --- | --- |", *each])
        for heading, each in rows.items()
    ]
    python = (
        "Every command is a function of `clip_rd_edge` with the same names: `--batch-size` is `batch_size`, `-o` is "
        "`output`; a command's page lists other differences. [Python](../python/index.md) has classes and errors."
    )
    index = [
        "# Commands and functions",
        *_paragraphs(group.help or ""),
        python,
        *tables,
        "## Options of every command",
        options,
    ]
    return {"index.md": "\n\n".join(index) + "\n", **made}


def _page(context: click.Context, command: click.Command) -> list[str]:
    path, name = context.command_path, name_of(context)
    arguments = " ".join(command.collect_usage_pieces(context))
    parts = [f"# {name}", f"```text\n{path} {arguments}\n```", *_paragraphs(command.help or "")]
    groups: dict[str, list[str]] = {}
    if rows := list(_arguments(name)):
        groups[""] = rows
    for parameter in command.get_params(context):
        if row := _row(parameter, context):
            groups.setdefault(getattr(parameter, "group", ""), []).append(row)
    for heading, rows in groups.items():
        parts += [f"## {heading}"] if heading else []
        parts.append(_table(rows))
    parts.append("## In Python")
    if renamed := _other_names(command):
        parts.append(f"Keywords are the options above; {renamed}.")
    for function in functions_of(name):  # a method stands with its class
        parts.append(f"[`{function}`][clip_rd_edge.{function}]" if "." in function else f"::: clip_rd_edge.{function}")
    return parts


def _arguments(name: str) -> Iterator[str]:
    """Rows for what the command line takes by its place."""
    settings = getattr(getattr(edge, functions_of(name)[0], None), "settings", None)
    for entry in declared(settings) if settings else ():
        if entry.option.is_argument:
            yield f"| <code>{entry.option.metavar or entry.name.upper()}</code> | {entry.text} |"


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
    """A row of the table of options; nothing for arguments, which stand before, and for --help."""
    record = parameter.get_help_record(context)
    if record is None or isinstance(parameter, click.Argument) or parameter.name == "help":
        return ""
    names, meaning = (" ".join(text.split()).replace("|", "&#124;") for text in record)
    parts = meaning.split("`")  # every second one is code
    parts[::2] = (part.replace("[", "\\[").replace("<", "&lt;") for part in parts[::2])
    return f"| <code>{names.replace('<', '&lt;')}</code> | {'`'.join(parts)} |"


def _other_names(command: click.Command) -> str:
    """Options that are called otherwise as arguments of the function, such as `--task` → `tasks`."""
    renamed = []
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in PRINTING:
            longest = max(parameter.opts, key=len)
            if parameter.name != longest.lstrip("-").replace("-", "_"):
                renamed.append(f"`{longest}` is `{parameter.name}`")
    return ", ".join(renamed)
