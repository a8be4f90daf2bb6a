"""`clip-rd-edge watch`: a page that shows how a run goes."""

from __future__ import annotations

from pathlib import Path

import click

from clip_rd_edge.cli._echo import echo
from clip_rd_edge.cli._options import GroupedCommand, PathName, complete_task, drop_none, grouped
from clip_rd_edge.cli._server import print_addresses, print_how_to_stop, server_options

_page = grouped("Page")


@click.command("watch", cls=GroupedCommand, short_help="Watch a run on a page: curves, time left, sample answers.")
@click.argument("run", type=PathName())
@_page(
    "-o", "--output", type=PathName(dir_okay=False), metavar="FILE",
    help="Write the page as it is now into one HTML file, and serve nothing.  [default: serve it]",
)  # fmt: skip
@_page(
    "--task", metavar="NAME", shell_complete=complete_task,
    help="Task whose images the student is asked about (see evaluate).  [default: the run's first, else its pairs]",
)  # fmt: skip
@_page(
    "--answers/--no-answers", default=True, show_default=True,
    help="Compute the student's answers to sample images, which needs PyTorch and some seconds per checkpoint.",
)  # fmt: skip
@_page(
    "--threads", type=click.IntRange(1), default=1, show_default=True, metavar="N",
    help="Threads for the answers; the run needs the others.",
)  # fmt: skip
@_page("--open", "open_page", is_flag=True, help="Open the page in your browser.")
@server_options(8767)
def command(
    run: Path, output: Path | None, task: str | None, answers: bool, threads: int, open_page: bool, host: str, port: int
) -> None:
    """Serve a page that shows how RUN goes, the folder that distill writes to: while it runs, or afterwards.

    \b
    clip-rd-edge watch runs/first
    clip-rd-edge watch runs/first -o watch.html

    The page has the curves of accuracy, loss and throughput, the time left, and what the student of the newest
    checkpoint answers about sample images. It follows the run by itself. The run needs no option for it, and nothing in
    its folder is changed. Nothing is loaded from the internet. Ctrl-C stops the server.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import say

    def ready(url: str) -> None:
        print_addresses(url, host)
        print_how_to_stop(
            host, warning="Anyone on this network can see the page; there is no password and no encryption."
        )
        if open_page:
            click.launch(url)

    say("starting watch")
    options = drop_none(output=output, task=task)
    edge.watch(run, answers=answers, threads=threads, host=host, port=port, ready=ready, **options)
    if output is not None:
        echo(output)
        if open_page:
            click.launch(str(output))
