"""`clip-rd-edge probe-teachers`: which teacher for a student?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import GroupedCommand, PathName, complete_task, drop_none, grouped
from clip_rd_edge.cli.distill import command as distill

if TYPE_CHECKING:
    from clip_rd_edge.distillation.probe import Probe

_probe, _output = grouped("Probe"), grouped("Output")
# Options of distill that make no sense here, or are declared below.
_NOT_SHARED = {"teacher", "teacher_pretrained", "teacher_cache", "tasks", "steps", "epochs", "quantize", "tuned_share"}
_NOT_SHARED |= {"output", "resume", "accept_changes", "checkpoint_every", "report_to", "evaluate_every"}
_NOT_SHARED |= {"global_logits"}  # for several processes


@click.command("probe-teachers", cls=GroupedCommand, short_help="Rank teachers for a student by short runs.")
@click.argument("teachers", nargs=-1, required=True)
@_probe(
    "--task", "tasks", metavar="NAME", multiple=True, required=True, shell_complete=complete_task,
    help="Rank by the student's accuracy on this task (see clip-rd-edge evaluate), or the mean of several.",
)  # fmt: skip
@_probe(
    "--steps", metavar="N", type=click.IntRange(1), default=200, show_default=True, help="Training steps per teacher."
)
@_output("-o", "--output", required=True, type=PathName(), metavar="FOLDER", help="Folder for the runs.")
@_output("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(teachers: tuple[str, ...], output: Path, as_json: bool, **options: Any) -> None:
    """Train a student from each of the TEACHERS for a few steps, and rank them by what it learned.

    \b
    clip-rd-edge probe-teachers ViT-B-16@openai ViT-L-14@openai -o probe \\
        --data pairs.csv --student resnet18 --task my-images/

    A teacher is ARCHITECTURE@TAG, local-dir:PATH or hf-hub:ORG/REPO. The largest is often not the best: a small student
    learns little from one that is far above it. Short runs rank by what is learned first, so let the first two compete
    for longer where they are close. An interrupted command is continued by the same one.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter, print_table, say

    with console_reporter() as reporter:
        probe = edge.probe_teachers(teachers, output=output, **drop_none(**options), reporter=reporter)
    if as_json:
        from clip_rd_edge.utils.structs import to_json

        echo(to_json(probe), nl=False)
        return
    print_table(_table(probe))
    if not probe.is_certain():
        say("the first two are within the error of these images: let them compete for longer, or on more images")


def _table(probe: Probe) -> Any:
    from clip_rd_edge.benchmarking.metrics import primary_metric
    from clip_rd_edge.benchmarking.report.text import plain_table

    tasks = probe.teachers[0].student_scores
    table = plain_table(f"Teacher of {probe.student}, {probe.steps:,} steps, %", *tasks, "Mean", "Teacher's own")
    for teacher in probe.teachers:
        scores = [f"{100 * primary_metric(teacher.student_scores[name]):.1f}" for name in tasks]
        table.add_row(
            teacher.teacher, *scores, f"{100 * teacher.student_mean:.1f}", f"{100 * teacher.teacher_mean:.1f}"
        )
    return table


# The data, the student and how it is trained: the options of distill, in their order, before the output.
command.params[-2:-2] = [parameter for parameter in distill.params if parameter.name not in _NOT_SHARED]
