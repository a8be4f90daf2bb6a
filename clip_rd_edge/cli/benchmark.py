"""`clip-rd-edge benchmark`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clip_rd_edge.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from clip_rd_edge.benchmarking.regression import AccuracyChange, Changes, LatencyChange

_STYLES: dict[str, str] = {"regression": "bold red", "improvement": "green", "noise": "dim", "same": "dim"}


@click.command("benchmark")
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
        sys.exit(_compare(*compared, as_json=as_json))
    if suite is None or output is None:
        missing = "SUITE" if suite is None else "-o FOLDER"
        raise UsageError(f"{missing} is missing.", hint="clip-rd-edge benchmark quickstart -o report")
    import clip_rd_edge as edge
    from clip_rd_edge.benchmarking.report.findings import recommendation
    from clip_rd_edge.benchmarking.report.text import terminal_table
    from clip_rd_edge.cli._console import console_reporter, print_table, say

    with console_reporter() as reporter:
        results = edge.benchmark(
            suite,
            output,
            root=root,
            models=models,
            budget_ms=budget_ms,
            min_accuracy=min_accuracy,
            force=force,
            reporter=reporter,
        )
    print_table(terminal_table(results))
    if advice := recommendation(results):
        click.echo(advice.replace("**", ""))
    for skipped in results.skipped:
        say(f"{skipped.label} was skipped: {skipped.reason}")
    for task in results.missing:
        say(f"{task.name} is missing: {task.reason}")
    say(f"The report is {output / 'report.html'}")


def _compare(old: Path, new: Path, *, as_json: bool) -> int:
    """Print what has changed; returns the exit code, 1 where something became worse.

    Raises:
        InputError, ConfigError: a result is missing, damaged, or has no model in common with the other.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import print_table, say
    from clip_rd_edge.utils.io import to_json

    changes = edge.compare(old, new)
    if as_json:
        click.echo(to_json(changes), nl=False)
        return int(changes.regressions > 0)
    if changes.latencies:
        print_table(_latency_table(changes))
    if shown := [each for each in changes.accuracies if each.verdict != "same"]:
        print_table(_accuracy_table(shown))
    if same := len(changes.accuracies) - len(shown):
        click.echo(f"{same} of {len(changes.accuracies)} accuracies are the same, question by question.")
    for label, reason in changes.lost.items():
        click.echo(f"{label} was measured before and is not now: {reason}")
    for remark in changes.remarks:
        say(remark)
    count = changes.regressions
    if count:
        click.echo(f"{count} regression{'s' if count > 1 else ''}.")
    else:
        click.echo("No regression." if changes.latencies else "No regression in accuracy; latency was not compared.")
    return int(count > 0)


def _latency_table(changes: Changes) -> Table:
    from clip_rd_edge.benchmarking import formatting
    from clip_rd_edge.cli._console import plain_table

    table = plain_table("p50", "Old, ms", "New, ms", "Change", "Noise", "", left=("",))
    for each in changes.latencies:
        figures = (formatting.milliseconds(each.old_ms), formatting.milliseconds(each.new_ms))
        compared = (formatting.signed_percent(each.change), f"± {100 * each.noise:.1f} %")
        table.add_row(f"{each.row}, {each.what}", *figures, *compared, _verdict(each))
    return table


def _accuracy_table(shown: list[AccuracyChange]) -> Table:
    from clip_rd_edge.benchmarking import formatting
    from clip_rd_edge.cli._console import plain_table

    table = plain_table("Right answers, %", "Old", "New", "Points", "Interval, paired", "", left=("",))
    for each in shown:
        figures = (
            formatting.percent(each.old),
            formatting.percent(each.new),
            formatting.signed_points(each.new - each.old),
        )
        name = f"{each.row}, {each.task}, {each.measure}"
        table.add_row(name, *figures, formatting.signed_interval(each.interval), _verdict(each))
    return table


def _verdict(each: LatencyChange | AccuracyChange) -> Text:
    from rich.text import Text

    return Text("within noise" if each.verdict == "noise" else each.verdict, style=_STYLES[each.verdict])
