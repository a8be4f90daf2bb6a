"""`clip-rd-edge quickstart`: the whole way on the embedded data."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clip_rd_edge.cli._options import given

if TYPE_CHECKING:
    from clip_rd_edge.contract.task import ZeroShotTask


@click.command("quickstart", short_help="The whole way on the embedded data, in minutes, on a CPU.")
@click.option("--student", default="resnet10t", show_default=True, help="resnet10t, mobilevit_xxs, … or any timm name.")
@click.option("--recipe", default="clip-rd", show_default=True, help="clip-rd, clip-kd, tinyclip, …")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the student.")
@click.option("--with-baseline", is_flag=True, help="Train the same student without a teacher, too, to compare.")
@click.option("--student-steps", type=click.IntRange(1), help="Training steps of the student.")
@click.option("--teacher-steps", type=click.IntRange(1), help="Training steps of the teacher.")
@click.option(
    "-o", "--output", default="quickstart", show_default=True, type=click.Path(path_type=Path),
    help="Where everything goes.",
)  # fmt: skip
def command(output: Path, **options: Any) -> None:
    """Draw a data set, tune a teacher, distil a student, export, quantise, compare, classify.

    Interrupt it at any time: the same command resumes.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.benchmarking.report.text import terminal_table
    from clip_rd_edge.cli._console import console_reporter, print_table

    began = time.perf_counter()
    with console_reporter() as reporter:
        results = edge.quickstart(output, **given(**options), reporter=reporter)
        reporter.end_chapter()
    print_table(terminal_table(results))
    _classify_one(output)
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    click.echo(f"\nDone in {minutes} min {seconds} s. The report: {output / 'report' / 'report.html'}")
    click.echo(_next_steps(output))


def _unseen() -> ZeroShotTask:
    from clip_rd_edge.data.emoji import zero_shot_task

    return zero_shot_task("unseen concepts")


def _classify_one(folder: Path) -> None:
    """Classify one image of an emoji that was in no training pair, by the INT8 bundle."""
    import clip_rd_edge as edge
    from clip_rd_edge.contract.images import open_image

    task = _unseen()
    # The first of the split in a hashed order is as good as any, and not chosen for its answer.
    answers = edge.load(folder / "bundles" / "int8").classify(open_image(task.images[0]), labels=task.labels, top=3)
    truth = task.labels[task.targets[0]]
    click.echo(f"\nAn image of “{truth}”, which no training pair showed, among {len(task.labels)} such names:")
    for label, probability in answers:
        click.echo(f"  {probability:6.1%}  {label}{'  ✓' if label == truth else ''}")


def _next_steps(folder: Path) -> str:
    # Installed by make, the command is in .venv and not on the path: what is printed has to work as it stands.
    program = "clip-rd-edge" if shutil.which("clip-rd-edge") else os.path.relpath(sys.argv[0])
    task = _unseen()
    labels = [task.labels[task.targets[i]] for i in range(4)]
    shown = " ".join(f'"{label}"' for label in labels)
    return f"""
Try next:
  {program} classify {folder}/bundles/int8 {task.images[0]} --labels {shown}
  {program} demo {folder}/bundles/fp32 {folder}/bundles/int8    # a page for camera and images; needs the extra [demo]
  {program} distill --data pairs.csv --teacher ViT-B-16 --teacher-pretrained laion400m_e32 \\
      --student mobilevit_s -o runs/mine      # your own pairs, your own teacher"""
