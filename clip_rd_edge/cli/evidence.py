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
    "-o", "--output", "folder", metavar="FOLDER", required=True, type=click.Path(path_type=Path),
    help="Where everything goes; what is done there already is not done again.",
)  # fmt: skip
def run(suite: str, folder: Path, teacher: str | None) -> None:
    """Train the students of SUITE by each of its methods with each of its seeds, and measure them.

    SUITE is a YAML file, or the name of one that is shipped: method-evidence. All runs of the first seed come before
    those of the second, and tables and figures can be made from NAME.json in FOLDER while it goes on. Interrupt it at
    any time: the same command goes on from there.

    \b
    clip-rd-edge evidence run method-evidence -o evidence
    """
    from clip_rd_edge.benchmark.report.plot import require_matplotlib
    from clip_rd_edge.cli._progress import progress_bar, say
    from clip_rd_edge.cli._stages import StageBar
    from clip_rd_edge.evidence.report import markdown, write_report
    from clip_rd_edge.evidence.run import run_evidence
    from clip_rd_edge.evidence.suite import read_evidence

    require_matplotlib()
    wanted = read_evidence(suite)
    with progress_bar() as bar:
        evidence = run_evidence(wanted, folder, StageBar(bar), teacher=teacher)
    for path in write_report(evidence, folder):
        say(f"written: {path}")
    click.echo(markdown(evidence))


@command.command("report")
@click.argument("results", metavar="JSON", type=click.Path(path_type=Path))
@click.option(
    "--into", "page", metavar="FILE", type=click.Path(path_type=Path),
    help="Put the tables between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of FILE, where NAME is the "
    "suite's, and draw the figures beside JSON; without it, the tables go to stdout.",
)  # fmt: skip
def report(results: Path, page: Path | None) -> None:
    """Tables and figures from the NAME.json that `evidence run` writes; nothing is trained.

    \b
    clip-rd-edge evidence report benchmarks/results/epyc-zen4-2-cores/method-evidence.json --into benchmarks/README.md
    """
    from clip_rd_edge.cli._progress import say
    from clip_rd_edge.evidence.report import markdown, publish, read_evidence_file

    if page is None:
        click.echo(markdown(read_evidence_file(results)))
        return
    for path in publish(results, page):
        say(f"written: {path}")
