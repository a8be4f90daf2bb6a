"""`clip-rd-edge evidence`: compare training methods over several students and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import CommandGroup, GroupedCommand, PathName, grouped
from clip_rd_edge.settings.measuring import EvidenceRun


@click.group("evidence", cls=CommandGroup, short_help="Compare training methods over several students and seeds.")
def command() -> None:
    """Compare training methods: train students with each method and several seeds, and evaluate them.

    \b
    clip-rd-edge evidence run method-evidence -o evidence
    clip-rd-edge evidence report evidence/method-evidence.json
    """


@command_of(EvidenceRun, "run", short_help="Train and evaluate the students of a suite.")
def run(given: dict[str, Any]) -> None:
    """Train the students of SUITE with each of its methods and seeds, and evaluate them.

    \b
    clip-rd-edge evidence run method-evidence -o evidence

    SUITE is a YAML file, or the name of a built-in suite, such as method-evidence or bank. All runs of the first seed
    come before those of the second, and `evidence report` can make tables and figures from NAME.json in FOLDER while
    the command runs. It can be interrupted at any time: the same command resumes.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter

    with console_reporter() as reporter:
        evidence = edge.evidence_run(**given, reporter=reporter)
    echo(edge.evidence_report(given["output"] / f"{evidence.suite.name}.json"), prose=True)


command.add_command(run)


@command.command("report", cls=GroupedCommand, short_help="Make tables and figures of finished runs.")
@click.argument("results", metavar="RESULTS...", nargs=-1, required=True, type=PathName())
@grouped("Output")(
    "--into", metavar="FILE", type=PathName(),
    help="Write the tables between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of FILE, with the suite's "
    "NAME, and the figures beside RESULTS.  [default: print the tables to stdout]",
)  # fmt: skip
def report(results: tuple[Path, ...], into: Path | None) -> None:
    """Make tables and figures of results; nothing is trained.

    \b
    clip-rd-edge evidence report evidence/method-evidence.json --into README.md
    clip-rd-edge evidence report seed-0/report seed-1/report seed-2/report

    RESULTS is the NAME.json that `evidence run` writes. Or several results of one benchmark, for instance of different
    seeds, each a results.json or its folder: then the table has means and standard deviations of accuracy.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import say

    tables = edge.evidence_report(results, into=into)
    if into is None:
        echo(tables, prose=True)
    else:
        say(f"written: {into}")
