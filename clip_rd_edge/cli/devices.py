"""`clip-rd-edge devices`: the supported devices, and how to deploy to them."""

from __future__ import annotations

import click

from clip_rd_edge.cli.options import GroupedCommand, complete_device, grouped
from clip_rd_edge.cli.output import echo, fold_command

# The words of the column `tested` for Device.runs.
_TESTED = {"here": "yes", "nearby": "in part", "not yet": "not yet"}


@click.command("devices", cls=GroupedCommand, short_help="List the supported devices, and how to deploy to them.")
@click.argument("name", required=False, metavar="[NAME]", shell_complete=complete_device)
@grouped("Output")("--json", "as_json", is_flag=True, help="Print the devices as JSON.")
def command(name: str | None, as_json: bool) -> None:
    """List the supported devices, or show how to deploy to the device NAME.

    \b
    clip-rd-edge devices
    clip-rd-edge devices cpu-arm
    """
    import clip_rd_edge as edge

    devices = edge.devices(name)
    if as_json:
        from clip_rd_edge.utils.structs import to_json

        echo(to_json(devices), nl=False)
    elif name:
        from rich.markdown import Markdown

        from clip_rd_edge.cli.console import SafeConsole
        from clip_rd_edge.exporting.plan import device_guide

        console = SafeConsole()
        guide = device_guide(name)
        # Print plain Markdown unless stdout is a terminal.
        console.print(Markdown(_fit(guide, console.width))) if console.file.isatty() else echo(guide, nl=False)
    else:
        from rich.table import Table
        from rich.text import Text

        from clip_rd_edge.cli.console import print_table

        table = Table("device", "description", "requirements", "tested", show_lines=True)
        for key, device in devices.items():
            title = Text.assemble(f"{device.title}\n", (device.examples, "dim"))
            table.add_row(key, title, "\n".join(device.needs), _TESTED[device.runs])
        print_table(table)
        echo("How to deploy: clip-rd-edge devices NAME; what is here: clip-rd-edge doctor", err=True)


def _fit(guide: str, width: int) -> str:
    """Return a guide whose shell commands fit a terminal: where rich breaks them, they could not be copied."""
    lines, in_shell = [], False
    for line in guide.splitlines():
        if line.startswith("```"):
            in_shell = line == "```sh"
        lines.append(fold_command(line, width - 2) if in_shell else line)
    return "\n".join(lines)
