"""The commands that make models: `distill`, `embed`, `pack`, `recipe`, `stitch`, `trim` and `average`."""

from __future__ import annotations

from typing import Any

import click

import clip_rd_edge as edge
from clip_rd_edge.cli.options import COMPLETIONS, GroupedCommand, command_of
from clip_rd_edge.cli.output import echo, first_process, note, reported
from clip_rd_edge.settings.training import Average, Distill, Embed, Pack, Stitch, Trim
from clip_rd_edge.utils.text import as_word

# The first command that a reader of the README, of the guide, of the help and of the quickstart's output is shown.
OWN_DATA_EXAMPLE = """distill --data pairs.csv --batch-size 256 -o runs/first \\
      --teacher ViT-B-16@laion400m_e32 \\
      --student resnet18 --pretrained-image timm \\
      --text 512x6 --pretrained-text teacher"""


@command_of(Distill, "distill")
def distill(given: dict[str, Any]) -> None:
    """Train a compact student from a teacher and image-caption pairs.

    \b
    clip-rd-edge distill --data pairs.csv --batch-size 256 -o runs/first \\
        --teacher ViT-B-16@laion400m_e32 \\
        --student resnet18 --pretrained-image timm \\
        --text 512x6 --pretrained-text teacher

    The student is written to RUN/student, which open_clip loads as local-dir:RUN/student.
    """
    from clip_rd_edge.bundle.runs import CALIBRATION_FILE, STUDENT_FOLDER
    from clip_rd_edge.utils.paths import is_file

    run = reported(edge.distill, **given)
    # A run on texts alone, or on a few pairs, has no images to calibrate INT8 with.
    calibration = "" if is_file(run / CALIBRATION_FILE) else " --calibration pairs.csv"
    note(f"next: clip-rd-edge export {as_word(run)} --precision int8{calibration} -o {as_word(run / 'bundle')}")
    if first_process:
        echo(run / STUDENT_FOLDER)


@command_of(Embed, "embed")
def embed(given: dict[str, Any]) -> None:
    """Compute a teacher's embeddings once, for many runs of distill with --store.

    \b
    clip-rd-edge embed --data pairs.csv --teacher runs/teacher --views 8 -o store
    clip-rd-edge distill --data pairs.csv --teacher runs/teacher --views 8 \\
        --store store --student resnet18 -o runs/stored

    An interrupted command is continued by the same one. Under torchrun, and with --ray, many machines share the work.
    """
    folder = reported(edge.embed, **given)
    if first_process:
        store = as_word(folder)
        note(f"next: clip-rd-edge distill, with the same data, teacher and views, and --store {store}")
        echo(folder)


@command_of(Pack, "pack")
def pack(given: dict[str, Any]) -> None:
    """Pack DATA into shards of small images, which many runs of distill read fast.

    \b
    clip-rd-edge pack photos/ -o shards
    clip-rd-edge distill --data 'shards/{00000..00004}.tar' \\
        --teacher ViT-B-16@laion400m_e32 --student resnet18 -o runs/first

    DATA is what distill takes as --data: a table, class folders, or shards here or elsewhere. The samples come in
    random order. An interrupted command is continued by the same one.
    """
    packed = reported(edge.pack, **given)
    note(f"{packed.samples:,} samples, {packed.bytes / 1e6:,.1f} MB, {packed.bytes / packed.samples / 1e3:.0f} KB each")
    option = "--images" if given.get("without_captions") else "--data"
    note(f"next: clip-rd-edge distill {option} {as_word(packed.source)}, with all else as before")
    echo(packed.source)


@click.command("recipe", cls=GroupedCommand, short_help="List the training recipes, or show one.")
@click.argument("name", required=False, metavar="[NAME]", shell_complete=COMPLETIONS["recipe"])
def recipe(name: str | None) -> None:
    """List the training recipes, or print the recipe NAME as YAML with a comment on each key.

    \b
    clip-rd-edge recipe
    clip-rd-edge recipe clip-rd > mine.yaml
    clip-rd-edge distill --recipe mine.yaml --data pairs.csv \\
        --teacher runs/teacher --student resnet18 -o runs/mine
    """
    echo(edge.recipe(name), nl=False)
    if name is None:
        echo("Show one, to start your own from: clip-rd-edge recipe NAME > mine.yaml", err=True)


@command_of(Stitch, "stitch")
def stitch(given: dict[str, Any]) -> None:
    """Join CLASSIFIER and a sentence encoder through the names of the classes: zero-shot, without training images.

    \b
    clip-rd-edge stitch tf_efficientnet_lite0 --names imagenet \\
        --text all-MiniLM-L6-v2 -o teacher
    clip-rd-edge stitch resnet18 --pretrained parts.pth --names parts.txt \\
        --text all-MiniLM-L6-v2 -o parts

    CLASSIFIER is a timm architecture. The result is an open_clip model, such as distill takes as its --teacher. It
    recognises the classifier's classes, and relates other texts to them by meaning.
    """
    folder = reported(edge.stitch, **given)
    note(f"next: clip-rd-edge export {as_word(folder)} -o {as_word(f'{folder}-bundle')}")
    echo(f"local-dir:{folder}")


@command_of(Trim, "trim")
def trim(given: dict[str, Any]) -> None:
    """Leave out layers and tokens of MODEL's text tower, whose largest part is the tokens.

    \b
    clip-rd-edge trim runs/seeing --text-layers 2 --vocabulary 7500 \\
        --texts nouns.txt -o runs/trimmed
    clip-rd-edge distill --texts nouns.txt --teacher runs/seeing \\
        --student runs/trimmed --batch-size 256 --lr 5e-4 -o runs/small-text

    MODEL is a run's folder or another open_clip model. The result embeds images as MODEL does, but not texts: a student
    that starts from it learns MODEL's embeddings of texts in minutes.
    """
    folder = reported(edge.trim, **given)
    model, texts = as_word(given["model"]), as_word(given.get("texts", "FILE"))
    note(
        f"next: clip-rd-edge distill --texts {texts} --teacher {model} --student {as_word(folder)} "
        f"--batch-size 256 --lr 5e-4 -o {as_word(f'{folder}-student')}"
    )
    echo(f"local-dir:{folder}")


def _weight(text: str) -> float | str:
    return "best" if text.casefold() == "best" else float(text)


@command_of(Average, "average", weight=click.types.FuncParamType(_weight))
def average(given: dict[str, Any]) -> None:
    """Average the weights of two models: (1 − SHARE) · FIRST + SHARE · SECOND.

    \b
    clip-rd-edge average runs/general runs/tuned --weight 0.7 -o runs/between
    clip-rd-edge average runs/general runs/tuned --weight best \\
        --task old-images/ --task new-images/ -o runs/between

    A fine-tuned model has forgotten some of what it could do before; models between the two are nearly as good at
    both. FIRST and SECOND are runs' folders or other open_clip models. The result is an open_clip folder, which export
    and distill take. An average of two models that were trained from different random weights is useless.
    """
    result = reported(edge.average, **given)
    if result.curve:
        from clip_rd_edge.benchmarking.tables import plain_table
        from clip_rd_edge.cli.console import print_table, stderr

        table = plain_table("Weight of the second", *result.curve[0].scores)
        for point in result.curve:
            chosen = " ←" if point.weight == result.weight else ""
            table.add_row(f"{point.weight:g}{chosen}", *(f"{score:.1%}" for score in point.scores.values()))
        print_table(table, console=stderr)
    folder = result.folder
    note(f"next: clip-rd-edge export {as_word(folder)} --precision int8 -o {as_word(f'{folder}-bundle')}")
    echo(f"local-dir:{folder}")
