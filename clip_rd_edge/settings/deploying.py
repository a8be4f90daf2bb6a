"""What a bundle is asked for on a device: an index, a search, a server, a page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

from clip_rd_edge.settings.options import Settings, argument, option
from clip_rd_edge.utils.paths import AnyPath
from clip_rd_edge.utils.reporting import SILENT, Reporter

# A list of labels as they are; a text, which is one label or the path of a label file; a path; or None.
Labels = Iterable[str] | AnyPath | None
# See `runtime.backends.onnxruntime`.
Device = Literal["auto", "cpu", "cuda", "tensorrt", "coreml", "openvino", "openvino-gpu", "openvino-npu", "xnnpack"]


Threads = Annotated[int, option("Threads of the model.", group="Device", metavar="N", ge=1, default="all cores")]
OnDevice = Annotated[
    Device,
    option(
        f"Where ONNX Runtime or OpenVINO computes: {', '.join(get_args(Device))}. `clip-rd-edge doctor` lists what is "
        "here.",
        group="Device", metavar="NAME",
        words={"gpu": "cuda", "nvidia": "cuda", "trt": "tensorrt", "apple": "coreml"},
    ),
]  # fmt: skip
Force = Annotated[
    bool,
    option(
        "Answer although this processor computes the bundle's INT8 wrongly, for which verify fails.", group="Device"
    ),
]
Host = Annotated[str, option("Address to listen on; 0.0.0.0 for the network.", group="Server", metavar="ADDRESS")]
Port = Annotated[int, option("Port to listen on; 0 uses any free port.", group="Server", metavar="N", ge=0, le=65535)]


class _Verified(Settings, frozen=True):
    bundle: Annotated[AnyPath, argument("The bundle.", path=True)]


class Verify(_Verified, frozen=True, kw_only=True):
    """Check a bundle."""

    threads: Threads | None = None
    device: OnDevice = "auto"
    time_limit: Annotated[
        float,
        option(
            "Seconds after which a tower that still runs is ended, and fails.",
            group="Device", metavar="SECONDS", gt=0, default="300, and 1 for each MB of the bundle",
        ),
    ] | None = None  # fmt: skip


class Classify(Settings, frozen=True, kw_only=True):
    """Classify images among labels: the options of the command line, which Python gives to `load` and `classify`."""

    bundle: Annotated[AnyPath, argument("The bundle.", path=True)]
    images: Annotated[Sequence[str], argument("Files, folders, globs, or - for stdin.", metavar="IMAGE")] = ()
    labels: Annotated[
        Labels,
        option(
            'Labels such as "a cat" "a dog"; everyday, for some 300 everyday things; or a label file: text with one '
            "label per line (a line that starts with # and a space is a comment), a CSV with the column label, or a "
            "JSON list.",
            group="Labels", metavar="LABEL...|FILE", many=True, complete="labels", default="the labels in the bundle",
        ),
    ] = None  # fmt: skip
    templates: Annotated[
        str | Sequence[str] | None,
        option(
            'Prompt template with {} for the label, such as "a photo of a {}", a file with one per line, or imagenet '
            "for CLIP's 80; can be repeated.",
            flags=("--template",), group="Labels", metavar="PROMPT|FILE", complete="imagenet", default="the model's",
        ),
    ] = None  # fmt: skip
    top: Annotated[int, option("Number of labels to print per image.", group="Labels", metavar="N", ge=1)] = 3
    none_below: Annotated[
        float,
        option(
            "Omit labels with a probability below P (with a single label: a cosine similarity below P); if none is "
            'left, print "none of these".',
            group="Labels", metavar="P", ge=0, le=1,
        ),
    ] = 0.0  # fmt: skip
    cache: Annotated[
        bool,
        option(
            "Cache the labels' embeddings, so that the next run with these labels need not load the text tower.",
            group="Labels",
        ),
    ] = True  # fmt: skip
    camera: Annotated[
        str,
        option(
            "Classify the newest frames of a camera (0 is the first) or a stream (rtsp://…) until Ctrl-C, or all "
            "frames of a video file.",
            group="Images", metavar="NUMBER|PATH|URL", default="none",
        ),
    ] | None = None  # fmt: skip
    quick: Annotated[
        bool,
        option("Decode large JPEGs at a fraction of their size; results change slightly.", group="Images"),
    ] = False
    threads: Threads | None = None
    device: OnDevice = "auto"
    force: Force = False


class _Indexed(Settings, frozen=True):
    bundle: Annotated[AnyPath, argument("The bundle that embeds the images.", path=True)]
    folder: Annotated[AnyPath, argument("The images, in subfolders, too.", path=True)]
    output: Annotated[
        AnyPath, option("Folder for the index.", flags=("-o", "--output"), group="Output", metavar="INDEX", path=True)
    ]


class Index(_Indexed, frozen=True, kw_only=True):
    """Build or update a search index of images."""

    threads: Threads | None = None
    device: OnDevice = "auto"
    force: Force = False
    ray: Annotated[
        str,
        option(
            "Spread the work over a Ray cluster, whose machines need the same bundle and images: auto for the one of "
            "this machine, or HOST:PORT.",
            group="Cluster", metavar="ADDRESS", default="this machine",
        ),
    ] | None = None  # fmt: skip
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

    top: Annotated[int, option("Number of images to print.", group="Query", metavar="N", ge=1)] = 10
    bundle: Annotated[
        AnyPath,
        option(
            "The bundle that made the index, if it was moved or is another machine's.", group="Query", metavar="FOLDER",
            path=True, default="the one that was named for this index last",
        ),
    ] | None = None  # fmt: skip
    folder: Annotated[
        AnyPath,
        option(
            "Current path of the image folder, if it was moved.", group="Query", metavar="FOLDER", path=True,
            default="the path that the index names",
        ),
    ] | None = None  # fmt: skip
    exact: Annotated[
        bool, option("Compare all images, even if the index has a graph for approximate search.", group="Query")
    ] = False
    threads: Threads | None = None
    device: OnDevice = "auto"
    force: Force = False


class _Served(Settings, frozen=True):
    bundle: Annotated[AnyPath, argument("The bundle.", path=True)]
    index: Annotated[AnyPath, argument("An index that the bundle made, to search.", path=True)] | None = None


class Serve(_Served, frozen=True, kw_only=True):
    """Serve a bundle to other programs over HTTP."""

    host: Host = "127.0.0.1"
    port: Port = 8766
    token: str = ""
    ready: Callable[[str], None] = lambda url: None
    allow_host: Annotated[
        str | Sequence[str],
        option(
            "Host name by which clients reach the server, such as a container's or that of a site whose proxy passes "
            "requests on, if there is no token; can be repeated.",
            group="Server", metavar="NAME", default="none",
        ),
    ] = ()  # fmt: skip
    max_batch: Annotated[
        int, option("Max images or texts per call of the model.", group="Limits", metavar="N", ge=1)
    ] = 16
    max_items: Annotated[
        int,
        option(
            "Max images and texts that wait for their answer; requests beyond are answered with 503.",
            group="Limits", metavar="N", ge=1,
        ),
    ] = 1024  # fmt: skip
    threads: Threads | None = None
    device: OnDevice = "auto"
    force: Force = False


class _Shown(Settings, frozen=True):
    bundles: Annotated[AnyPath | Sequence[AnyPath], argument("One or more bundles.", metavar="BUNDLE", path=True)]


class Demo(_Shown, frozen=True, kw_only=True):
    """Serve a web page that tries bundles."""

    labels: Annotated[
        Labels,
        option(
            'Initial labels such as "a cat" "a dog", everyday, or a label file (see classify); at most 2,000.',
            group="Page", metavar="LABEL...|FILE", many=True, complete="labels",
            default="the labels in the bundle, else the page's own",
        ),
    ] = None  # fmt: skip
    host: Host = "127.0.0.1"
    port: Port = 8765
    threads: Threads | None = None
    force: Force = False
    ready: Callable[[str], None] = lambda url: None
