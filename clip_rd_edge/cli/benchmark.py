"""`clip-rd-edge benchmark`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from clip_rd_edge.errors import UsageError


@click.command()
@click.argument("suite", required=False)
@click.option("-o", "--output", metavar="FOLDER", type=click.Path(path_type=Path), help="Folder of the report.")
@click.option("--root", metavar="DIR", help="Folder that the data sets are in; default: the suite's root.")
@click.option(
    "--model",
    "models",
    metavar="ROLE=MODEL",
    multiple=True,
    help="A model instead of the suite's, such as student=runs/first; ROLE is teacher, baseline, student, exported or "
    "quantised. Repeat it for several.",
)
@click.option(
    "--budget-ms", type=click.FloatRange(0, min_open=True), metavar="MS",
    help="Recommend a model that takes no longer from file to answer, in 95 of 100 pictures.",
)  # fmt: skip
@click.option(
    "--min-accuracy", type=click.FloatRange(0, 1), metavar="PART",
    help="Recommend one with at least this top-1, such as 0.25.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Write into the folder though it is not empty.")
@click.option(
    "--compare", "compared", nargs=2, metavar="OLD NEW", type=click.Path(path_type=Path),
    help="Tell what has changed between two results, files or folders; exit code 1 where something became worse.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="With --compare: print JSON.")
def command(
    suite: str | None,
    output: Path | None,
    root: str | None,
    models: tuple[str, ...],
    budget_ms: float | None,
    min_accuracy: float | None,
    force: bool,
    compared: tuple[Path, Path] | None,
    as_json: bool,
) -> None:
    """Compare the models of SUITE: accuracy × latency × size.

    SUITE is a YAML file with rows (label, model, role) and tasks, or the name of one that is shipped, such as
    quickstart. The table goes to stdout; results.json, report.html, report.md and accuracy-latency.png to FOLDER.
    A model that is missing is skipped, and the report says why.

    Each accuracy is kept in FOLDER as it is measured: interrupted, the same command goes on from there, and times all
    models anew, so that ratios of latencies are of one run.

    The suite paper has the tasks of the CLIP-RD paper, by CLIP_benchmark's names: it runs those whose data sets are in
    --root and says which are missing.

    \b
    clip-rd-edge benchmark quickstart -o report
    clip-rd-edge benchmark my-suite.yaml -o report --force
    clip-rd-edge benchmark paper --root data --model student=runs/first --model quantised=bundle -o report
    clip-rd-edge benchmark --compare report-of-last-week report
    """
    if compared is not None:
        from clip_rd_edge.cli._compare import compare

        sys.exit(compare(*compared, as_json=as_json))
    if suite is None or output is None:
        missing = "SUITE" if suite is None else "-o FOLDER"
        raise UsageError(f"{missing} is missing.", hint="clip-rd-edge benchmark quickstart -o report")
    budget = {"budget_ms": budget_ms, "min_accuracy": min_accuracy}
    stated = {name: value for name, value in budget.items() if value is not None}
    _run(suite, output, root=root, models=models, budget=stated, force=force)


def _run(
    suite: str, output: Path, *, root: str | None, models: Sequence[str], budget: dict[str, float], force: bool
) -> None:
    import msgspec

    from clip_rd_edge.benchmark.answer_cache import FOLDER, Parts
    from clip_rd_edge.benchmark.report.findings import recommendation
    from clip_rd_edge.benchmark.report.markdown import write_report
    from clip_rd_edge.benchmark.report.plot import require_matplotlib
    from clip_rd_edge.benchmark.report.terminal import terminal_table
    from clip_rd_edge.benchmark.results import this_environment
    from clip_rd_edge.benchmark.run import run_suite
    from clip_rd_edge.benchmark.suite import find_suite, read_suite
    from clip_rd_edge.cli._models import first_answer, open_encoder
    from clip_rd_edge.cli._output import print_table, step_progress
    from clip_rd_edge.cli._progress import say
    from clip_rd_edge.cli._rows import parse_models
    from clip_rd_edge.cli._templates import imagenet_templates
    from clip_rd_edge.utils.io import refuse_unless_free
    from clip_rd_edge.utils.lock import LOCK, only_writer

    # What can be refused is refused before the long work.
    interrupted = (output / FOLDER).is_dir()
    refuse_unless_free(output, overwrite=force or interrupted, ignoring=(LOCK,))
    require_matplotlib()
    wanted = read_suite(find_suite(suite), rows=parse_models(models), data_root=root)
    wanted = msgspec.structs.replace(wanted, **budget)
    if models:
        for row in wanted.rows:
            wanted.find(row)  # one that was named just now is not skipped
    with only_writer(output):
        if interrupted:
            say(f"going on with what {output / FOLDER} holds")
        parts = Parts(output / FOLDER, this_environment())
        with step_progress() as report:
            opening = partial(open_encoder, threads=wanted.threads)
            results = run_suite(wanted, opening, report, fallback=imagenet_templates, parts=parts, launch=first_answer)
        write_report(results, output)
        parts.remove()
    print_table(terminal_table(results))
    if advice := recommendation(results):
        click.echo(advice.replace("**", ""))
    for skipped in results.skipped:
        say(f"{skipped.label} was skipped: {skipped.reason}")
    for task in results.missing:
        say(f"{task.name} is missing: {task.reason}")
    say(f"The report is {output / 'report.html'}")
