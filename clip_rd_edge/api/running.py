"""Use a bundle: search, servers, pages, and what this machine can do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from clip_rd_edge.errors import InputError, MissingExtraError, require_known_options
from clip_rd_edge.utils.calls import checked_call
from clip_rd_edge.utils.paths import AnyPath
from clip_rd_edge.utils.reporting import SILENT, Reporter

if TYPE_CHECKING:
    import threading

    from typing_extensions import Unpack

    from clip_rd_edge.contract.images import ImageInput
    from clip_rd_edge.runtime.doctor import Finding
    from clip_rd_edge.runtime.index.image_index import Hits
    from clip_rd_edge.runtime.index.update import Update
    from clip_rd_edge.runtime.label_list import Labels


class ServeOptions(TypedDict, total=False):
    """The options of `serve` and the command line.

    Keys:
        threads: threads of the model. Default: all cores.
        device: as for `load`.
        max_batch: max number of images or texts per call of a tower. Default: 16.
        max_items: max number of images and texts of requests that are not answered yet; what exceeds it is answered
            with 503 and Retry-After. Default: 1,024.
        allow_host: further host names by which clients reach the server, or of sites whose proxy passes requests on, if
            there is no token; one or several.
    """

    threads: int | None
    device: str
    max_batch: int
    max_items: int
    allow_host: str | Sequence[str]


@checked_call
def index(
    bundle: AnyPath,
    folder: AnyPath,
    output: AnyPath,
    *,
    threads: int | None = None,
    device: str = "auto",
    ray: str | None = None,
    reporter: Reporter = SILENT,
) -> Update:
    """Build or update a search index of the images under a folder; only new and changed images are embedded.

    Args:
        ray: address of a Ray cluster that embeds them (`auto`, HOST:PORT); its machines need the same bundle and
            images.
    """
    from clip_rd_edge.runtime.index.update import update_index
    from clip_rd_edge.runtime.load import load as load_bundle

    encoder = load_bundle(Path(bundle), threads=threads, device=device, spin=False)
    return update_index(encoder, Path(folder), Path(output), cluster=ray, reporter=reporter)


@checked_call
def watch_index(
    bundle: AnyPath,
    folder: AnyPath,
    output: AnyPath,
    *,
    threads: int | None = None,
    device: str = "auto",
    stop: threading.Event | None = None,
    reporter: Reporter = SILENT,
) -> Iterator[Update]:
    """Build or update a search index as `index` does, and keep it up to date while images come, change and go.

    Args:
        stop: ends the watch when it is set, with everything saved that is embedded; None watches for ever.

    Yields:
        What each update has done.
    """
    from clip_rd_edge.runtime.index.watch import watch_index as watch
    from clip_rd_edge.runtime.load import load as load_bundle

    encoder = load_bundle(Path(bundle), threads=threads, device=device, spin=False)
    return watch(encoder, Path(folder), Path(output), stop=stop, reporter=reporter)


@checked_call
def search(
    index: AnyPath,
    query: str | ImageInput,
    *,
    top: int = 10,
    bundle: AnyPath | None = None,
    folder: AnyPath | None = None,
    exact: bool = False,
    threads: int | None = None,
    device: str = "auto",
) -> Hits:
    """Return the images of an index that are nearest to a text or an image, nearest first, as a list of `Hit`.

    Its attribute `missing` is the number of images that are not in the index yet, if indexing was interrupted.

    Args:
        query: a text, the path of an image file, a PIL image or an array.
        bundle: current path of the bundle that built the index, if it was moved.
        folder: current path of the image folder, if it was moved.
        exact: compare all images, even if the index has a graph for approximate search.
    """
    from clip_rd_edge.runtime.index.image_index import search_index

    return search_index(
        Path(index), query, top=top, bundle=bundle, folder=folder, exact=exact, threads=threads, device=device
    )


@checked_call
def demo(
    bundles: AnyPath | Sequence[AnyPath],
    *,
    labels: Labels = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    threads: int | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a local web page to try bundles with a camera or image files, until Ctrl-C.

    Args:
        labels: initial labels of the page; None uses the bundle's own.
        ready: called with the page's URL once the server accepts connections.
    """
    from clip_rd_edge.runtime.label_list import label_names
    from clip_rd_edge.web.app import Demo, serve

    paths = [bundles] if isinstance(bundles, str | os.PathLike) else bundles
    serve(
        Demo([Path(path) for path in paths], labels=label_names(labels), threads=threads),
        host=host,
        port=port,
        ready=ready,
    )


@checked_call
def serve(
    bundle: AnyPath,
    index: AnyPath | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8766,
    token: str = "",
    ready: Callable[[str], None] = lambda url: None,
    **options: Unpack[ServeOptions],
) -> None:
    """Serve a bundle to other programs over HTTP until SIGINT or SIGTERM: embeddings, classification and search.

    Args:
        index: an index that the bundle created, for /search.
        token: the bearer token that requests need, without the white space around it; empty for none.
        ready: called with the server's URL once it accepts connections.
        options: the other options of `clip-rd-edge serve`, under the same names.

    Raises:
        InputError: there is no bundle or index, another bundle created the index, or no client can send the token.
        ConfigError: a limit is less than 1.
        UsageError: listening on the address failed, an option is unknown, or a host has no name.
    """
    from clip_rd_edge import __version__
    from clip_rd_edge.runtime.load import load as load_bundle

    require_known_options(options, ServeOptions.__annotations__, command="serve")
    try:
        from clip_rd_edge.serving.app import make_app
        from clip_rd_edge.serving.service import Limits, Service
        from clip_rd_edge.web.app import run_server
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "starlette", extra="serve", purpose="Serving a bundle") from error
    token = sendable_token(token) if token else ""
    limits = Limits(**{name: options[name] for name in ("max_batch", "max_items") if name in options})
    encoder = load_bundle(
        Path(bundle), threads=options.get("threads"), device=options.get("device", "auto"), spin=False
    )
    folder = None if index is None else Path(index)
    service = Service(encoder, index=folder, limits=limits, version=__version__)
    app = make_app(service, token=token, host=host, names=options.get("allow_host", ()))
    run_server(app, host=host, port=port, ready=ready, stop_within_s=10)


def sendable_token(token: str, *, source: str = "The token") -> str:
    """Return a token without the white space around it; raise InputError if no HTTP header carries it."""
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        reason = "has characters that an HTTP header does not carry" if token else "is empty"
        raise InputError(
            f"{source} {reason}.",
            hint="use a long row of random letters and digits; for a server without a token, leave it out",
        )
    return token


def doctor() -> list[Finding]:
    """Report which runtimes this machine supports, what is missing, and the command that installs it."""
    from clip_rd_edge.runtime.doctor import examine

    return examine()
