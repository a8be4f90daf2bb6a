"""The commands that measure: `evaluate`, `benchmark` and `evidence`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import clip_rd_edge as edge
from clip_rd_edge.cli.options import CommandGroup, GroupedCommand, command_of, completed_by, grouped
from clip_rd_edge.cli.output import echo, echo_json, note, reported
from clip_rd_edge.errors import UsageError
from clip_rd_edge.settings.measuring import Benchmark, Evaluate, EvidenceRun
from clip_rd_edge.utils.text import csv_row

if TYPE_CHECKING:
    from clip_rd_edge.benchmarking.metrics import Score
    from clip_rd_edge.benchmarking.regression import Changes
    from clip_rd_edge.benchmarking.results import Results

NOT_COMPARED = 3  # exit code
_COLUMNS = ("task", "class", "predicted", "images")  # of the table of confusions
_FOLDER = "folder"  # a further column, if a classnames.txt names folders
_suite, _comparison, _output = grouped("Suite"), grouped("Comparison"), grouped("Output")


@command_of(Evaluate, "evaluate")
@_output(
    "--confusion", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Write the confusion matrices as CSV: one row per task, class and predicted label that occur together, with "
    "the number of images. Of files that exist, only an earlier one of these is replaced.  [default: none]",
)  # fmt: skip
@_output("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def evaluate(given: dict[str, Any], confusion: Path | None, as_json: bool) -> None:
    """Measure zero-shot accuracy and retrieval of MODEL.

    \b
    clip-rd-edge evaluate bundle --task my-images/ --json
    clip-rd-edge evaluate bundle --task my-images/ --per-class --confusion all.csv
    clip-rd-edge evaluate runs/emoji --task emoji:unseen-style \\
        --task emoji:unseen-style:retrieval

    MODEL is a bundle (which needs no PyTorch), a run's folder, or any model that open_clip loads: local-dir:PATH,
    hf-hub:ORG/REPO, or an architecture with --pretrained.

    Labels are put into the data set's own prompt templates; without any, into CLIP's 80 for ImageNet. The table shows
    which were used. Accuracy depends on them: compare models with the same.
    """
    from clip_rd_edge.api.measuring import evaluate_model

    if confusion is not None:
        _require_free(confusion)
    per_class = "per_class" in given
    request = {**given, "per_class": per_class or confusion is not None}
    model, scores = reported(lambda **options: evaluate_model(Evaluate(**options)), **request)
    if as_json:
        echo_json({"model": model.describe(), "scores": scores}, indented=True)
    else:
        from clip_rd_edge.benchmarking.metrics import ZeroShotScore
        from clip_rd_edge.benchmarking.tables import class_table, score_tables
        from clip_rd_edge.cli.console import print_table

        tables = score_tables(scores)
        if per_class:
            tables += [class_table(score) for score in scores if isinstance(score, ZeroShotScore)]
        for table in tables:
            print_table(table)
    if confusion is not None:  # last: what was measured is shown even if this file cannot be written
        _write_confusion(confusion, scores)


def _require_free(path: Path) -> None:
    from clip_rd_edge.bundle.outputs import require_output_file

    headers = tuple(f"{csv_row(*columns)}\n".encode() for columns in (_COLUMNS, (*_COLUMNS, _FOLDER)))
    require_output_file(
        path, lambda beginning: beginning.startswith(headers), what="an earlier table of confusions",
        option="{confusion}",
    )  # fmt: skip


def _write_confusion(path: Path, scores: Sequence[Score]) -> None:
    from clip_rd_edge.benchmarking.metrics import ZeroShotScore
    from clip_rd_edge.utils.files import named_failures, write_text

    classes = [(score.task, row) for score in scores if isinstance(score, ZeroShotScore) for row in score.per_class]
    has_folders = any(row.folder for _, row in classes)
    rows = [csv_row(*_COLUMNS, *([_FOLDER] if has_folders else []))]
    for task, row in classes:
        for predicted, images in row.predicted.items():
            rows.append(csv_row(task, row.label, predicted, images, *([row.folder] if has_folders else [])))
    with named_failures(path, hint="choose another --confusion"):
        write_text(path, "".join(f"{row}\n" for row in rows))


def _suites() -> list[str]:
    from clip_rd_edge.benchmarking.suite import shipped_suites

    return shipped_suites()


@command_of(Benchmark, "benchmark")
@click.argument("suite", required=False, shell_complete=completed_by(_suites))
@_suite("--init", is_flag=True, help="Print a suite with a comment on each key, to start your own from.")
@_comparison(
    "--compare", "compared", nargs=2, metavar="OLD NEW", type=click.Path(),
    help="Compare two results (files or folders); exit code 1 if there is a regression, 3 if there is none but "
    "accuracies or latencies could not be compared.  [default: off]",
)  # fmt: skip
@_comparison("--allow-busy", is_flag=True, help="With --compare: exit with 0 if only latencies could not be compared.")
@_comparison("--json", "as_json", is_flag=True, help="With --compare: print JSON instead of tables.")
@_output("-o", "--output", metavar="FOLDER", type=click.Path(), help="Folder for the report.  [required to measure]")
def benchmark(
    given: dict[str, Any],
    suite: str | None,
    init: bool,
    output: str | None,
    compared: tuple[str, str] | None,
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
    The table is printed to stdout; results.json, report.html and accuracy-latency.png are written to FOLDER.
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
    from clip_rd_edge.benchmarking.results import is_results

    if compared is not None:
        sys.exit(_compare(*compared, allow_busy=allow_busy, as_json=as_json))
    required = {name: given[name] for name in ("budget_ms", "min_accuracy") if name in given}
    if suite is not None and output is None and required and is_results(Path(suite)):
        echo(edge.recommend(suite, **required))
        return
    if suite is None or output is None:
        missing = "SUITE" if suite is None else "-o FOLDER"
        raise UsageError(f"{missing} is missing.", hint="clip-rd-edge benchmark quickstart -o report")
    results = reported(edge.benchmark, suite=suite, output=output, **given)
    _show(results)
    note(f"The report is {Path(output) / 'report.html'}")


def _show(results: Results) -> None:
    from clip_rd_edge.benchmarking.findings import busy_remark, recommendation
    from clip_rd_edge.benchmarking.tables import terminal_tables
    from clip_rd_edge.cli.console import print_table, table_width

    for table in terminal_tables(results, table_width()):
        print_table(table)
    for remark in busy_remark(results):
        note(remark)
    if advice := recommendation(results):
        echo(advice.replace("**", ""))
    for skipped in results.skipped:
        note(f"{skipped.label} was skipped: {skipped}")
    for task in results.missing:
        note(f"{task.name} is missing: {task.reason}")


def _compare(old: str, new: str, *, allow_busy: bool, as_json: bool) -> int:
    """Print the comparison of two results; return the exit code.

    It is 1 if there is a regression, else NOT_COMPARED if the accuracy on a task was not compared, or latencies were
    not and `allow_busy` is false.
    """
    from clip_rd_edge.cli.console import print_table

    changes = edge.compare(old, new)
    if as_json:
        echo_json(changes, indented=True)
    else:
        from clip_rd_edge.benchmarking.tables import change_tables

        for table in change_tables(changes):
            print_table(table)
        same = [change.verdict for change in changes.accuracies].count("same")
        if same:
            echo(f"{same} of {len(changes.accuracies)} accuracies are identical, question by question.")
        for name, reason in changes.lost.items():
            echo(f"{name} is missing in the new result: {reason}")
        for remark in changes.remarks:
            note(remark)
        count = changes.regressions
        echo(f"{count} regression{'s' if count > 1 else ''}." if count else _without_regression(changes))
    if changes.regressions:
        return 1
    return NOT_COMPARED if changes.uncompared or not (changes.latencies or allow_busy) else 0


def _without_regression(changes: Changes) -> str:
    """Report that nothing got worse, among what was compared."""
    count = len(changes.uncompared)  # the remarks name them
    gaps = [f"accuracy on {count} task{'s' if count > 1 else ''}"] * bool(count)
    gaps += ["latencies"] * (not changes.latencies)
    return f"No regression; not compared: {', '.join(gaps)}." if gaps else "No regression."


@click.group("evidence", cls=CommandGroup)
def evidence() -> None:
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
    results = reported(edge.evidence_run, **given)
    echo(edge.evidence_report(Path(given["output"]) / f"{results.suite.name}.json"))


evidence.add_command(run)


@evidence.command("report", cls=GroupedCommand, short_help="Make tables and figures of finished runs.")
@click.argument("results", metavar="RESULTS...", nargs=-1, required=True, type=click.Path())
@_output(
    "--into", metavar="FILE", type=click.Path(),
    help="Write the tables between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of FILE, with the suite's "
    "NAME, and the figures beside RESULTS.  [default: print the tables to stdout]",
)  # fmt: skip
def report(results: tuple[str, ...], into: str | None) -> None:
    """Make tables and figures of results; nothing is trained.

    \b
    clip-rd-edge evidence report evidence/method-evidence.json --into README.md
    clip-rd-edge evidence report seed-0/report seed-1/report seed-2/report

    RESULTS is the NAME.json that `evidence run` writes. Or several results of one benchmark, for instance of different
    seeds, each a results.json or its folder: then the table has means and standard deviations of accuracy.
    """
    tables = edge.evidence_report(results, into=into)
    if into is None:
        echo(tables)
    else:
        note(f"written: {into}")
