"""`clip-rd-edge distill`: train a compact student."""

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
    complete_student,
    complete_task,
    completed_by,
    data_options,
    drop_none,
    grouped,
)
from clip_rd_edge.utils.printable import as_word

_data, _teacher, _student = grouped("Data"), grouped("Teacher"), grouped("Student")
_training, _memory, _output = grouped("Training"), grouped("Memory and speed"), grouped("Output")
# The first command that a reader of the README, of the guide, of the help and of the quickstart's output is shown.
OWN_DATA_EXAMPLE = """distill --data pairs.csv --batch-size 256 -o runs/first \\
      --teacher ViT-B-16 --teacher-pretrained laion400m_e32 \\
      --student resnet18 --pretrained-image timm \\
      --text 512x6 --pretrained-text teacher"""


@click.command(
    "distill", cls=GroupedCommand, short_help="Train a compact student from a teacher and image-caption pairs."
)
@_data(
    "--data",
    metavar="SOURCE",
    shell_complete=complete_data,
    help="CSV, TSV or Parquet file of images and captions (columns filepath,title), WebDataset shards "
    "(a/{000..012}.tar::b.tar), or emoji for the built-in data set.  [default: none; see --images]",
)
@data_options
@_teacher(
    "--teacher",
    metavar="MODEL",
    multiple=True,
    help="The teacher: an open_clip NAME@TAG (or NAME with --teacher-pretrained), local-dir:PATH, hf-hub:ORG/REPO or a "
    "run's folder; or stored:FILE, for shards with stored embeddings in MobileCLIP's format. Can be repeated: the "
    "student then learns from all of them together.  [default: none, for recipes without a teacher]",
)
@_teacher(
    "--teacher-pretrained",
    also="pretrained",
    metavar="TAG|FILE",
    help="Pretrained tag or checkpoint file, for a teacher given by NAME.  [default: none]",
)
@_teacher(
    "--teacher-cache",
    type=PathName(file_okay=False, path_type=str),
    metavar="FOLDER",
    help="Folder for caching the teachers' embeddings, which are then computed only once; requires --views.  "
    "[default: none]",
)
@_teacher(
    "--views",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    help="Number of fixed crops per image.  [default: new crops every epoch]",
)
@_student(
    "--student",
    metavar="NAME|MODEL",
    shell_complete=complete_student,
    required=True,
    help="The student: mobilevit_xxs, resnet18, … or any timm name; or a trained model to fine-tune: a run's folder or "
    "local-dir:PATH.",
)
@_student(
    "--image-size",
    type=click.IntRange(16),
    metavar="PIXELS",
    help="Edge of the input images in pixels.  [default: 224, or the trained model's]",
)
@_student(
    "--text", metavar="SIZE|MODEL",
    shell_complete=completed_by(("tiny", "small", "standard", "teacher")),
    help="Size of the text tower: tiny, small, standard, or WIDTHxLAYERS such as 512x6; or the folder of a model, for "
    "its text tower; or teacher, for that of the (first) teacher, of which only the projection is trained.  "
    "[default: standard, or the trained model's]",
)  # fmt: skip
@_student(
    "--context-length",
    metavar="TOKENS",
    type=click.IntRange(4),
    help="Max tokens per caption.  [default: 77, or that of the model whose text tower it is]",
)
@_student(
    "--embedding-size",
    metavar="N",
    type=click.IntRange(0),
    default=0,
    help="Numbers per embedding.  [default: the teacher's, or the sum of all teachers', else 512]",
)
@_student(
    "--pretrained-image", metavar="timm|package|teacher|FILE",
    shell_complete=completed_by(("timm", "package", "teacher")),
    help="Initial weights of the student's image trunk; package: from an installed package, for efficientnet_lite0; "
    "teacher: the (first) teacher's whole image tower, of the same architecture.  "
    "[default: random]",
)  # fmt: skip
@_student(
    "--pretrained-text", metavar="tokens|teacher|FILE", shell_complete=completed_by(("tokens", "teacher")),
    help="Initial weights of the student's text tower. tokens: only those of the token embeddings, which are what the "
    "teacher says of each token. teacher: evenly spaced layers of the (first) teacher's. FILE: of a checkpoint's.  "
    "[default: random]",
)  # fmt: skip
@_student("--freeze-text", is_flag=True, help="Train only the projection of the text tower.")
@_student(
    "--freeze-text-layers", type=click.IntRange(0), default=0, show_default=True, metavar="N",
    help="Do not train the first N groups of layers of the text tower, of which the first is the embeddings of the "
    "tokens: steps are faster, and a trained tower keeps what it knows of words that no caption has.",
)  # fmt: skip
@_student(
    "--freeze-image", type=click.IntRange(0), default=0, show_default=True, metavar="N",
    help="Do not train the first N groups of layers of the image tower, as timm groups them: steps are faster, and a "
    "trained model forgets less.",
)  # fmt: skip
@_student(
    "--freeze-norms", is_flag=True,
    help="Keep the statistics of the batch norms: a trained model then forgets less of what is not in the data.",
)  # fmt: skip
@_student(
    "--tuned-share", metavar="FRACTION", type=click.FloatRange(0, 1), default=1.0, show_default=True,
    help="Share of the trained weights in the result; the rest are those that a trained model started from.",
)  # fmt: skip
@_student(
    "--quantize", type=NameChoice(["int8"]),
    help="Fine-tune a trained student for INT8: 300 steps at learning rate 1e-4, unless --steps or --learning-rate is "
    "set.  [default: off]",
)  # fmt: skip
@_training(
    "--recipe",
    metavar="NAME|FILE",
    shell_complete=complete_recipe,
    default="clip-rd",
    show_default=True,
    help="Training recipe: clip-rd, clip-kd, tinyclip, clip, … or a YAML file.",
)
@_training("--epochs", type=click.IntRange(1), metavar="N", help="Passes over the data.  [default: the recipe's]")
@_training(
    "--steps", type=click.IntRange(1), metavar="N",
    help="Number of training steps, instead of --epochs.  [default: as many as the epochs have]",
)  # fmt: skip
@_training("--batch-size", type=click.IntRange(1), metavar="PAIRS", help="Pairs per step.  [default: the recipe's]")
@_training(
    "--learning-rate",
    "--lr",
    metavar="X",
    type=click.FloatRange(0, min_open=True),
    help="Peak learning rate.  [default: the recipe's, times the root of --batch-size over the recipe's]",
)
@_training(
    "--ema-decay",
    metavar="DECAY",
    type=click.FloatRange(0, 1, max_open=True),
    help="Keep a moving average of the weights with this decay, such as 0.999.  [default: the recipe's]",
)
@_training(
    "--seed", metavar="N", type=int, default=0, show_default=True, help="Random seed of weights, batches and crops."
)
@_training(
    "--task",
    "tasks",
    metavar="NAME",
    shell_complete=complete_task,
    multiple=True,
    help="Evaluate on this task (see clip-rd-edge evaluate) and keep the best student in RUN/best; can be "
    "repeated.  [default: none]",
)
@_training(
    "--evaluate-every",
    type=click.IntRange(0),
    default=0,
    metavar="STEPS",
    help="Steps between evaluations on the tasks.  [default: only at the end]",
)
@_memory(
    "--precision",
    type=NameChoice(["auto", "fp32", "bf16", "fp16"], meant=PRECISION_WORDS),
    metavar="NAME",
    help="fp32, bf16, fp16, or auto, which measures which is fastest.  [default: the recipe's]",
)
@_memory("--compile", is_flag=True, help="Compile the student with torch.compile.")
@_memory("--gradient-checkpointing", is_flag=True, help="Recompute activations in the backward pass, to save memory.")
@_memory(
    "--accumulate", type=click.IntRange(1), default=1, show_default=True, metavar="N",
    help="Chunks per batch, to save memory; batch norms see one chunk at a time.",
)  # fmt: skip
@_memory(
    "--loss-block",
    metavar="PAIRS",
    type=click.IntRange(0),
    default=0,
    help="Pairs per block of the loss, to save memory.  [default: all]",
)
@_memory("--global-logits", is_flag=True, help="Under torchrun: every process computes the loss of all pairs.")
@_output("-o", "--output", required=True, type=PathName(), metavar="RUN", help="The run's folder.")
@_output("--resume", is_flag=True, help="Resume from the latest intact checkpoint in RUN.")
@_output("--accept-changes", is_flag=True, help="Resume although data or teacher changed since the run began.")
@_output(
    "--checkpoint-every", type=click.IntRange(1), default=500, show_default=True, metavar="STEPS",
    help="Steps between checkpoints.",
)  # fmt: skip
@_output(
    "--report-to",
    metavar="NAME",
    type=NameChoice(["tensorboard", "wandb", "mlflow"]),
    help="Also report the metrics to tensorboard (RUN/tensorboard), wandb or mlflow; a resumed run continues there.  "
    "[default: RUN/metrics.jsonl alone]",
)
def command(output: Path, **options: Any) -> None:
    """Train a compact student from a teacher and image-caption pairs.

    \b
    clip-rd-edge distill --data pairs.csv --batch-size 256 -o runs/first \\
        --teacher ViT-B-16 --teacher-pretrained laion400m_e32 \\
        --student resnet18 --pretrained-image timm \\
        --text 512x6 --pretrained-text teacher

    The student is written to RUN/student, which open_clip loads as local-dir:RUN/student.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter, first_process, say
    from clip_rd_edge.contract.checkpoint import STUDENT_FOLDER
    from clip_rd_edge.contract.run_folder import CALIBRATION_FILE
    from clip_rd_edge.utils.paths import is_file

    with console_reporter() as reporter:
        run = edge.distill(output=output, **drop_none(**options), reporter=reporter)
    # A run on texts alone, or on a few pairs, has no images to calibrate INT8 with.
    calibration = "" if is_file(run / CALIBRATION_FILE) else " --calibration pairs.csv"
    say(f"next: clip-rd-edge export {as_word(run)} --precision int8{calibration} -o {as_word(run / 'bundle')}")
    if first_process:
        echo(run / STUDENT_FOLDER)
