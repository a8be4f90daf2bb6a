"""`clip-rd-edge doctor`: check this machine, and show what to install."""

from __future__ import annotations

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import GroupedCommand, grouped
from clip_rd_edge.errors import ClipRdEdgeError

_STYLES = {"ok": "green", "missing": "yellow", "broken": "red"}


@click.command("doctor", cls=GroupedCommand, short_help="Check this machine, and show what to install.")
@grouped("Output")("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(as_json: bool) -> None:
    """Check the processor, threads, ONNX Runtime, GPU and optional packages.

    \b
    clip-rd-edge doctor
    clip-rd-edge doctor --json

    Missing packages are listed with the command that installs them. Exit code 0: bundles can run here, 1: they cannot.
    """
    import clip_rd_edge as edge

    findings = edge.doctor()
    if as_json:
        from clip_rd_edge.utils.structs import encode_json

        echo(encode_json(findings))
    else:
        from rich.table import Table
        from rich.text import Text

        from clip_rd_edge.cli._console import print_table

        table = Table(show_header=False)
        for finding in findings:
            detail = Text(finding.detail)
            if finding.remedy:
                detail.append(f"\n{finding.remedy}", style="bold")
            table.add_row(finding.what, Text(finding.state, style=_STYLES[finding.state]), detail)
        print_table(table)
    if broken := [finding for finding in findings if finding.state == "broken"]:
        raise ClipRdEdgeError(f"No bundle can run here: {broken[0].what} {broken[0].detail}.", hint=broken[0].remedy)
