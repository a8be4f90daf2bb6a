"""`clip-rd-edge targets`: the supported targets, and how to deploy to them."""

from __future__ import annotations

import click

from clip_rd_edge.cli.options import GroupedCommand, complete_target_name, grouped
from clip_rd_edge.cli.output import echo, fold_command

# The words of the column `tested` for Target.runs.
_TESTED = {"here": "yes", "nearby": "in part", "not yet": "not yet"}


@click.command("targets", cls=GroupedCommand, short_help="List the supported targets, and how to deploy to them.")
@click.argument("name", required=False, metavar="[NAME]", shell_complete=complete_target_name)
@grouped("Output")("--json", "as_json", is_flag=True, help="Print the targets as JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the supported targets, or show how to deploy to the target NAME.

    \b
    clip-rd-edge targets
    clip-rd-edge targets cpu-arm
    """
    import clip_rd_edge as edge

    targets = edge.targets(name)
    if as_json:
        from clip_rd_edge.utils.structs import to_json

        echo(to_json(targets), nl=False)
    elif name:
        from rich.markdown import Markdown

        from clip_rd_edge.cli.console import SafeConsole
        from clip_rd_edge.exporting.plan import target_guide

        console = SafeConsole()
        guide = target_guide(name)
        # Print plain Markdown unless stdout is a terminal.
        console.print(Markdown(_fit(guide, console.width))) if console.file.isatty() else echo(guide, nl=False)
    else:
        from rich.table import Table
        from rich.text import Text

        from clip_rd_edge.cli.console import print_table

        table = Table("target", "description", "requirements", "tested", show_lines=True)
        for key, target in targets.items():
            title = Text.assemble(f"{target.title}\n", (target.examples, "dim"))
            table.add_row(key, title, "\n".join(target.needs), _TESTED[target.runs])
        print_table(table)
        echo("How to deploy: clip-rd-edge targets NAME; what is here: clip-rd-edge doctor", err=True)


def _fit(guide: str, width: int) -> str:
    """Return a guide whose shell commands fit a terminal: where rich breaks them, they could not be copied."""
    lines, in_shell = [], False
    for line in guide.splitlines():
        if line.startswith("```"):
            in_shell = line == "```sh"
        lines.append(fold_command(line, width - 2) if in_shell else line)
    return "\n".join(lines)
