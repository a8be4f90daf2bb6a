"""`clip-rd-edge spread`: means and spreads over several results of one suite."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("spread", short_help="Means and spreads over several results of one suite.")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
def command(results: tuple[Path, ...]) -> None:
    """Means and spreads of accuracy over several RESULTS (results.json), such as of different seeds, as Markdown.

    \b
    clip-rd-edge spread benchmarks/results/*/quickstart-seed-*.json
    """
    import clip_rd_edge as edge

    click.echo(edge.spread(results))
