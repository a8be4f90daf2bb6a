"""What a bundle is asked for on a device: an index, a search, a server, a page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args

from clip_rd_edge.settings.options import Settings, argument, option
from clip_rd_edge.utils.paths import AnyPath
from clip_rd_edge.utils.reporting import SILENT, Reporter

_device = partial(option, group="Device")
_server = partial(option, group="Server")
_labels = partial(option, group="Labels")
_images = partial(option, group="Images")
_output = partial(option, group="Output")
_cluster = partial(option, group="Cluster")
_query = partial(option, group="Query")
_limits = partial(option, group="Limits")
_page = partial(option, group="Page")

# A list of labels as they are; a text, which is one label or the path of a label file; a path; or None.
Labels = Iterable[str] | AnyPath | None
# See `runtime.backends.onnxruntime`.
Device = Literal["auto", "cpu", "cuda", "tensorrt", "coreml", "openvino", "openvino-gpu", "openvino-npu", "xnnpack"]


Threads = Annotated[int, _device("Threads of the model.", metavar="N", default="all cores", ge=1)]
OnDevice = Annotated[
    Device,
    option(
        f"Where ONNX Runtime or OpenVINO computes: {', '.join(get_args(Device))}. `clip-rd-edge doctor` lists what is "
        "here.",
        group="Device", metavar="NAME",
        words={"gpu": "cuda", "nvidia": "cuda", "trt": "tensorrt", "apple": "coreml"},
    ),
]  # fmt: skip
Force = Annotated[bool, _device(
    "Answer although this processor computes the bundle's INT8 wrongly, for which verify fails.",
)]  # fmt: skip
Host = Annotated[str, _server("Address to listen on; 0.0.0.0 for the network.", metavar="ADDRESS")]
Port = Annotated[int, _server("Port to listen on; 0 uses any free port.", metavar="N", ge=0, le=65535)]


class _Verified(Settings, frozen=True):
    bundle: Annotated[AnyPath, argument("The bundle, or everyday.", path=True)]


class Verify(_Verified, frozen=True, kw_only=True):
    """Check a bundle."""

    threads: Threads | None = None
    device: OnDevice = "auto"
    time_limit: Annotated[float, _device(
        "Seconds after which a tower that still runs is ended, and fails.", metavar="SECONDS",
        default="300, and 1 for each MB of the bundle", gt=0,
    )] | None = None  # fmt: skip


class Classify(Settings, frozen=True, kw_only=True):
    """Classify images among labels: the options of the command line, which Python gives to `load` and `classify`."""

    bundle: Annotated[AnyPath, argument("The bundle, or everyday.", path=True)]
    images: Annotated[Sequence[str], argument("Files, folders, globs, or - for stdin.", metavar="IMAGE")] = ()
    labels: Annotated[Labels, _labels(
        'Labels such as "a cat" "a dog"; everyday, for some 300 everyday things; or a label file: text with one label '
        "per line (a line that starts with # and a space is a comment), a CSV with the column label, or a JSON list.",
        metavar="LABEL...|FILE", default="the labels in the bundle", complete="labels", many=True,
    )] = None  # fmt: skip
    templates: Annotated[str | Sequence[str] | None, _labels(
        'Prompt template with {} for the label, such as "a photo of a {}", a file with one per line, or imagenet for '
        "CLIP's 80; can be repeated.", flags=("--template",), metavar="PROMPT|FILE", default="the model's",
        complete="imagenet",
    )] = None  # fmt: skip
    top: Annotated[int, _labels("Number of labels to print per image.", metavar="N", ge=1)] = 3
    none_below: Annotated[float, _labels(
        "Omit labels with a probability below P (with a single label: a cosine similarity below P); if none is left, "
        'print "none of these".', metavar="P", ge=0, le=1,
    )] = 0.0  # fmt: skip
    cache: Annotated[bool, _labels(
        "Cache the labels' embeddings, so that the next run with these labels need not load the text tower.",
    )] = True  # fmt: skip
    camera: Annotated[str, _images(
        "Classify the newest frames of a camera (0 is the first) or a stream (rtsp://…) until Ctrl-C, or all frames of "
        "a video file.", metavar="NUMBER|PATH|URL", default="none",
    )] | None = None  # fmt: skip
    quick: Annotated[bool, _images("Decode large JPEGs at a fraction of their size; results change slightly.")] = False
    threads: Threads | None = None
    device: OnDevice = "auto"
    force: Force = False


class _Indexed(Settings, frozen=True):
    bundle: Annotated[AnyPath, argument("The bundle that embeds the images.", path=True)]
    folder: Annotated[AnyPath, argument("The images, in subfolders, too.", path=True)]
    output: Annotated[AnyPath, _output("Folder for the index.", flags=("-o", "--output"), metavar="INDEX", path=True)]


class Index(_Indexed, frozen=True, kw_only=True):
    """Build or update a search index of images."""

    threads: Threads | None = None
    device: OnDevice = "auto"
    force: Force = False
    ray: Annotated[str, _cluster(
        "Spread the work over a Ray cluster, whose machines need the same bundle and images: auto for the one of this "
        "machine, or HOST:PORT.", metavar="ADDRESS", default="this machine",
    )] | None = None  # fmt: skip
    reporter: Reporter = SILENT


class WatchIndex(_Indexed, frozen=True, kw_only=True):
    """Keep a search index up to date."""

    threads: Threads | None = None
    device: OnDevice = "auto"
    force: Force = False
    stop: threading.Event | None = None
    reporter: Reporter = SILENT


class _Searched(Settings, frozen=True):
    index: Annotated[AnyPath, argument("The folder of an index.", path=True)]
    query: Annotated[AnyPath | Any, argument("A text, or an image: its path, a PIL image or an array.")]


class Search(_Searched, frozen=True, kw_only=True):
    """Find the images of an index that are nearest to a text or an image."""

    top: Annotated[int, _query("Number of images to print.", metavar="N", ge=1)] = 10
    bundle: Annotated[AnyPath, _query(
        "The bundle that made the index, if it was moved or is another machine's.", metavar="FOLDER",
        default="the one that was named for this index last", path=True,
    )] | None = None  # fmt: skip
    folder: Annotated[AnyPath, _query(
        "Current path of the image folder, if it was moved.", metavar="FOLDER",
        default="the path that the index names", path=True,
    )] | None = None  # fmt: skip
    exact: Annotated[bool, _query("Compare all images, even if the index has a graph for approximate search.")] = False
    threads: Threads | None = None
    device: OnDevice = "auto"
    force: Force = False


class _Served(Settings, frozen=True):
    bundle: Annotated[AnyPath, argument("The bundle, or everyday.", path=True)]
    index: Annotated[AnyPath, argument("An index that the bundle made, to search.", path=True)] | None = None


class Serve(_Served, frozen=True, kw_only=True):
    """Serve a bundle to other programs over HTTP."""

    host: Host = "127.0.0.1"
    port: Port = 8766
    token: str = ""
    ready: Callable[[str], None] = lambda url: None
    allow_host: Annotated[str | Sequence[str], _server(
        "Host name by which clients reach the server, such as a container's or that of a site whose proxy passes "
        "requests on, if there is no token; can be repeated.", metavar="NAME", default="none",
    )] = ()  # fmt: skip
    max_batch: Annotated[int, _limits("Max images or texts per call of the model.", metavar="N", ge=1)] = 16
    max_items: Annotated[int, _limits(
        "Max images and texts that wait for their answer; requests beyond are answered with 503.", metavar="N", ge=1,
    )] = 1024  # fmt: skip
    threads: Threads | None = None
    device: OnDevice = "auto"
    force: Force = False


class _Shown(Settings, frozen=True):
    bundles: Annotated[AnyPath | Sequence[AnyPath], argument(
        "One or more bundles; without any, everyday.", metavar="BUNDLE", path=True
    )] = "everyday"  # fmt: skip


class Demo(_Shown, frozen=True, kw_only=True):
    """Serve a web page that tries bundles."""

    labels: Annotated[Labels, _page(
        'Initial labels such as "a cat" "a dog", everyday, or a label file (see classify); at most 2,000.',
        metavar="LABEL...|FILE", default="the labels in the bundle, else the page's own", complete="labels",
        many=True,
    )] = None  # fmt: skip
    host: Host = "127.0.0.1"
    port: Port = 8765
    threads: Threads | None = None
    force: Force = False
    ready: Callable[[str], None] = lambda url: None
