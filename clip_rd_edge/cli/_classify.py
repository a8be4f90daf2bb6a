"""The two loops of `classify`: over files, with a bar and a rate, and over a camera's frames."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from PIL import Image

from clip_rd_edge.cli._answers import Format
from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.embed import EmbeddedBatch, embed_pictures, open_image_tower

MANY = 50  # pictures from which a rate means something


def classify_files(
    classifier: ZeroShotClassifier,
    encoder: TowerEncoder,
    paths: Sequence[Path],
    *,
    top: int,
    shape: Format,
    quick: bool,
) -> None:
    """Print what each picture shows. One that cannot be read is said on stderr, and the others go on.

    Args:
        quick: see `embed_pictures`.

    Raises:
        InputError: some picture could not be read; after all others are answered.
    """
    out = sys.stdout  # kept: a bar would take it over
    batches = embed_pictures(encoder, paths, quick=quick)
    if len(paths) >= MANY and not out.isatty():  # on a terminal the answers themselves are the progress
        batches = _with_bar(batches, len(paths))
    unreadable: list[InputError] = []
    if len(paths) >= MANY:
        # What is done once, and the rate is not to tell of.
        Image.preinit()
        open_image_tower(encoder)
    began = time.perf_counter()
    for batch in batches:
        predictions = classifier.classify_embeddings(batch.embeddings, top=top)
        lines = [shape(str(path), answers) for path, answers in zip(batch.pictures, predictions, strict=True)]
        if lines:
            click.echo("\n".join(lines), file=out)  # at once: it flushes each time
        unreadable += batch.unreadable
        if len(paths) > 1:
            for error in batch.unreadable:
                click.echo(f"error: {error}", err=True)
    if len(paths) >= MANY:
        seconds = time.perf_counter() - began
        click.echo(f"{len(paths):,} pictures in {seconds:.1f} s, {len(paths) / seconds:,.0f} a second", err=True)
    if len(paths) == 1 and unreadable:
        raise unreadable[0]
    if unreadable:
        raise InputError(f"{len(unreadable):,} of {len(paths):,} pictures could not be read; the others are answered.")


def classify_camera(classifier: ZeroShotClassifier, camera: str, *, top: int, shape: Format) -> None:
    """Print what the camera sees, frame by frame, until it ends or Ctrl-C; on a terminal, over the line before."""
    from clip_rd_edge.runtime.camera import frames

    live = sys.stdout.isatty()
    began, count = time.perf_counter(), 0
    try:
        for count, frame in enumerate(frames(camera), start=1):
            started = time.perf_counter()
            (answers,) = classifier.classify([frame], top=top)
            line = shape(f"frame {count}", answers)
            if live:
                line = f"\r\x1b[2K{line}  ({(time.perf_counter() - started) * 1e3:.0f} ms)"
            click.echo(line, nl=not live)
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        if live:
            click.echo()
    seconds = time.perf_counter() - began
    click.echo(f"{count:,} frames in {seconds:.1f} s, {count / seconds:.1f} a second", err=True)


def _with_bar(batches: Iterator[EmbeddedBatch[Path]], total: int) -> Iterator[EmbeddedBatch[Path]]:
    """The same batches, and a bar on stderr with their rate."""
    from clip_rd_edge.cli._progress import progress_bar

    done, began = 0, time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("classifying", total=total, note="")
        for batch in batches:
            yield batch
            done += len(batch.pictures) + len(batch.unreadable)
            bar.update(task, completed=done, note=f"{done / (time.perf_counter() - began):,.0f}/s")
