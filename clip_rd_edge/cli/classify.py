"""`clip-rd-edge classify`: what images show, among labels, without PyTorch."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clip_rd_edge.cli._options import ManyOption, device_option, threads_option
from clip_rd_edge.errors import InputError, UsageError

if TYPE_CHECKING:
    from clip_rd_edge.contract.encoder import TowerEncoder
    from clip_rd_edge.runtime.classifier import Prediction, ZeroShotClassifier

Format = Callable[[str, "Sequence[Prediction]"], str]
CSV_HEADER = "image,rank,label,probability"
NONE = "none of these"
MANY = 50  # images from which a rate means something


@click.command("classify", short_help="Say what an image shows, among your labels.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, metavar="IMAGE...")
@click.option(
    "--labels", cls=ManyOption, multiple=True,
    help='The labels: "a cat" "a dog" …, or a text file with one per line. Default: the bundle\'s label bank.',
)  # fmt: skip
@click.option("--template", "templates", multiple=True, help='Prompt with {} for the label, such as "a photo of a {}".')
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="How many labels to show.")
@click.option(
    "--none-below", type=click.FloatRange(0, 1), default=0.0, metavar="P",
    help="Show no label less likely than P, such as 0.5: an image may show none of them.",
)  # fmt: skip
@click.option("--camera", metavar="NUMBER", help="Classify what a camera sees, until Ctrl-C; 0 is the first one.")
@threads_option
@device_option
@click.option(
    "--cache/--no-cache", default=True, show_default=True,
    help="Keep the labels' embeddings in the user's cache, so that the next run with them loads no text tower.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Decode large JPEGs at a fraction of their size; answers differ a little.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--csv", "as_csv", is_flag=True, help="A table with one row per label.")
def command(
    bundle: Path,
    images: tuple[str, ...],
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    top: int,
    none_below: float,
    camera: str | None,
    threads: int | None,
    device: str,
    cache: bool,
    quick: bool,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Say what each IMAGE shows. An IMAGE is a file, a folder, a glob, or - for a list of paths on stdin.

    Many images go faster with --threads one less than there are cores, which leaves one to open them.

    \b
    clip-rd-edge classify bundle cat.jpg --labels "a cat" "a dog"
    clip-rd-edge classify bundle photos/ --labels labels.txt --csv > answers.csv
    clip-rd-edge classify bundle --camera 0 --labels "a cup" "a phone" "a hand"
    """
    if (camera is None) == (not images):
        raise UsageError("Give images or a camera.", hint="photo.jpg, a folder, - for a list, or --camera 0")
    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other.")
    # numpy's products here are small, and more of its threads only take cores from the model; read at its import.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from clip_rd_edge.contract.images import find_images
    from clip_rd_edge.runtime.classifier import ZeroShotClassifier
    from clip_rd_edge.runtime.labels import read_label_list
    from clip_rd_edge.runtime.load import load

    paths = list(find_images(images, listed=sys.stdin))
    encoder = load(bundle, threads=threads, device=device, spin=len(paths) < MANY)
    classifier = ZeroShotClassifier(
        encoder, read_label_list(labels), templates=templates or None, none_below=none_below, cache=cache
    )
    write: Format = _as_json if as_json else _as_csv if as_csv else _as_text
    if as_csv:
        click.echo(CSV_HEADER)
    if camera is not None:
        _classify_camera(classifier, camera, top=top, write=write)
        return
    if not paths:
        raise InputError("There are no images: the list on stdin is empty.")
    _classify_files(classifier, encoder, paths, top=top, write=write, quick=quick)


def _classify_files(
    classifier: ZeroShotClassifier,
    encoder: TowerEncoder,
    paths: Sequence[Path],
    *,
    top: int,
    write: Format,
    quick: bool,
) -> None:
    """Print what each image shows. One that cannot be read is reported on stderr, and the others go on.

    Raises:
        InputError: some image could not be read; after all others are answered.
    """
    from PIL import Image

    from clip_rd_edge.cli._console import console_reporter
    from clip_rd_edge.runtime.embed import embed_images, open_image_tower

    out = sys.stdout  # kept, since a bar takes it over
    many = len(paths) >= MANY
    if many:  # what is done once, and does not belong to the rate
        Image.preinit()
        open_image_tower(encoder)
    unreadable: list[InputError] = []
    began, done = time.perf_counter(), 0
    # On a terminal the answers themselves are the progress.
    with console_reporter() if many and not out.isatty() else nullcontext() as reporter:
        for batch in embed_images(encoder, paths, quick=quick):
            predictions = classifier.classify_embeddings(batch.embeddings, top=top)
            lines = [write(str(path), answers) for path, answers in zip(batch.images, predictions, strict=True)]
            if lines:
                click.echo("\n".join(lines), file=out)  # at once, since it flushes each time
            unreadable += batch.unreadable
            if len(paths) > 1:
                for error in batch.unreadable:
                    click.echo(f"error: {error}", err=True)
            done += len(batch.images) + len(batch.unreadable)
            if reporter:
                rate = done / (time.perf_counter() - began)
                reporter.update("classifying", done, len(paths), f"{rate:,.0f} images/s")
    if many:
        seconds = time.perf_counter() - began
        click.echo(f"{len(paths):,} images in {seconds:.1f} s, {len(paths) / seconds:,.0f} per second", err=True)
    if len(paths) == 1 and unreadable:
        raise unreadable[0]
    if unreadable:
        raise InputError(f"{len(unreadable):,} of {len(paths):,} images could not be read; the others are answered.")


def _classify_camera(classifier: ZeroShotClassifier, camera: str, *, top: int, write: Format) -> None:
    """Print what the camera sees, frame by frame, until it ends or Ctrl-C; on a terminal, over the line before."""
    live = sys.stdout.isatty()
    began, count = time.perf_counter(), 0
    try:
        for count, (answers, milliseconds) in enumerate(_camera_answers(classifier, camera, top=top), start=1):
            line = write(f"frame {count}", answers)
            click.echo(f"\r\x1b[2K{line}  ({milliseconds:.0f} ms)" if live else line, nl=not live)
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        if live:
            click.echo()
    seconds = time.perf_counter() - began
    click.echo(f"{count:,} frames in {seconds:.1f} s, {count / seconds:.1f} per second", err=True)


def _camera_answers(
    classifier: ZeroShotClassifier, camera: str, *, top: int
) -> Iterator[tuple[Sequence[Prediction], float]]:
    from clip_rd_edge.runtime.camera import frames

    for frame in frames(camera):
        started = time.perf_counter()
        (answers,) = classifier.classify([frame], top=top)
        yield answers, 1e3 * (time.perf_counter() - started)


def _as_text(image: str, answers: Sequence[Prediction]) -> str:
    """Image, a tab, and the labels with their percentages, likeliest first."""
    shown = "  ".join(f"{label} {probability:.1%}" for label, probability in answers)
    return f"{image}\t{shown or NONE}"


def _as_json(image: str, answers: Sequence[Prediction]) -> str:
    """One object; `predictions` is empty where the image shows none of the labels."""
    predictions = [{"label": label, "probability": round(probability, 6)} for label, probability in answers]
    return json.dumps({"image": image, "predictions": predictions}, ensure_ascii=False)


def _as_csv(image: str, answers: Sequence[Prediction]) -> str:
    """One row per label; one with an empty label where the image shows none of them."""
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    for rank, (label, probability) in enumerate(answers, start=1):
        rows.writerow((image, rank, label, f"{probability:.6f}"))
    if not answers:
        rows.writerow((image, 1, "", ""))
    return buffer.getvalue().rstrip("\n")
