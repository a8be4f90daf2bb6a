"""`clip-rd-edge benchmark`: compare models by accuracy, latency and size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import PathName, completed_by, grouped
from clip_rd_edge.errors import UsageError
from clip_rd_edge.settings.measuring import Benchmark

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from clip_rd_edge.benchmarking.regression import AccuracyChange, Changes, LatencyChange

NOT_COMPARED = 3  # exit code
_suite, _comparison, _output = grouped("Suite"), grouped("Comparison"), grouped("Output")
_STYLES: dict[str, str] = {"regression": "bold red", "improvement": "green", "noise": "dim", "same": "dim"}


def _suites() -> list[str]:
    from clip_rd_edge.benchmarking.suite import shipped_suites

    return shipped_suites()


@command_of(Benchmark, "benchmark")
@click.argument("suite", required=False, shell_complete=completed_by(_suites))
@_suite("--init", is_flag=True, help="Print a suite with a comment on each key, to start your own from.")
@_comparison(
    "--compare", "compared", nargs=2, metavar="OLD NEW", type=PathName(),
    help="Compare two results (files or folders); exit code 1 if there is a regression, 3 if there is none but "
    "accuracies or latencies could not be compared.  [default: off]",
)  # fmt: skip
@_comparison("--allow-busy", is_flag=True, help="With --compare: exit with 0 if only latencies could not be compared.")
@_comparison("--json", "as_json", is_flag=True, help="With --compare: print JSON instead of tables.")
@_output("-o", "--output", metavar="FOLDER", type=PathName(), help="Folder for the report.  [required to measure]")
def command(
    given: dict[str, Any],
    suite: str | None,
    init: bool,
    output: Path | None,
    compared: tuple[Path, Path] | None,
    allow_busy: bool,
    as_json: bool,
) -> None:
    """Compare the models of SUITE by accuracy, latency and size.

    \b
    clip-rd-edge benchmark quickstart -o report
    clip-rd-edge benchmark --init > my-suite.yaml
    clip-rd-edge benchmark my-suite.yaml -o report --force
    clip-rd-edge benchmark paper --root data --model student=runs/first \\
        --model quantised=bundle -o report
    clip-rd-edge benchmark report --budget-ms 10
    clip-rd-edge benchmark --compare report-of-last-week report

    SUITE is a YAML file with rows (label, model, role) and tasks, or the name of a built-in suite, such as quickstart.
    The table is printed to stdout; results.json, report.html, report.md and accuracy-latency.png are written to FOLDER.
    Missing models are skipped, and the report says why.

    Each accuracy is saved in FOLDER as soon as it is measured. If the command is interrupted, running it again resumes
    from there, but times all models anew, so that latency ratios always come from one run.

    With --budget-ms or --min-accuracy and without -o, SUITE may be the folder of a finished report: a model is then
    recommended from its figures, and nothing is measured.

    The suite paper has the tasks of the CLIP-RD paper, under CLIP_benchmark's names. It runs those whose data sets are
    in --root and lists the missing ones.
    """
    if init:
        from clip_rd_edge.benchmarking.suite import commented_suite

        echo(commented_suite(), nl=False)
        return
    import clip_rd_edge as edge
    from clip_rd_edge.benchmarking.results import is_results

    if compared is not None:
        sys.exit(_compare(*compared, allow_busy=allow_busy, as_json=as_json))
    required = {name: given[name] for name in ("budget_ms", "min_accuracy") if name in given}
    if suite is not None and output is None and required and is_results(Path(suite)):
        echo(edge.recommend(suite, **required), prose=True)
        return
    if suite is None or output is None:
        missing = "SUITE" if suite is None else "-o FOLDER"
        raise UsageError(f"{missing} is missing.", hint="clip-rd-edge benchmark quickstart -o report")
    from clip_rd_edge.cli._console import console_reporter, print_table, say, table_width

    with console_reporter() as reporter:
        results = edge.benchmark(suite, output, **given, reporter=reporter)
    from clip_rd_edge.benchmarking.report.findings import busy_remark, recommendation
    from clip_rd_edge.benchmarking.report.text import terminal_tables

    for table in terminal_tables(results, table_width()):
        print_table(table)
    for remark in busy_remark(results):
        say(remark)
    if advice := recommendation(results):
        echo(advice.replace("**", ""), prose=True)
    for skipped in results.skipped:
        say(f"{skipped.label} was skipped: {skipped}")
    for task in results.missing:
        say(f"{task.name} is missing: {task.reason}")
    say(f"The report is {output / 'report.html'}")


def _compare(old: Path, new: Path, *, allow_busy: bool, as_json: bool) -> int:
    """Print the comparison of two results; return the exit code.

    It is 1 if there is a regression, else NOT_COMPARED if the accuracy on a task was not compared, or latencies were
    not and `allow_busy` is false.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import print_table, say
    from clip_rd_edge.utils.structs import to_json

    changes = edge.compare(old, new)
    if as_json:
        echo(to_json(changes), nl=False)
        return _exit_code(changes, allow_busy=allow_busy)
    if changes.latencies:
        print_table(_latency_table(changes))
    if changed := [change for change in changes.accuracies if change.verdict != "same"]:
        print_table(_accuracy_table(changed))
    if same := len(changes.accuracies) - len(changed):
        echo(f"{same} of {len(changes.accuracies)} accuracies are identical, question by question.")
    for name, reason in changes.lost.items():
        echo(f"{name} is missing in the new result: {reason}")
    for remark in changes.remarks:
        say(remark)
    count = changes.regressions
    if count:
        echo(f"{count} regression{'s' if count > 1 else ''}.")
    else:
        echo(_without_regression(changes))
    return _exit_code(changes, allow_busy=allow_busy)


