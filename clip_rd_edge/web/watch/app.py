"""The server of `clip-rd-edge watch`: the page of a run, made anew for every request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from html import escape
from pathlib import Path

import anyio.to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.web.app import PAGE, run_server, serve_file
from clip_rd_edge.web.guard import LOOPBACK, Guard
from clip_rd_edge.web.watch.page import FOLDER, render
from clip_rd_edge.web.watch.state import Answers, read_run

_FILES = {"style.css": FOLDER / "style.css", "watch.js": FOLDER / "watch.js", "icon.svg": PAGE / "icon.svg"}
_PROBLEM = """<!doctype html>
<html lang="en"><meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<title>clip-rd-edge watch</title><main><h1>clip-rd-edge watch</h1><p>{}</p></main></html>"""


def make_app(run: Path, answers: Callable[[], Answers], *, host: str = LOOPBACK) -> Starlette:
    """Return the ASGI application of a run's page.

    Args:
        answers: returns at once what is known of the current student's answers.
        host: that the server listens on, as for `web.guard.Guard`.
    """

    def page() -> Response:
        try:
            return HTMLResponse(render(read_run(run), answers(), served=True))
        except ClipRdEdgeError as error:  # such as a run's folder that was removed meanwhile
            logging.getLogger("uvicorn.error").error("%s", error)
            return HTMLResponse(_PROBLEM.format(escape(str(error))), 500)

    async def serve_page(request: Request) -> Response:
        return await anyio.to_thread.run_sync(page)

    return Starlette(
        routes=[
            Route("/", serve_page),
            *(Route(f"/{name}", serve_file(path)) for name, path in _FILES.items()),
        ],
        middleware=[Middleware(Guard, host=host)],
    )


def serve(run: Path, answers: Callable[[], Answers], *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page of a run until it is interrupted; arguments as for `web.app.serve` and `make_app`."""
    run_server(make_app(run, answers, host=host), host=host, port=port, ready=ready, stop_within_s=2)
