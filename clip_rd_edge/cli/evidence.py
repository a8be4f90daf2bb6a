"""`clip-rd-edge evidence`: methods compared over students and seeds."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("evidence", short_help="Train by several methods and seeds, and compare them.")
@click.argument("suite")
@click.option("--teacher", help="local-dir:PATH, hf-hub:ORG/REPO or a run; default: the embedded one, tuned first.")
@click.option(
    "-o", "--output", "folder", metavar="FOLDER", required=True, type=click.Path(path_type=Path),
    help="Where everything goes; what is done there already is not done again.",
)  # fmt: skip
def command(suite: str, folder: Path, teacher: str | None) -> None:
    """Train the students of SUITE by each of its methods with each of its seeds, and compare them.

    SUITE is a YAML file, or the name of one that is shipped: method-evidence. Interrupt it at any time: the same
    command goes on from there.

    \b
    clip-rd-edge evidence method-evidence -o evidence
    """
    from clip_rd_edge.cli._progress import progress_bar
    from clip_rd_edge.cli._stages import StageBar
    from clip_rd_edge.evidence.runs import run_evidence
    from clip_rd_edge.evidence.suite import read_evidence

    wanted = read_evidence(suite)
    with progress_bar() as bar:
        run_evidence(wanted, folder, StageBar(bar), teacher=teacher)
