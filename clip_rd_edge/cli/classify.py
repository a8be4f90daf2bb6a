"""`clip-rd-edge classify`: what pictures show, among labels, without torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clip_rd_edge.cli._device import device_option
from clip_rd_edge.cli._labels import LabelsOption, read_labels
from clip_rd_edge.errors import InputError, UsageError

if TYPE_CHECKING:
    from clip_rd_edge.cli._answers import Format


@click.command("classify", short_help="Say what a picture shows, among labels of yours.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("pictures", nargs=-1, metavar="PICTURE...")
@click.option(
    "--labels", cls=LabelsOption, multiple=True,
    help='The labels: "a cat" "a dog" …, or a text file with one a line. Default: the bundle\'s label bank.',
)  # fmt: skip
@click.option("--template", "templates", multiple=True, help='Prompt with {} for the label, such as "a photo of a {}".')
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="How many labels to show.")
@click.option(
    "--none-below", type=click.FloatRange(0, 1), default=0.0, metavar="P",
    help="Show no label less likely than P, such as 0.5: a picture may show none of them.",
)  # fmt: skip
@click.option("--camera", metavar="NUMBER", help="Classify what a camera sees, until Ctrl-C; 0 is the first one.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the model; default: every core.")
@device_option
@click.option(
    "--no-cache", is_flag=True, help="Neither take the labels' embeddings from the user's cache nor keep them."
)
@click.option("--quick", is_flag=True, help="Decode large JPEGs at a fraction of their size; answers differ a little.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--csv", "as_csv", is_flag=True, help="A table with a row a label.")
def command(
    bundle: Path,
    pictures: tuple[str, ...],
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    top: int,
    none_below: float,
    camera: str | None,
    threads: int | None,
    device: str,
    no_cache: bool,
    quick: bool,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Say what each PICTURE shows. A PICTURE is a file, a folder, a glob, or - for a list of paths on stdin.

    Many pictures go faster with --threads one less than there are cores, which is left to open them.

    \b
    clip-rd-edge classify bundle cat.jpg --labels "a cat" "a dog"
    clip-rd-edge classify bundle photos/ --labels labels.txt --csv > answers.csv
    clip-rd-edge classify bundle --camera 0 --labels "a cup" "a phone" "a hand"
    """
    if (camera is None) == (not pictures):
        raise UsageError("Give pictures or a camera.", hint="photo.jpg, a folder, - for a list, or --camera 0")
    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other.")

    # Its products are small, and more threads of numpy's only take cores from the model; read when numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from clip_rd_edge.cli import _answers
    from clip_rd_edge.cli._classify import MANY, classify_camera, classify_files
    from clip_rd_edge.contract.images import find_images
    from clip_rd_edge.runtime.classifier import ZeroShotClassifier
    from clip_rd_edge.runtime.load import load

    paths = list(find_images(pictures, listed=sys.stdin))
    encoder = load(bundle, threads=threads, device=device, spin=len(paths) < MANY)
    classifier = ZeroShotClassifier(
        encoder, read_labels(labels), templates=templates or None, none_below=none_below, cache=not no_cache
    )
    shape: Format = _answers.as_json if as_json else _answers.as_csv if as_csv else _answers.as_text
    if as_csv:
        click.echo(_answers.CSV_HEADER)
    if camera is not None:
        classify_camera(classifier, camera, top=top, shape=shape)
        return
    if not paths:
        raise InputError("There are no pictures: the list on stdin is empty.")

    classify_files(classifier, encoder, paths, top=top, shape=shape, quick=quick)
