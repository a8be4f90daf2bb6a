"""`clip-rd-edge serve`: embeddings, classification and search over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clip_rd_edge.cli._command import command_of
from clip_rd_edge.cli._options import PathName, grouped
from clip_rd_edge.cli._server import print_addresses, print_how_to_stop
from clip_rd_edge.settings.deploying import Serve

TOKEN_VARIABLE = "CLIP_RD_EDGE_TOKEN"


@command_of(Serve, "serve")
@grouped("Server")(
    "--token-file", type=PathName(), metavar="FILE",
    help=f"File with the bearer token that requests need.  [default: the variable {TOKEN_VARIABLE}, else none]",
)  # fmt: skip
def command(given: dict[str, Any], token_file: Path | None) -> None:
    """Serve BUNDLE over HTTP, and search INDEX. Ctrl-C or SIGTERM stops it after the requests in progress.

    \b
    clip-rd-edge serve bundle
    clip-rd-edge serve bundle photos.index --host 0.0.0.0 --token-file token.txt

    POST /embeddings takes texts, and images in base64, as llama.cpp does (Frigate); POST /v1/embeddings takes texts,
    and images as data URLs, as OpenAI does; POST /classify returns the most likely labels of an image, POST /search the
    nearest images of INDEX. GET /v1/models, /props, /health, /metrics and /openapi.json describe the server.
    """
    import clip_rd_edge as edge
    from clip_rd_edge.cli._console import say

    say("starting serve")
    token = _token(token_file)
    host = given.get("host", "127.0.0.1")

    def ready(url: str) -> None:
        print_addresses(url, host)
        access = "needs the token" if token else "can be used by anyone on this network, because there is no token"
        print_how_to_stop(host, warning=f"The server {access}; there is no encryption.")

    edge.serve(**given, token=token, ready=ready)


def _token(file: Path | None) -> str:
    from clip_rd_edge.api.running import sendable_token
    from clip_rd_edge.utils.files import read_text_limited

    if file is None:
        # One that is set and empty is a secret that was not found: it opens the server to nobody.
        of_variable = os.environ.get(TOKEN_VARIABLE)
        return "" if of_variable is None else sendable_token(of_variable, source=f"The token in {TOKEN_VARIABLE}")
    return sendable_token(read_text_limited(file), source=f"The token file {file}")
