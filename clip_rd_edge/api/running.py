"""Use a bundle: search, servers, pages, and what this machine can do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_rd_edge.api.exporting import place_of
from clip_rd_edge.errors import InputError, UsageError, needs_extra
from clip_rd_edge.settings.deploying import Demo, Index, Search, Serve, Teach, WatchIndex
from clip_rd_edge.settings.options import keywords_of
from clip_rd_edge.utils.paths import near_files

if TYPE_CHECKING:
    from clip_rd_edge.runtime.doctor import Finding
    from clip_rd_edge.runtime.encoder import BundleEncoder
    from clip_rd_edge.runtime.index import Hits
    from clip_rd_edge.runtime.index_update import Update
    from clip_rd_edge.runtime.taught import Lesson


@keywords_of(Teach)
def teach(request: Teach) -> Lesson:
    """Teach a bundle labels from a few images of each, and write the result as a new bundle.

    The labels join those that the bundle has, or replace them. The bundle keeps the embeddings of the images, so that
    more can be taught later without the images. `Model.teach` teaches an open model without writing one.

    Raises:
        UsageError: `output` is in use, or there is neither a folder nor a label to forget.
        InputError: the folder or an image cannot be read, or a label to forget was not taught.
    """
    from clip_rd_edge.bundle.outputs import require_output
    from clip_rd_edge.runtime import taught
    from clip_rd_edge.runtime.load import load as load_bundle

    bundle, output, given = Path(place_of(request.bundle)), Path(request.output), request.folder
    forget = [request.forget] if isinstance(request.forget, str) else list(request.forget)
    if given is None and not forget:
        hint = "name a folder with a subfolder of images for each label, or a label with {forget}"
        raise UsageError("There is nothing to teach or to forget.", hint=hint, option="folder")
    folder = Path(given) if isinstance(given, str | os.PathLike) else None
    require_output(output, "export", overwrite=request.force, sources=[bundle, *([folder] if folder else [])])
    encoder = load_bundle(bundle, threads=request.threads, device=request.device, force=request.force)
    request.reporter.update("embedding the images")
    if folder is not None and folder.suffix == ".npz":
        examples: Any = taught.images_of(encoder, folder)
    else:
        examples = class_images(folder) if folder else given or {}
    lesson = taught.teach(encoder, examples, forget=forget, alone=request.alone)
    taught.write_taught_bundle(encoder, output, overwrite=request.force)
    return lesson


def class_images(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each class folder by the class's name; a folder without class folders is one class."""
    from clip_rd_edge.bundle.image_files import list_images
    from clip_rd_edge.data.folders import CLASS_NAMES, class_folders, class_name, subfolders

    if not folder.is_dir():
        raise InputError(f"The folder {folder} does not exist.{near_files(folder)}", hint="check the path")
    classes = (
        class_folders(folder, folder / CLASS_NAMES) if subfolders(folder) else [(folder, class_name(folder.resolve()))]
    )
    return {name: list_images(inner) for inner, name in classes}


@keywords_of(Index)
def index(request: Index) -> Update:
    """Build or update a search index of the images under a folder; only new and changed images are embedded."""
    from clip_rd_edge.runtime.index_update import update_index

    encoder = _opened(request)
    if not encoder.has_text_tower:  # before minutes are spent
        request.reporter.note("the bundle has no text tower: only images, not texts, can be searched for in this index")
    return update_index(
        encoder, Path(request.folder), Path(request.output), cluster=request.ray, reporter=request.reporter
    )


@keywords_of(WatchIndex)
def watch_index(request: WatchIndex) -> Iterator[Update]:
    """Build or update a search index as `index` does, and keep it up to date while images come, change and go.

    Yields what each update has done, until `stop` is set; everything that is embedded is then saved.
    """
    from clip_rd_edge.runtime.index_watch import watch_index as watch

    return watch(
        _opened(request), Path(request.folder), Path(request.output), stop=request.stop, reporter=request.reporter
    )


def _opened(request: Index | WatchIndex | Serve) -> BundleEncoder:
    """Return the bundle of a request, whose threads do not spin while they wait: it runs beside other work."""
    from clip_rd_edge.runtime.load import load as load_bundle

    return load_bundle(
        Path(place_of(request.bundle)), threads=request.threads, device=request.device, spin=False, force=request.force
    )


@keywords_of(Search)
def search(request: Search) -> Hits:
    """Return the images of an index that are nearest to a text or an image, nearest first, as a list of `Hit`.

    The list's attribute `missing` is the number of images that an interrupted indexing has left out, and `cutoff` the
    similarity below which images fit a text no better than random texts, which `fitting` leaves out.
    """
    from clip_rd_edge.runtime.index import search_index

    bundle, folder = request.bundle, request.folder
    hits = search_index(
        Path(request.index), request.query, top=request.top, bundle=bundle, folder=folder, exact=request.exact,
        threads=request.threads, device=request.device, force=request.force,
    )  # fmt: skip
    if request.fitting and hits.cutoff is not None:
        hits[:] = [hit for hit in hits if hit.similarity >= hits.cutoff]
    return hits


@keywords_of(Demo)
def demo(request: Demo) -> None:
    """Serve a local web page to try bundles with a camera or image files, until Ctrl-C.

    `ready` is called with the page's URL once the server accepts connections.
    """
    from clip_rd_edge.runtime.labels import label_names
    from clip_rd_edge.serving.demo import Demo as Page
    from clip_rd_edge.serving.demo import make_app
    from clip_rd_edge.serving.server import run_server

    given = request.bundles
    several = [given] if isinstance(given, str | os.PathLike) else given
    paths = [Path(place_of(path)) for path in several]
    page = Page(paths, labels=label_names(request.labels), threads=request.threads, force=request.force)
    app = make_app(page, host=request.host)
    run_server(app, host=request.host, port=request.port, ready=request.ready, stop_within_s=2)


@keywords_of(Serve)
def serve(request: Serve) -> None:
    """Serve a bundle to other programs over HTTP until SIGINT or SIGTERM: embeddings, classification and search.

    Requests need the bearer `token`, if it is not empty. `ready` is called with the server's URL once it accepts
    connections.

    Raises:
        InputError: there is no bundle or index, another bundle created the index, or no client can send the token.
        UsageError: a limit is less than 1, listening on the address failed, or a host has no name.
    """
    from clip_rd_edge import __version__
    from clip_rd_edge.runtime.index import remembered_folder

    with needs_extra("starlette", extra="serve", purpose="Serving a bundle"):
        from clip_rd_edge.serving.server import run_server
        from clip_rd_edge.serving.service import Service, make_app
    token = sendable_token(request.token) if request.token else ""
    folder = images = None
    if request.index is not None:
        folder = Path(request.index)
        images = remembered_folder(folder) if request.folder is None else Path(request.folder)
    limits = {"max_batch": request.max_batch, "max_items": request.max_items}
    service = Service(_opened(request), index=folder, images=images, version=__version__, **limits)
    app = make_app(service, token=token, host=request.host, names=request.allow_host)
    run_server(app, host=request.host, port=request.port, ready=request.ready, stop_within_s=10)


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
