"""`clip-rd-edge evidence`: methods compared over students and seeds."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("evidence", short_help="Train by several methods and seeds, and compare them.")
def command() -> None:
    """Which method trains better students? Train by each of them with several seeds, and compare."""


@command.command("run")
@click.argument("suite")
@click.option("--teacher", help="local-dir:PATH, hf-hub:ORG/REPO or a run; default: the embedded one, tuned first.")
@click.option(
    "-o", "--output", metavar="FOLDER", required=True, type=click.Path(path_type=Path),
    help="Where everything goes; what is done there already is not done again.",
)  # fmt: skip
def run(suite: str, output: Path, teacher: str | None) -> None:
    """Train the students of SUITE by each of its methods with each of its seeds, and measure them.

    SUITE is a YAML file, or the name of one that is shipped: method-evidence. All runs of the first seed come before
    those of the second, and tables and figures can be made from NAME.json in FOLDER while it runs. Interrupt it at
    any time: the same command resumes.

    \b
    clip-rd-edge evidence run method-evidence -o evidence
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter

    with console_reporter() as reporter:
        edge.evidence_run(suite, output, teacher=teacher, reporter=reporter)
        reporter.end_chapter()
    from clip_rd_edge.evidence.suite import read_evidence

    click.echo(edge.evidence_report(output / f"{read_evidence(suite).name}.json"))


@command.command("report")
@click.argument("results", metavar="JSON", type=click.Path(path_type=Path))
@click.option(
    "--into", metavar="FILE", type=click.Path(path_type=Path),
    help="Put the tables between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of FILE, where NAME is the "
    "suite's, and draw the figures beside JSON; without it, the tables go to stdout.",
)  # fmt: skip
def report(results: Path, into: Path | None) -> None:
    """Tables and figures from the NAME.json that `evidence run` writes; nothing is trained.

    \b
    clip-rd-edge evidence report benchmarks/results/epyc-zen4-2-cores/method-evidence.json --into benchmarks/README.md
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import say

    tables = edge.evidence_report(results, into=into)
    if into is None:
        click.echo(tables)
    else:
        say(f"written: {into}")
