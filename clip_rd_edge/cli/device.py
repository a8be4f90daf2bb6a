"""The commands that use a bundle on a device: `index`, `search`, `serve`, `demo` and `doctor`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

import clip_rd_edge as edge
from clip_rd_edge.cli.options import GroupedCommand, command_of, grouped, refuse_together
from clip_rd_edge.cli.output import echo, echo_json, json_line, note, reported
from clip_rd_edge.errors import ClipRdEdgeError, InputError, InterruptedRunError
from clip_rd_edge.settings.deploying import Demo, Index, Search, Serve
from clip_rd_edge.utils.paths import exists
from clip_rd_edge.utils.process import handled_by, leave_lost_terminal, stop_signals
from clip_rd_edge.utils.text import one_line

if TYPE_CHECKING:
    from clip_rd_edge.runtime.doctor import Finding


@command_of(Index, "index")
@grouped("Output")("--watch", is_flag=True, help="Go on: keep the index up to date while images come and go.")
def index(given: dict[str, Any], watch: bool) -> None:
    """Embed the images in FOLDER and its subfolders with BUNDLE, for clip-rd-edge search.

    \b
    clip-rd-edge index bundle photos/ -o photos.index
    clip-rd-edge search photos.index "a red car"

    Run the command again to update the index: only new and changed images are embedded. It can be interrupted at any
    time without losing its progress. With --watch, it goes on until Ctrl-C, and an image is in the index some seconds
    after it was written, or about a minute later if listing the folder or saving the index takes long.
    """
    refuse_together({"--watch": watch, "--ray": "ray" in given})
    if watch:
        _watch(given)
        return
    try:
        update = reported(edge.index, **given)
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
    from clip_rd_edge.cli.console import console_reporter

    with console_reporter() as reporter, stop_event() as stop:
        for update in edge.watch_index(**given, stop=stop, reporter=reporter):
            for reason in update.unreadable:
                echo(f"error: {one_line(reason)}", err=True)
            count = update.kept + update.embedded
            reporter.note(f"{update.embedded:,} embedded, {update.removed:,} removed: {count:,} images in the index")
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


_output = grouped("Output")


@command_of(Search, "search")
@_output("--json", "as_json", is_flag=True, help="Print one JSON object per image.")
@_output("-0", "--null", is_flag=True, help="Print only the paths, each followed by NUL, as for xargs -0.")
def search(given: dict[str, Any], as_json: bool, null: bool) -> None:
    """Print the images in INDEX that are nearest to QUERY, which is a text or the path of an image.

    \b
    clip-rd-edge search photos.index "a red car"
    clip-rd-edge search photos.index photos/car.jpg --top 5
    clip-rd-edge search photos.index "a car" --bundle bundle --folder /mnt/pics

    Each line has the cosine similarity, a tab, and the image's path, in which control characters are escaped. An index
    that another machine made is searched with a copy of its bundle. For a text, a note follows if images fit no better
    than the best ones fit random texts; --fitting leaves these out.
    """
    from clip_rd_edge.runtime.index_folder import is_gone

    refuse_together({"--json": as_json, "--null": null})
    hits = edge.search(**given)
    for hit in hits:
        if as_json:
            fits = {} if hits.cutoff is None else {"fits": hit.similarity >= hits.cutoff}
            echo(json_line({"image": str(hit.path), "similarity": round(hit.similarity, 6), **fits}))
        elif null:
            echo(f"{hit.path}\0", nl=False)
        else:
            echo(f"{hit.similarity:.3f}\t{one_line(hit.path)}")
    if hits.cutoff is not None and (not hits or hits[-1].similarity < hits.cutoff):
        none = "" if hits and hits[0].similarity >= hits.cutoff else "No image fits. "
        echo(f"{none}Below {hits.cutoff:.3f}, images fit no better than the best ones fit random texts.", err=True)
    if gone := sum(is_gone(hit.path) for hit in hits):  # and not one that this account may not look at
        where = "check --folder" if "folder" in given else "say where the folder is now with --folder"
        echo(
            f"warning: Of these {len(hits):,} images, {gone:,} are not there any more.\n"
            f"hint: {where}, or index it again",
            err=True,
        )
    if hits.missing:
        name = one_line(given["index"])
        echo(
            f"warning: {name} has {hits.indexed:,} of {hits.indexed + hits.missing:,} images: indexing was "
            "interrupted, by Ctrl-C or a disk that went away, or is still running; the same index command resumes",
            err=True,
        )


TOKEN_VARIABLE = "CLIP_RD_EDGE_TOKEN"


@command_of(Serve, "serve")
@grouped("Server")(
    "--token-file", type=click.Path(path_type=Path), metavar="FILE",
    help=f"File with the bearer token that requests need.  [default: the variable {TOKEN_VARIABLE}, else none]",
)  # fmt: skip
def serve(given: dict[str, Any], token_file: Path | None) -> None:
    """Serve BUNDLE over HTTP, and search INDEX. Ctrl-C or SIGTERM stops it after the requests in progress.

    \b
    clip-rd-edge serve bundle
    clip-rd-edge serve bundle photos.index --host 0.0.0.0 --token-file token.txt
    curl -F image=@photo.jpg -F labels="a cat" -F labels="a dog" \\
        http://127.0.0.1:8766/classify
    curl "http://127.0.0.1:8766/search?q=a+red+car"

    The address itself is a page to search INDEX; /docs describes all requests, among them those of llama.cpp (Frigate)
    and OpenAI for embeddings. GET /v1/models, /props, /health and /metrics describe the server.
    """
    # Before numpy is loaded: memory bounds the product with an index, after which threads of OpenBLAS spin for a while.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    note("starting serve")
    token = _token(token_file)
    host = given.get("host", "127.0.0.1")

    def ready(url: str) -> None:
        access = "needs the token" if token else "can be used by anyone on this network, because there is no token"
        announce(url, host, warning=f"The server {access}; there is no encryption.")

    edge.serve(**given, token=token, ready=ready)


def _token(file: Path | None) -> str:
    from clip_rd_edge.api.running import sendable_token
    from clip_rd_edge.utils.files import read_text_limited

    if file is None:
        # One that is set and empty is a secret that was not found: it opens the server to nobody.
        of_variable = os.environ.get(TOKEN_VARIABLE)
        return "" if of_variable is None else sendable_token(of_variable, source=f"The token in {TOKEN_VARIABLE}")
    return sendable_token(read_text_limited(file), source=f"The token file {file}")


@command_of(Demo, "demo")
@grouped("Page")("--open", "open_page", is_flag=True, help="Open the page in your browser.")
def demo(given: dict[str, Any], open_page: bool) -> None:
    """Serve a web page from this machine: drop an image or start the camera, type labels, and watch the results.

    \b
    clip-rd-edge demo bundles/fp32 bundles/int8 --labels "a cat" "a dog"
    clip-rd-edge demo bundle --host 0.0.0.0

    With --host 0.0.0.0, the addresses for other machines are printed, too, and on a terminal a QR code for a phone.

    Pass several BUNDLEs to compare them on the page. Nothing is loaded from the internet. Ctrl-C stops the server.
    """
    from clip_rd_edge.runtime.labels import parse_labels

    host = given.get("host", "127.0.0.1")

    def ready(url: str) -> None:
        others = announce(
            url,
            host,
            warning="Anyone on this network can use the page and send images to it; there is no password and no "
            "encryption. Browsers on other machines do not allow the camera, because the page is not https.",
        )
        if others:
            _print_qr_code(others[0])
        if open_page:
            click.launch(url)

    labels = parse_labels(given.pop("labels", ()))
    edge.demo(**given, labels=labels, ready=ready)


def _print_qr_code(url: str) -> None:
    if sys.stderr.isatty():
        with suppress(ModuleNotFoundError):
            import segno

            segno.make(url, error="l").terminal(out=sys.stderr, compact=True)


def announce(url: str, host: str, *, warning: str) -> list[str]:
    """Print the addresses of a server, a warning if other machines can reach it, and how to stop it.

    Returns the addresses for other machines.
    """
    from clip_rd_edge.serving.guard import is_loopback
    from clip_rd_edge.serving.server import network_urls

    others = network_urls(host, urlsplit(url).port or 0)
    for address in dict.fromkeys([url, *others]):
        echo(address)
    if not is_loopback(host):
        echo(f"warning: {warning}", err=True)
    echo("Press Ctrl-C to stop.", err=True)
    return others


_STYLES = {"broken": "red", "missing": "yellow", "ok": "green"}  # in the order of the list
_DOCTOR_COLUMNS = 100


@click.command("doctor", cls=GroupedCommand, short_help="Check this machine, and show what to install.")
@grouped("Output")("--extras", "all_extras", is_flag=True, help="Show what each extra is for, and what it needs.")
@grouped("Output")("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(all_extras: bool, as_json: bool) -> None:
    """Check the processor, threads, ONNX Runtime, GPU and optional packages.

    \b
    clip-rd-edge doctor
    clip-rd-edge doctor --extras

    What is wrong comes first, with the command that mends it. Exit code 0: bundles can run here, 1: they cannot.
    """
    findings = edge.doctor()
    if as_json:
        echo_json(findings)
    else:
        _print_findings(findings, all_extras=all_extras)
    if broken := [finding for finding in findings if finding.state == "broken"]:
        raise ClipRdEdgeError(f"No bundle can run here: {broken[0].what} {broken[0].detail}.", hint=broken[0].remedy)


def _print_findings(findings: Sequence[Finding], *, all_extras: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from clip_rd_edge.cli.console import print_table
    from clip_rd_edge.errors import install_command

    extras = [finding for finding in findings if finding.is_extra]
    shown = findings if all_extras else [finding for finding in findings if not finding.is_extra]
    table = Table(show_header=False)
    for finding in sorted(shown, key=lambda finding: (finding.is_extra, list(_STYLES).index(finding.state))):
        detail = Text(finding.detail)
        if finding.remedy:
            detail.append(f"\n{finding.remedy}", style="bold")
        table.add_row(finding.what, Text(finding.state, style=_STYLES[finding.state]), detail)
    if not all_extras:
        names = {state: ", ".join(sorted(f.what.strip("[]") for f in extras if f.state == state)) for state in _STYLES}
        detail = Text(f"{names['ok'] or 'none'}; not installed: {names['missing'] or 'none'}")
        detail.append(f"\n{install_command('NAME')}", style="bold").append("; what each is for: doctor --extras")
        table.add_row("extras", Text("ok", style=_STYLES["ok"]), detail)
    print_table(table, columns=_DOCTOR_COLUMNS)
