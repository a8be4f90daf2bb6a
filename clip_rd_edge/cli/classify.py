"""`clip-rd-edge classify`: zero-shot image classification without PyTorch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any, TextIO

import click

from clip_rd_edge.cli.options import command_of, grouped, refuse_together
from clip_rd_edge.cli.output import LateReporter, echo, json_line
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.settings.deploying import Classify
from clip_rd_edge.utils.text import SILENT, csv_row, one_line

if TYPE_CHECKING:
    from clip_rd_edge.bundle.encoder import Embeddings, TowerEncoder
    from clip_rd_edge.runtime.classifier import Prediction, ZeroShotClassifier


# Of an image, its predictions and, if there is only one label, the cosine similarity to it.
Format = Callable[[str, "Sequence[Prediction]", float | None], str]
Lines = Callable[[Sequence[str], "Embeddings"], list[str]]  # of images by their names
CSV_HEADER = "image,rank,label,probability"
NO_LABEL = "none of these"
MANY_IMAGES = 50  # from this number on, a progress bar and a rate are shown
_images, _output = grouped("Images"), grouped("Output")


@command_of(Classify, "classify")
@_images(
    "-0", "--null", is_flag=True,
    help="The paths on stdin and the lines printed end with NUL instead of a newline, as from find -print0.",
)  # fmt: skip
@_output("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
@_output("--csv", "as_csv", is_flag=True, help="Print CSV with one row per image and label.")
def classify(given: dict[str, Any], null: bool, as_json: bool, as_csv: bool) -> None:
    """Classify each IMAGE with BUNDLE. IMAGE is a file, a folder, a glob, or - to read paths from stdin.

    \b
    clip-rd-edge classify bundle cat.jpg --labels "a cat" "a dog"
    clip-rd-edge classify bundle photos/ --labels labels.txt --csv > labels.csv
    clip-rd-edge classify bundle --camera 0 --labels "a cup" "a phone" "a hand"

    For many images, set --threads to one less than the number of cores: that leaves one core for opening the images.
    """
    request = Classify(**given)
    images, camera = tuple(request.images), request.camera
    if (camera is None) == (not images):
        raise UsageError(
            "Expected either images or --camera.",
            hint="pass files, a folder, - for a list, or --camera 0; images stand before --labels",
        )
    refuse_together({"--json": as_json, "--csv": as_csv})
    refuse_together({"--null": null, "--csv": as_csv})
    # numpy's matrix products are small here: more threads only take cores from the model. numpy reads this at import.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from clip_rd_edge.bundle.image_files import find_images
    from clip_rd_edge.bundle.manifest import read_manifest
    from clip_rd_edge.runtime.load import load

    bundle = Path(request.bundle)
    read_manifest(bundle)  # before images are looked for
    folders: list[InputError] = []  # that cannot be read
    paths = list(find_images(images, lines=_lines(sys.stdin, null=null), on_unreadable=folders.append))
    for error in folders:
        echo(f"error: {one_line(error)}", err=True)
    few = len(paths) < MANY_IMAGES
    encoder = load(bundle, threads=request.threads, device=request.device, spin=few, force=request.force)
    classifier = _classifier(encoder, request, given.get("labels", ()))
    format_result: Format = _as_json if as_json else _as_csv if as_csv else _as_text
    if null and not as_json:
        format_result = partial(_as_text, shown=str)

    def lines(names: Sequence[str], embeddings: Embeddings) -> list[str]:
        predictions = classifier.classify_embeddings(embeddings, top=request.top)
        alone = classifier.has_trivial_label
        cosines = classifier.similarities(embeddings)[:, 0].tolist() if alone else [None] * len(predictions)
        return list(map(format_result, names, predictions, cosines))

    end = "\0" if null else "\n"
    if as_csv:
        echo(CSV_HEADER)
    if camera is not None:
        _classify_camera(encoder, camera, lines=lines, end=end)
        return
    if not paths:
        raise InputError("No images: the list on stdin is empty.", hint="pipe in one path per line")
    unreadable = _classify_files(encoder, paths, lines=lines, quick=request.quick, end=end)
    if len(paths) == 1 and unreadable:
        raise unreadable[0]
    if lost := len(unreadable) + len(folders):
        s = "s" * (lost > 1)
        raise InputError(f"{lost:,} image{s} or folder{s} could not be read; the others are classified.")


def _classifier(encoder: TowerEncoder, request: Classify, labels: Sequence[str]) -> ZeroShotClassifier:
    """Return what classifies as is asked for; warn where its answers mean little."""
    from clip_rd_edge.runtime.classifier import ZeroShotClassifier
    from clip_rd_edge.runtime.labels import parse_labels

    with ExitStack() as stack:
        classifier = ZeroShotClassifier(
            encoder,
            parse_labels(labels),
            templates=request.templates,
            cache=request.cache,
            reporter=LateReporter(stack),
            none=request.none,
            refuse_known=request.refuse_known,
            multi=request.multi,
            raw=request.raw,
        )
        compares = request.none or request.multi or request.refuse_known is not None
        if compares:
            classifier.background()  # with the progress of embedding it
    if compares and classifier.calibration is None:
        echo(
            "warning: The bundle was exported without pairs of images and captions: what is refused, and the "
            "probability of a label by itself, are rough estimates.\nhint: export it with --calibration pairs.csv",
            err=True,
        )
    if classifier.has_trivial_label and not compares:
        echo(
            f"warning: The only label is {classifier.labels[0]!r}: the softmax over a single label is 100 % for every "
            "image.\nhint: add what else the images may show, or let images be refused with --none",
            err=True,
        )
    return classifier


def _lines(stream: TextIO, *, null: bool) -> Iterator[str]:
    """Yield the paths on a stream, one per line or each ended by NUL; nothing is read before the first is asked for.

    Windows' programs begin a list of lines with a byte order mark.
    """
    if null:
        yield from stream.read().split("\0")
        return
    for number, line in enumerate(stream):
        yield (line if number else line.removeprefix("\ufeff")).rstrip("\r\n")


def _classify_files(
    encoder: TowerEncoder, paths: Sequence[Path], *, lines: Lines, quick: bool, end: str
) -> list[InputError]:
    """Classify image files and print the results; return the errors of the unreadable, each reported on stderr."""
    from PIL import Image

    from clip_rd_edge.runtime.load import embed_images, open_image_tower

    stdout = sys.stdout  # saved, because the progress bar redirects sys.stdout
    many = len(paths) >= MANY_IMAGES
    if many:  # one-time work, which must not count towards the rate
        Image.preinit()
        open_image_tower(encoder)
    unreadable: list[InputError] = []
    started, done = time.perf_counter(), 0
    # On a terminal, the printed results show the progress.
    with ExitStack() as stack:
        reporter = LateReporter(stack) if many and not stdout.isatty() else SILENT
        reporter.update("classifying", 0, len(paths))
        for batch in embed_images(encoder, paths, quick=quick):
            if batch.images:
                # One call per batch, because each call flushes.
                echo(end.join([*lines(list(map(str, batch.images)), batch.embeddings), ""]), file=stdout, nl=False)
            unreadable += batch.unreadable
            if len(paths) > 1:
                for error in batch.unreadable:
                    echo(f"error: {one_line(error)}", err=True)
            done += len(batch.images) + len(batch.unreadable)
            rate = done / (time.perf_counter() - started)
            reporter.update("classifying", done, len(paths), f"{rate:,.0f} images/s")
    if many:
        seconds = time.perf_counter() - started
        echo(f"{len(paths):,} images in {seconds:.1f} s, {len(paths) / seconds:,.0f} per second", err=True)
    return unreadable


def _classify_camera(encoder: TowerEncoder, camera: str, *, lines: Lines, end: str) -> None:
    """Print the result for each frame until the camera ends or Ctrl-C; on a terminal, each overwrites the last."""
    from rich.cells import set_cell_size

    from clip_rd_edge.runtime.camera import frames

    terminal, width = sys.stdout.isatty(), get_terminal_size().columns
    started, count = time.perf_counter(), 0
    try:
        for count, frame in enumerate(frames(camera), start=1):
            seen = time.perf_counter()
            (line,) = lines([f"frame {count}"], encoder.encode_images([frame]))
            latency_ms = 1e3 * (time.perf_counter() - seen)
            if terminal:
                click.echo("\r\x1b[2K", nl=False)  # clear the line of the last frame
            # Cut, since a line that is broken in two could not be cleared.
            shown = set_cell_size(f"{line.expandtabs()}  ({latency_ms:.0f} ms)", width - 1) if terminal else line + end
            echo(shown, nl=False)
    except KeyboardInterrupt:
        pass  # the normal way to stop
    finally:
        if terminal:
            echo()
    seconds = time.perf_counter() - started
    echo(f"{count:,} frames in {seconds:.1f} s, {count / seconds:.1f} per second", err=True)


def _as_text(
    image: str, predictions: Sequence[Prediction], cosine: float | None, *, shown: Callable[[str], str] = one_line
) -> str:
    """Return the image, a tab, and the labels; on one line, in which line breaks in names are escaped."""
    labels = [f"{label} {probability:.1%}" for label, probability in predictions] or [NO_LABEL]
    if cosine is not None:
        labels[-1] += f" (cosine {cosine:.3f})"
    return f"{shown(image)}\t{'  '.join(map(shown, labels))}"


def _as_json(image: str, predictions: Sequence[Prediction], cosine: float | None) -> str:
    """Return one JSON object; `predictions` is empty if no label fits."""
    rows = [{"label": label, "probability": round(probability, 6)} for label, probability in predictions]
    similarity = {} if cosine is None else {"cosine": round(cosine, 6)}
    return json_line({"image": image, "predictions": rows, **similarity})


def _as_csv(image: str, predictions: Sequence[Prediction], _: float | None) -> str:
    """Return one row per label, or one row with an empty label if none fits."""
    rows = [
        csv_row(image, rank, label, f"{probability:.6f}") for rank, (label, probability) in enumerate(predictions, 1)
    ]
    return "\n".join(rows or [csv_row(image, 1, "", "")])
