"""`clip-rd-edge distill`: train a compact student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clip_rd_edge.cli._options import GroupedCommand, given, grouped

_data, _teacher, _student = grouped("Data"), grouped("Teacher"), grouped("Student")
_training, _memory, _output = grouped("Training"), grouped("Memory and speed"), grouped("Output")


@click.command("distill", cls=GroupedCommand, short_help="Train a compact student from a teacher and your pairs.")
@_data(
    "--data",
    required=True,
    help="CSV or TSV of images and captions (columns filepath,title), WebDataset shards "
    "(a/{000..012}.tar::b.tar), or: emoji.",
)
@_data("--csv-img-key", default="filepath", show_default=True, help="Column with the images.")
@_data("--csv-caption-key", default="title", show_default=True, help="Column with the captions.")
@_data(
    "--train-data-upsampling-factors", metavar="W::W",
    help="How often an epoch shows each source of shards, such as 1::2.",
)  # fmt: skip
@_data("--json-caption-key", help="Captions from this key of the shards' .json, not from .txt.")
@_data(
    "--max-bad", type=click.FloatRange(0, 1, max_open=True), default=0.01, show_default=True,
    help="Share of the samples that may be damaged; they are skipped and counted.",
)  # fmt: skip
@_data("--workers", type=click.IntRange(-1), default=-1, help="Loading processes.  [default: half the cores]")
@_teacher("--teacher", help="NAME (with --teacher-pretrained), local-dir:PATH or hf-hub:ORG/REPO, as in open_clip.")
@_teacher("--teacher-pretrained", help="open_clip's tag, or a checkpoint file, for a teacher given by NAME.")
@_teacher(
    "--teacher-cache",
    type=click.Path(file_okay=False),
    help="Folder for the teacher's embeddings, computed once; needs --views.",
)
@_teacher("--views", type=click.IntRange(0), default=0, help="Fixed crops per image.  [default: new ones every epoch]")
@_student(
    "--student",
    required=True,
    help="mobilevit_xxs, resnet18, … or any timm name; a run's folder or local-dir:PATH continues a trained model.",
)
@_student("--image-size", type=click.IntRange(16), default=224, show_default=True, help="Edge in pixels.")
@_student(
    "--text", default="standard", show_default=True,
    help="Size of the text tower: tiny, small, standard, or WIDTHxLAYERS such as 512x6.",
)  # fmt: skip
@_student("--context-length", type=click.IntRange(4), default=77, show_default=True, help="Tokens per caption.")
@_student("--embedding-size", type=click.IntRange(0), default=0, help="Its width.  [default: the teacher's]")
@_student("--pretrained-image", metavar="timm|FILE", help="Weights the student's image trunk starts from.")
@_student(
    "--pretrained-text", metavar="teacher|FILE",
    help="Weights the student's text tower starts from: evenly spaced layers of the teacher's or of a checkpoint's.",
)  # fmt: skip
@_student("--freeze-text", is_flag=True, help="Train nothing of the text tower but its projection.")
@_student(
    "--quantize", type=click.Choice(["int8"]),
    help="Fine-tune a trained student for INT8: 300 steps at 1e-4, unless --steps and --learning-rate say otherwise.",
)  # fmt: skip
@_training("--recipe", default="clip-rd", show_default=True, help="clip-rd, clip-kd, tinyclip, clip, … or a YAML file.")
@_training("--epochs", type=click.IntRange(1), help="Rounds over the data.  [default: the recipe's]")
@_training("--steps", type=click.IntRange(1), help="Training steps, instead of epochs.")
@_training("--batch-size", type=click.IntRange(1), help="Pairs per step.  [default: the recipe's]")
@_training("--learning-rate", "--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@_training("--ema-decay", type=click.FloatRange(0, 1, max_open=True), help="Keep a moving average, such as 0.999.")
@_training("--seed", type=int, default=0, show_default=True, help="Of weights, batches and crops.")
@_training("--task", "tasks", multiple=True, help="Evaluate on this task (see evaluate) and keep RUN/best.")
@_training("--evaluate-every", type=click.IntRange(0), default=0, help="In steps.  [default: at the end]")
@_memory("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), help="auto measures what is faster.")
@_memory("--compile", is_flag=True, help="Run the student through torch.compile.")
@_memory("--gradient-checkpointing", is_flag=True, help="Compute activations twice, to save memory.")
@_memory("--accumulate", type=click.IntRange(1), default=1, help="Chunks per batch, to save memory.")
@_memory("--loss-block", type=click.IntRange(0), default=0, help="Pairs the loss sees together, to save memory.")
@_memory("--global-logits", is_flag=True, help="Under torchrun: each process computes the loss of all pairs.")
@_output("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="RUN", help="The run's folder.")
@_output("--resume", is_flag=True, help="Continue from the newest checkpoint in RUN.")
@_output(
    "--checkpoint-every", type=click.IntRange(1), default=500, show_default=True, help="Steps between checkpoints."
)
@_output("--report-to", type=click.Choice(["tensorboard"]), help="Write the metrics there, too: RUN/tensorboard.")
def command(output: Path, **options: Any) -> None:
    """Train a compact student from a teacher and your pairs.

    The student is written to RUN/student, a folder that open_clip loads as local-dir:RUN/student.

    \b
    clip-rd-edge distill --data pairs.csv --teacher ViT-B-16 --teacher-pretrained laion400m_e32 \\
        --student mobilevit_s -o runs/first
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter, first_process, say
    from clip_rd_edge.contract.checkpoint import STUDENT_FOLDER

    with console_reporter() as reporter:
        run = edge.distill(output=output, **given(**options), reporter=reporter)
    say(f"next: clip-rd-edge export {run} --precision int8 -o {run}/bundle")
    if first_process:
        click.echo(run / STUDENT_FOLDER)