def _without_regression(changes: Changes) -> str:
    """Say that there is no regression, as far as something was compared."""
    compared = ["accuracy"] * bool(changes.accuracies) + ["latency"] * bool(changes.latencies)
    count = len(changes.uncompared)  # the remarks name them
    gaps = [f"accuracy on {count} task{'s' if count > 1 else ''}"] * bool(count)
    gaps += ["latencies"] * (not changes.latencies)
    if not gaps:
        return "No regression."
    if not compared:
        return "Nothing was compared."
    return f"No regression in {' and '.join(compared)}; not compared: {', '.join(gaps)}."


def _exit_code(changes: Changes, *, allow_busy: bool) -> int:
    if changes.regressions:
        return 1
    return NOT_COMPARED if changes.uncompared or not (changes.latencies or allow_busy) else 0


def _latency_table(changes: Changes) -> Table:
    from clip_rd_edge.benchmarking import formatting
    from clip_rd_edge.benchmarking.report.text import plain_table

    table = plain_table("p50", "Old, ms", "New, ms", "Change", "Noise", "", left=("",))
    for change in changes.latencies:
        latencies = (formatting.three_digits(change.old_ms), formatting.three_digits(change.new_ms))
        difference = (formatting.signed_percent(change.change), f"± {100 * change.noise:.1f} %")
        table.add_row(f"{change.row}, {change.what}", *latencies, *difference, _verdict(change))
    return table


def _accuracy_table(changes: list[AccuracyChange]) -> Table:
    from clip_rd_edge.benchmarking import formatting
    from clip_rd_edge.benchmarking.report.text import plain_table

    table = plain_table("Accuracy, %", "Old", "New", "Points", "Paired interval", "", left=("",))
    for change in changes:
        figures = (
            formatting.percent(change.old),
            formatting.percent(change.new),
            formatting.signed_points(change.new - change.old),
        )
        name = f"{change.row}, {change.task}, {change.measure}"
        table.add_row(name, *figures, formatting.signed_interval(change.interval), _verdict(change))
    return table


def _verdict(change: LatencyChange | AccuracyChange) -> Text:
    from rich.text import Text

    return Text("within noise" if change.verdict == "noise" else change.verdict, style=_STYLES[change.verdict])
