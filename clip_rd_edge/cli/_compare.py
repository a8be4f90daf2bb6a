"""`clip-rd-edge benchmark --compare OLD NEW`: what has changed, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from clip_rd_edge.benchmark import formatting as formats
from clip_rd_edge.benchmark.regression import AccuracyChange, Changes, LatencyChange, Verdict, compare_runs
from clip_rd_edge.benchmark.results import RESULTS, read_results
from clip_rd_edge.cli._output import plain_table, print_table
from clip_rd_edge.cli._progress import say
from clip_rd_edge.utils.io import to_json

_STYLES: dict[Verdict, str] = {"regression": "bold red", "improvement": "green", "noise": "dim", "same": "dim"}


def compare(old: Path, new: Path, *, as_json: bool) -> int:
    """Print what has changed; returns the exit code, 1 where something became worse.

    Raises:
        InputError, ConfigError: a result is missing, damaged, or has no model in common with the other.
    """
    before, after = (read_results(path / RESULTS if path.is_dir() else path) for path in (old, new))
    changes = compare_runs(before, after)
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
    table = plain_table("p50", "Old, ms", "New, ms", "Change", "Noise", "", left=("",))
    for each in changes.latencies:
        figures = (formats.milliseconds(each.old_ms), formats.milliseconds(each.new_ms))
        compared = (formats.signed_percent(each.change), f"± {100 * each.noise:.1f} %")
        table.add_row(f"{each.row}, {each.what}", *figures, *compared, _verdict(each))
    return table


def _accuracy_table(shown: list[AccuracyChange]) -> Table:
    table = plain_table("Right answers, %", "Old", "New", "Points", "Interval, paired", "", left=("",))
    for each in shown:
        figures = (formats.percent(each.old), formats.percent(each.new), formats.signed_points(each.new - each.old))
        name = f"{each.row}, {each.task}, {each.measure}"
        table.add_row(name, *figures, formats.signed_interval(each.interval), _verdict(each))
    return table


def _verdict(each: LatencyChange | AccuracyChange) -> Text:
    return Text("within noise" if each.verdict == "noise" else each.verdict, style=_STYLES[each.verdict])
