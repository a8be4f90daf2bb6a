"""`clip-rd-edge benchmark`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click


@click.command()
@click.argument("suite")
@click.option(
    "-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path), required=True, help="Folder of the report."
)
@click.option("--root", metavar="DIR", help="Folder that the data sets are in; default: the suite's root.")
@click.option(
    "--model",
    "models",
    metavar="ROLE=MODEL",
    multiple=True,
    help="A model instead of the suite's, such as student=runs/first; ROLE is teacher, baseline, student, exported or "
    "quantised. Repeat it for several.",
)
@click.option("--force", is_flag=True, help="Write into the folder though it is not empty.")
def command(suite: str, output: Path, root: str | None, models: tuple[str, ...], force: bool) -> None:
    """Compare the models of SUITE: accuracy × latency × size.

    SUITE is a YAML file with rows (label, model, role) and tasks, or the name of one that is shipped, such as
    quickstart. The table goes to stdout; results.json, report.html, report.md and accuracy-latency.png to FOLDER.
    A model that is missing is skipped, and the report says why.

    The suite paper has the tasks of the CLIP-RD paper, by CLIP_benchmark's names: it runs those whose data sets are in
    --root and says which are missing.

    \b
    clip-rd-edge benchmark quickstart -o report
    clip-rd-edge benchmark my-suite.yaml -o report --force
    clip-rd-edge benchmark paper --root data --model student=runs/first --model quantised=bundle -o report
    """
    from clip_rd_edge.benchmarking.plot import require_matplotlib
    from clip_rd_edge.benchmarking.report import write_report
    from clip_rd_edge.benchmarking.run import run_suite
    from clip_rd_edge.benchmarking.suite import find_suite, read_suite
    from clip_rd_edge.benchmarking.table import terminal_table
    from clip_rd_edge.cli._models import open_encoder
    from clip_rd_edge.cli._output import print_table, step_progress
    from clip_rd_edge.cli._progress import say
    from clip_rd_edge.cli._rows import parse_models
    from clip_rd_edge.cli._templates import imagenet_templates
    from clip_rd_edge.contract.files import refuse_unless_free

    # What can be refused is refused before the long work.
    refuse_unless_free(output, overwrite=force)
    require_matplotlib()
    wanted = read_suite(find_suite(suite), rows=parse_models(models), data_root=root)
    with step_progress() as report:
        results = run_suite(wanted, partial(open_encoder, threads=wanted.threads), report, fallback=imagenet_templates)
    write_report(results, output)
    print_table(terminal_table(results))
    for row in results.skipped:
        say(f"{row.label} was skipped: {row.reason}")
    for task in results.missing:
        say(f"{task.name} is missing: {task.reason}")
    say(f"The report is {output / 'report.html'}")
