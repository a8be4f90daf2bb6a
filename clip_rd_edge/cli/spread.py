"""`clip-rd-edge spread`: summarise several results of one suite."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import GroupedCommand, PathName


@click.command("spread", cls=GroupedCommand, short_help="Summarise several results of one suite, such as seeds.")
@click.argument("results", nargs=-1, required=True, type=PathName())
def command(results: tuple[Path, ...]) -> None:
    """Print the mean and standard deviation of accuracy over several RESULTS of one suite, as a Markdown table.

    \b
    clip-rd-edge spread report-seed-0 report-seed-1 report-seed-2
    clip-rd-edge spread benchmarks/results/*/quickstart-seed-*.json

    RESULTS are results.json files or the folders that benchmark wrote, for instance of different seeds.
    """
    import clip_rd_edge as edge

    echo(edge.spread(results))
