"""`clip-rd-edge embed`: compute a teacher's embeddings once, for many runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import (
    PRECISION_WORDS,
    GroupedCommand,
    NameChoice,
    PathName,
    complete_data,
    complete_recipe,
    data_options,
    drop_none,
    grouped,
    ray_option,
)
from clip_rd_edge.utils.printable import as_word

_data, _teacher, _output = grouped("Data"), grouped("Teacher"), grouped("Output")


@click.command("embed", cls=GroupedCommand, short_help="Compute a teacher's embeddings once, for many runs.")
@_data("--data", metavar="SOURCE", shell_complete=complete_data, help="The pairs, as for distill.  [default: none]")
@data_options
@_teacher(
    "--teacher", required=True, metavar="MODEL", multiple=True, help="The teacher, as for distill; can be repeated."
)
@_teacher(
    "--teacher-pretrained", also="pretrained", metavar="TAG|FILE",
    help="Pretrained tag or checkpoint file, for a teacher given by NAME.  [default: none]",
)  # fmt: skip
@_teacher(
    "--precision", type=NameChoice(["fp32", "bf16", "fp16"], meant=PRECISION_WORDS), default="fp32", show_default=True,
    metavar="NAME",
    help="Precision that the teacher computes in: fp32, bf16 or fp16.",
)  # fmt: skip
@_teacher(
    "--views", metavar="N", type=click.IntRange(1), default=1, show_default=True,
    help="Number of fixed crops per image.",
)  # fmt: skip
@_teacher(
    "--recipe", metavar="NAME|FILE", shell_complete=complete_recipe, default="clip-rd", show_default=True,
    help="Recipe whose range of crops is used.",
)  # fmt: skip
@_teacher("--seed", metavar="N", type=int, default=0, show_default=True, help="Random seed of the crops.")
@_teacher(
    "--student", metavar="MODEL",
    help="The student of the run, if it is a trained one or a JSON file, for crops of its shape.  [default: square]",
)  # fmt: skip
@_output(
    "-o",
    "--output",
    also="teacher_cache",
    required=True,
    type=PathName(),
    metavar="CACHE",
    help="Folder for distill --teacher-cache.",
)
@ray_option
def command(output: Path, **options: Any) -> None:
    """Compute a teacher's embeddings once, for many runs of distill with --teacher-cache.

    \b
    clip-rd-edge embed --data pairs.csv --teacher runs/teacher --views 8 -o cache
    clip-rd-edge distill --data pairs.csv --teacher runs/teacher --views 8 \\
        --teacher-cache cache --student resnet18 -o runs/cached

    An interrupted command is continued by the same one. Under torchrun, and with --ray, many machines share the work.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter, first_process, say

    with console_reporter() as reporter:
        folder = edge.embed(output=output, **drop_none(**options), reporter=reporter)
    if first_process:
        cache = as_word(folder)
        say(f"next: clip-rd-edge distill, with the same data, teacher and views, and --teacher-cache {cache}")
        echo(folder)
