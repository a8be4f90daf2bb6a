"""`clip-rd-edge index`: embed a folder of images for searching."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import grouped
from clip_rd_edge.errors import InputError, InterruptedRunError, UsageError
from clip_rd_edge.settings.deploying import Index
from clip_rd_edge.utils.paths import exists
from clip_rd_edge.utils.process import handled_by, leave_lost_terminal, stop_signals
from clip_rd_edge.utils.text import one_line


@command_of(Index, "index")
@grouped("Output")("--watch", is_flag=True, help="Go on: keep the index up to date while images come and go.")
def command(given: dict[str, Any], watch: bool) -> None:
    """Embed the images in FOLDER and its subfolders with BUNDLE, for clip-rd-edge search.

    \b
    clip-rd-edge index bundle photos/ -o photos.index
    clip-rd-edge search photos.index "a red car"

    Run the command again to update the index: only new and changed images are embedded. It can be interrupted at any
    time without losing its progress. With --watch, it goes on until Ctrl-C, and an image is in the index some seconds
    after it was written, or about a minute later if listing the folder or saving the index takes long.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter

    if watch and "ray" in given:
        raise UsageError("--watch and --ray cannot be combined.", hint="omit one of them")
    if watch:
        _watch(given)
        return
    try:
        with console_reporter() as reporter:
            update = edge.index(**given, reporter=reporter)
    except KeyboardInterrupt as error:
        if not exists(given["output"]):
            raise
        raise InterruptedRunError(
            "Interrupted; what is embedded is saved.", hint="run the same command again, which embeds the others"
        ) from error
    for reason in update.unreadable:
        echo(f"error: {one_line(reason)}", err=True)
    how = "; search is approximate" if update.approximate else ""
    echo(f"{update.embedded:,} embedded, {update.kept:,} kept, {update.removed:,} removed{how}", err=True)
    echo(given["output"])
    if update.unreadable:
        count = len(update.unreadable)
        raise InputError(
            f"{count:,} image{'s' * (count > 1)} or folder{'s' * (count > 1)} could not be read; the others are in the "
            "index."
        )


def _watch(given: dict[str, Any]) -> None:
    """Keep the index up to date until one of the `stop_signals`; a second SIGINT ends at once."""
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import console_reporter

    with console_reporter() as reporter, stop_event() as stop:
        for update in edge.watch_index(**given, stop=stop, reporter=reporter):
            for reason in update.unreadable:
                echo(f"error: {one_line(reason)}", err=True)
            count = update.kept + update.embedded
            reporter.say(f"{update.embedded:,} embedded, {update.removed:,} removed: {count:,} images in the index")
    echo(given["output"])


@contextmanager
def stop_event() -> Iterator[threading.Event]:
    """Within the block, the `stop_signals` set the event; a second SIGINT interrupts."""
    stop = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        leave_lost_terminal()
        stop.set()

    with handled_by(handle, stop_signals()):
        yield stop
