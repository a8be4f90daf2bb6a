"""`clip-rd-edge quickstart`: the whole way on the embedded data."""

from __future__ import annotations

import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from clip_rd_edge.contract.images import ImageFile


@click.command("quickstart", short_help="The whole way on the embedded data, in minutes, on a CPU.")
@click.option("--student", default="resnet10t", show_default=True, help="resnet10t, mobilevit_xxs, … or any timm name.")
@click.option("--recipe", default="clip-rd", show_default=True, help="clip-rd, clip-kd, tinyclip, …")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the student.")
@click.option("--with-baseline", is_flag=True, help="Train the same student without a teacher, too, to compare.")
@click.option("--student-steps", type=click.IntRange(1), help="Training steps of the student.")
@click.option("--teacher-steps", type=click.IntRange(1), help="Training steps of the teacher.")
@click.option(
    "-o", "--output", "folder", default="quickstart", show_default=True, type=click.Path(path_type=Path),
    help="Where everything goes.",
)  # fmt: skip
def command(folder: Path, **options: Any) -> None:
    """Draw a data set, tune a teacher, distil a student, export, quantise, compare, classify.

    Interrupt it at any time: the same command goes on from there.
    """
    from clip_rd_edge.cli._models import first_answer, open_encoder
    from clip_rd_edge.cli._output import print_table
    from clip_rd_edge.cli._progress import progress_bar
    from clip_rd_edge.cli._stages import StageBar
    from clip_rd_edge.quickstart.pipeline import Settings, run_quickstart

    settings = Settings(folder=folder, **{name: value for name, value in options.items() if value is not None})
    began = time.perf_counter()
    with progress_bar() as bar:
        results = run_quickstart(settings, StageBar(bar), partial(open_encoder, threads=1), first_answer)

    from clip_rd_edge.benchmark.report.terminal import terminal_table

    print_table(terminal_table(results))
    _classify_one(folder)
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    click.echo(f"\nDone in {minutes} min {seconds} s. The report: {folder / 'report' / 'report.html'}")
    click.echo(_next_steps(folder))


def _classify_one(folder: Path) -> None:
    """Classify one picture of an emoji that was in no training pair, by the INT8 bundle."""
    from clip_rd_edge.contract.images import open_image
    from clip_rd_edge.data.emoji import zero_shot_task
    from clip_rd_edge.runtime.classifier import ZeroShotClassifier
    from clip_rd_edge.runtime.load import load

    picture = _sample_picture()
    task = zero_shot_task("unseen concepts")
    classifier = ZeroShotClassifier(load(folder / "bundles" / "int8"), task.labels)
    (answers,) = classifier.classify([open_image(picture)], top=3)
    truth = task.labels[task.targets[task.images.index(picture)]]
    click.echo(f"\nA picture of “{truth}”, which no training pair showed, among {len(task.labels)} such names:")
    for label, probability in answers:
        click.echo(f"  {probability:6.1%}  {label}{'  ✓' if label == truth else ''}")


def _sample_picture() -> ImageFile:
    from clip_rd_edge.data.emoji import zero_shot_task

    # The first of the split in a hashed order is as good as any, and not chosen for its answer.
    return zero_shot_task("unseen concepts").images[0]


def _next_steps(folder: Path) -> str:
    # Installed by make, the command is in .venv and not on the path: what is printed has to work as it stands.
    program = "clip-rd-edge" if shutil.which("clip-rd-edge") else os.path.relpath(sys.argv[0])
    return f"""
Try next:
  {program} classify {folder}/bundles/int8 {_sample_picture()} --labels "a cat" "a flag" "a clock"
  {program} search --help                    # find pictures of a folder by text
  {program} distill --data pairs.csv --teacher ViT-B-16 --teacher-pretrained laion400m_e32 \\
      --student mobilevit_s -o runs/mine      # your own pairs, your own teacher"""
