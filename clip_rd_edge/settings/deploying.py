"""The options of an export, and of a bundle on a device: an index, a search, a server, a page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args

from clip_rd_edge.settings.options import Reported, Settings, argument, option, output_to
from clip_rd_edge.utils.paths import AnyPath
from clip_rd_edge.utils.text import SILENT, Reporter

_device = partial(option, group="Device")
_server = partial(option, group="Server")
_labels = partial(option, group="Labels")
_images = partial(option, group="Images")
_output = partial(option, group="Output")
_cluster = partial(option, group="Cluster")
_query = partial(option, group="Query")
_limits = partial(option, group="Limits")
_page = partial(option, group="Page")
_bundle = partial(option, group="Bundle")
_int8 = partial(option, group="INT8")

# A list of labels as they are; a text, which is one label or the path of a label file; a path; or None.
Labels = Iterable[str] | AnyPath | None
ExportPrecision = Literal["fp32", "fp16", "bf16", "int8"]
ExportLayout = Literal["bundle", "huggingface", "immich"]
# Precision of a tower that INT8 does not improve; `none` refuses the export.
Fallback = Literal["fp32", "fp16", "none"]
Via = Literal["onnx", "torch-tensorrt"]  # how TensorRT engines are built
# See `runtime.backends.onnxruntime`.
Device = Literal[
    "auto", "cpu", "cuda", "tensorrt", "coreml", "openvino", "openvino-bf16", "openvino-gpu", "openvino-npu", "xnnpack"
]


Threads = Annotated[int, _device("Threads of the model.", metavar="N", default="all cores", ge=1)]
OnDevice = Annotated[
    Device,
    option(
        f"Where ONNX Runtime or OpenVINO computes: {', '.join(get_args(Device))}. `clip-rd-edge doctor` lists what is "
        "here.",
        group="Device", metavar="NAME",
    ),
]  # fmt: skip
Force = Annotated[bool, _device(
    "Run a bundle even if this processor computes its INT8 wrongly, so that verify fails.",
)]  # fmt: skip
Host = Annotated[str, _server("Address to listen on; 0.0.0.0 for the network.", metavar="ADDRESS")]
Port = Annotated[int, _server("Port to listen on; 0 uses any free port.", metavar="N", ge=0, le=65535)]


class _OnDevice(Settings, frozen=True, kw_only=True):
    threads: Threads | None = None
    device: OnDevice = "auto"


class _Forced(_OnDevice, frozen=True, kw_only=True):
    force: Force = False


Modules = Annotated[AnyPath | Sequence[AnyPath], option(
    "Python file or module that registers the model, as {terms} of distill does; it is run. Can be repeated.",
    group="Model", metavar="FILE|MODULE", default="none", flags=("--import",),
)]  # fmt: skip


class _Exported(Reported, frozen=True):
    model: Annotated[AnyPath, argument("The model.")]
    output: Annotated[AnyPath, output_to("Folder of the bundle.")]


class Export(_Exported, frozen=True, kw_only=True):
    """Export a model as a bundle."""

    pretrained: Annotated[AnyPath, _bundle(
        "Weights, if MODEL is an architecture of open_clip.", metavar="TAG|FILE", default="none",
    )] | None = None  # fmt: skip
    modules: Modules = ()
    target: Annotated[str | Sequence[str], _bundle(
        "Device to export for, which sets format and precision: one of `clip-rd-edge targets`, such as cpu-x86 or "
        "jetson-orin, or an RTX card's compute capability, such as sm86; several, as in sm86,sm89,jetson-orin, make "
        "one bundle per target. browser writes a static web page that runs the bundle in the browser; MODEL may then "
        "be a bundle.", metavar="NAME", complete="targets",
        default="none; {format} trt is then for this machine's GPU, or builds its engines on the device",
    )] | None = None  # fmt: skip
    format: Annotated[str, _bundle(
        "onnx. openvino: ONNX files for OpenVINO. trt: TensorRT engines beside their ONNX files; needs no GPU. litert: "
        "LiteRT (TensorFlow Lite) files for phones. executorch: ExecuTorch files for phones. coreml: Core ML packages "
        "for Apple devices; converted anywhere, run on a Mac. Or a format of an installed package.", metavar="NAME",
        complete="onnx|openvino|trt|litert|executorch|coreml", default="the target's, else onnx",
    )] | None = None  # fmt: skip
    precision: Annotated[ExportPrecision, _bundle(
        "Precision of the towers: fp32, fp16, bf16 or int8.", metavar="NAME", default="the target's, else fp32",
    )] | None = None  # fmt: skip
    labels: Annotated[Labels, _bundle(
        'Labels such as "a cat" "a dog", everyday, or a label file (see classify), whose embeddings are stored in the '
        "bundle.", metavar="LABEL...|FILE", many=True, complete="labels",
        default="the model's own, if it was stitched",
    )] = None  # fmt: skip
    text_tower: Annotated[bool, _bundle(
        "--no-text-tower leaves the text tower out, often the larger part of a bundle: it then embeds images, and "
        "classifies only among the labels of {labels}.",
    )] = True  # fmt: skip
    preprocess_in_graph: Annotated[bool, _bundle(
        "Preprocess in image.onnx: it takes uint8 RGB images of any size, one at a time.",
    )] = False  # fmt: skip
    layout: Annotated[ExportLayout, _bundle(
        "bundle, huggingface or immich. huggingface writes a folder that open_clip, transformers.js and fastembed "
        "load, with float32, FP16 and, with {precision} int8, INT8 files and a model card. immich writes a model "
        "folder for immich.", metavar="NAME",
    )] = "bundle"  # fmt: skip
    as_name: Annotated[str, _bundle(
        "For {layout} immich: the name of the model in immich that the student replaces; its "
        "embeddings must have the same size.", flags=("--as",), metavar="NAME",
        default="ViT-B-32__openai for embeddings of 512 numbers",
    )] | None = None  # fmt: skip
    report: Annotated[AnyPath, _bundle(
        "Report of `clip-rd-edge benchmark` whose figures go into the model card of {layout} huggingface.",
        metavar="DIR", path=True, default="none",
    )] | None = None  # fmt: skip
    via: Annotated[Via, _bundle(
        "Build TensorRT engines from ONNX (onnx), or from PyTorch on the target GPU (torch-tensorrt).", metavar="NAME",
    )] = "onnx"  # fmt: skip
    node_modules: Annotated[AnyPath, _bundle(
        "Folder where npm installed the packages for {target} browser.", metavar="DIR", path=True,
        default="download them once",
    )] | None = None  # fmt: skip
    calibration: Annotated[AnyPath, _bundle(
        'Pairs for calibrating and evaluating INT8, or a folder of images. Pairs that the model was not trained on '
        'calibrate probabilities and "none of these", too.', metavar="CSV|FOLDER|emoji",
        default="for INT8, those that MODEL's run kept",
    )] | None = None  # fmt: skip
    texts: Annotated[AnyPath, _int8(
        "With a folder of images as {calibration}: what the text tower is calibrated on, one text per line.",
        metavar="FILE", path=True, default="the labels, or everyday things",
    )] | None = None  # fmt: skip
    min_agreement: Annotated[float, _int8(
        "Min centred cosine between INT8 and float32 embeddings.", metavar="COSINE", ge=0, le=1,
        default="0.99; text tower: 0.995",
    )] | None = None  # fmt: skip
    max_loss: Annotated[float, _int8(
        "Max loss of zero-shot accuracy by INT8 on held-out pairs, in percentage points.", metavar="POINTS", ge=0,
        le=100, default="0.5",
    )] | None = None  # fmt: skip
    fallback: Annotated[Fallback, _int8(
        "Precision of a tower that INT8 does not improve: fp32 or fp16; none refuses the export.", metavar="NAME",
        default="fp32, but if INT8 improves neither tower, the export is refused",
    )] | None = None  # fmt: skip
    search_minutes: Annotated[float, _int8(
        "About how long to try INT8 candidates, the most promising first; the best of those tried by then is taken.",
        metavar="MINUTES", gt=0, default="until all are tried",
    )] | None = None  # fmt: skip
    threads: Annotated[int, _output("Threads for measuring latency.", metavar="N", ge=1)] = 1
    force: Annotated[bool, _output(
        "Replace an earlier export in FOLDER; a folder with anything else is refused.",
    )] = False  # fmt: skip


class _Verified(_OnDevice, frozen=True):
    bundle: Annotated[AnyPath, argument("The bundle, or everyday.", path=True)]


class Verify(_Verified, frozen=True, kw_only=True):
    """Check a bundle."""

    time_limit: Annotated[float, _device(
        "Seconds after which a tower that still runs is stopped, and fails.", metavar="SECONDS",
        default="300, and 1 for each MB of the bundle", gt=0,
    )] | None = None  # fmt: skip


class Classify(_Forced, frozen=True, kw_only=True):
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
    none: Annotated[bool, _labels(
        'Answer "none of these" for an image that no label fits. At most 5 % of images of known things are refused, if '
        "the bundle was calibrated at its export on images and labels like yours.",
    )] = False  # fmt: skip
    refuse_known: Annotated[float, _labels(
        "Like --none, but refuse at most this share of the images of known things, instead of 0.05. It holds for "
        "labels like those of the calibration; of images of others, several times as many can be refused.",
        metavar="RATE", ge=0, le=1, default="none is refused",
    )] | None = None  # fmt: skip
    multi: Annotated[bool, _labels(
        "Give each label its own probability, since several may fit an image; with --none, print those that fit.",
    )] = False  # fmt: skip
    raw: Annotated[bool, _labels("Ignore the bundle's calibration: print the model's own probabilities.")] = False
    cache: Annotated[bool, _labels(
        "Cache the labels' embeddings, so that the next run with these labels need not load the text tower.",
    )] = True  # fmt: skip
    camera: Annotated[str, _images(
        "Classify the newest frames of a camera (0 is the first) or a stream (rtsp://…) until Ctrl-C, or all frames of "
        "a video file.", metavar="NUMBER|PATH|URL", default="none",
    )] | None = None  # fmt: skip
    quick: Annotated[bool, _images("Decode large JPEGs at a fraction of their size; results change slightly.")] = False


class _Taught(_OnDevice, frozen=True):
    bundle: Annotated[AnyPath, argument("The bundle, or everyday.", path=True)]
    folder: Annotated[AnyPath | Any, argument(
        "A subfolder of images for each label, whose name is the label; a folder of images of one label; or a "
        "taught.npz that the demo's page saved. In Python also images by label.", path=True,
    )] | None = None  # fmt: skip


class Teach(_Taught, frozen=True, kw_only=True):
    """Teach a bundle labels from a few images of each."""

    output: Annotated[AnyPath, output_to("Folder of the new bundle.")]
    forget: Annotated[str | Sequence[str], _labels(
        "Forget a taught label with its images; can be repeated.", metavar="LABEL", default="none",
    )] = ()  # fmt: skip
    alone: Annotated[bool, _labels(
        "Leave out the bundle's other labels, which have only texts; any can still be typed beside the taught ones.",
    )] = False  # fmt: skip
    force: Annotated[bool, _output(
        "Replace an earlier export in FOLDER, and teach even if this processor computes the bundle's INT8 wrongly.",
    )] = False  # fmt: skip
    reporter: Reporter = SILENT


class _Indexed(_Forced, frozen=True):
    bundle: Annotated[AnyPath, argument("The bundle that embeds the images.", path=True)]
    folder: Annotated[AnyPath, argument("The images, in subfolders, too.", path=True)]
    output: Annotated[AnyPath, output_to("Folder for the index.", metavar="INDEX")]


class Index(_Indexed, frozen=True, kw_only=True):
    """Build or update a search index of images."""

    ray: Annotated[str, _cluster(
        "Spread the work over a Ray cluster, whose machines need the same bundle and images: auto for the one of this "
        "machine, or HOST:PORT.", metavar="ADDRESS", default="this machine",
    )] | None = None  # fmt: skip
    reporter: Reporter = SILENT


class WatchIndex(_Indexed, frozen=True, kw_only=True):
    """Keep a search index up to date."""

    stop: threading.Event | None = None
    reporter: Reporter = SILENT


class _Searched(_Forced, frozen=True):
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
    fitting: Annotated[bool, _query(
        "Print only images that fit the text better than the best ones fit random texts.",
    )] = False  # fmt: skip
    exact: Annotated[bool, _query("Compare all images, even if the index has a graph for approximate search.")] = False


class _Served(_Forced, frozen=True):
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
    folder: Annotated[AnyPath, _server(
        "Current path of INDEX's image folder, of which /search shows thumbnails.", metavar="FOLDER",
        default="the one that you named to index", path=True,
    )] | None = None  # fmt: skip
    max_batch: Annotated[int, _limits("Max images or texts per call of the model.", metavar="N", ge=1)] = 16
    max_items: Annotated[int, _limits(
        "Max images and texts that wait for their answer; further requests get 503.", metavar="N", ge=1,
    )] = 1024  # fmt: skip


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
