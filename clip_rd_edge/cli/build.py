"""The commands that run every stage: `build`, on a user's own images, and `quickstart`, on the built-in data."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import clip_rd_edge as edge
from clip_rd_edge.cli.options import command_of
from clip_rd_edge.cli.output import echo, note, reported
from clip_rd_edge.cli.train import OWN_DATA_EXAMPLE
from clip_rd_edge.settings.measuring import Build, Quickstart
from clip_rd_edge.utils.text import as_word

if TYPE_CHECKING:
    from clip_rd_edge.data.tasks import ZeroShotTask


@command_of(Build, "build")
def build(given: dict[str, Any]) -> None:
    """Build a bundle for a device from your own images: look, hold back, distil, export, compare.

    \b
    clip-rd-edge build photos/ --target cpu-arm -o flowers
    clip-rd-edge build pairs.csv --target cpu-x86 --hours 8 -o captions \\
        --teacher ViT-B-16@laion400m_e32
    clip-rd-edge build photos/ --labels "a cat" "a dog" --target cpu-arm -o pets

    DATA is a folder with a sub-folder of images for each class, a table of images and captions, or a folder of images
    with --labels. Each stage keeps its result in OUT. The same command resumes an interrupted build, and does nothing
    where nothing has changed; with another --target, it trains nothing again.
    """
    from clip_rd_edge.runtime.labels import parse_labels
    from clip_rd_edge.utils.text import duration

    started = time.perf_counter()
    built = reported(edge.build, **{**given, "labels": parse_labels(given.get("labels", ()))})
    for number, line in enumerate(built.verdict):
        echo(line if not number else f"- {line}")
    echo(f"\nReport: {built.report}\nBundle: {built.folder}\nDone in {duration(time.perf_counter() - started)}.")
    note(f"next: clip-rd-edge classify {as_word(built.folder)} photo.jpg")
    note(f"on the device: copy {as_word(built.folder)}; its commands: clip-rd-edge targets {built.folder.name}")
    note(f"more: clip-rd-edge evaluate {as_word(built.folder)} --task {as_word(built.held_out)} --per-class")


@command_of(Quickstart, "quickstart")
def quickstart(given: dict[str, Any]) -> None:
    """Create a data set, fine-tune a teacher, distil a student, export, quantise, compare and classify.

    \b
    clip-rd-edge quickstart
    clip-rd-edge quickstart --student mobilevit_xxs --with-baseline -o try

    The data set, 1,900 emoji with their names, is built in. All of it takes minutes on two cores, most of them for the
    two trainings. The command can be interrupted at any time: the same command resumes.
    """
    from clip_rd_edge.cli.console import print_table, table_width
    from clip_rd_edge.utils.text import duration

    started, output = time.perf_counter(), Path(given.get("output", Quickstart().output))
    results = reported(edge.quickstart, **given)
    from clip_rd_edge.benchmarking.tables import terminal_tables

    for table in terminal_tables(results, table_width()):
        print_table(table)
    _classify_example(output)
    echo(f"\nDone in {duration(time.perf_counter() - started)}. Report: {output / 'report' / 'report.html'}")
    echo(_next_steps(output))


def _unseen_concepts() -> ZeroShotTask:
    from clip_rd_edge.data.emoji import zero_shot_task

    return zero_shot_task("unseen concepts")


def _classify_example(folder: Path) -> None:
    """Classify an emoji that was in no training pair with the INT8 bundle, and print the result."""
    from clip_rd_edge.bundle.images import open_image

    task = _unseen_concepts()
    # The first image of the split, which is in hashed order: not selected for a good result.
    predictions = edge.load(folder / "bundles" / "int8").classify(open_image(task.images[0]), labels=task.labels, top=3)
    truth = task.labels[task.targets[0]]
    echo(f"\nAn image of “{truth}”, a concept in no training pair, among {len(task.labels)} such concepts:")
    for label, probability in predictions:
        echo(f"  {probability:6.1%}  {label}{'  ✓' if label == truth else ''}")


def _next_steps(folder: Path) -> str:
    """Return commands to go on with, which work when copied."""
    # After `make quickstart`, it is in .venv and not on PATH.
    program = "clip-rd-edge" if shutil.which("clip-rd-edge") else f"{as_word(sys.executable)} -m clip_rd_edge"
    fp32, int8 = (as_word(folder / "bundles" / precision) for precision in ("fp32", "int8"))
    task = _unseen_concepts()
    # Of which everybody has an image in mind; releases of the packages differ in their emoji.
    lively = [name for name in ("mushroom", "rocket", "tiger", "snowman") if name in task.labels]
    labels = lively or list(dict.fromkeys(task.labels))[:4]
    image = task.images[task.targets.index(task.labels.index(labels[0]))]
    quoted = " ".join(f'"{label}"' for label in labels)
    steps = f"""
Try next:
  {program} classify {int8} \\
      {as_word(str(image))} \\
      --labels {quoted}
  # a web page for camera and images; needs the extra [demo]
  {program} demo {fp32} {int8}
  # your own pairs and teacher
  {program} {OWN_DATA_EXAMPLE}
  # photographs in the report as well, from a Debian package
  python -m benchmarks.data.tuxpaint photos
  {program} quickstart -o {as_word(folder)} --photos photos"""
    # Other shells break lines in other ways.
    return steps if os.name == "posix" else re.sub(r" \\\n +", " ", steps)
