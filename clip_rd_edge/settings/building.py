"""From a user's images to a bundle on a device: the options of `build`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from clip_rd_edge.settings.deploying import Labels
from clip_rd_edge.settings.measuring import CaptionColumn, ImageColumn
from clip_rd_edge.settings.options import Settings, argument, option
from clip_rd_edge.settings.training import Workers
from clip_rd_edge.utils.paths import AnyPath
from clip_rd_edge.utils.reporting import SILENT, Reporter

_data = partial(option, group="Data")
_device = partial(option, group="Device")
_training = partial(option, group="Training")
_output = partial(option, group="Output")


class _Built(Settings, frozen=True):
    data: Annotated[AnyPath, argument(
        "A folder with a sub-folder of images for each class; a CSV, TSV or Parquet file of images and captions "
        "(columns filepath,title); or a folder of images, with {labels}.", path=True,
    )]  # fmt: skip
    output: Annotated[AnyPath, _output("Folder for all results.", flags=("-o", "--output"), metavar="OUT", path=True)]


class Build(_Built, frozen=True, kw_only=True):
    """Build a bundle for a device from a user's own images."""

    target: Annotated[str, _device(
        "The device: one of `clip-rd-edge targets`, such as cpu-arm or jetson-orin.", metavar="NAME",
        complete="targets",
    )]  # fmt: skip
    max_latency: Annotated[float, _device(
        "Take the best student whose image tower answers within so many milliseconds, on one thread.", metavar="MS",
        default="no limit", gt=0,
    )] | None = None  # fmt: skip
    max_size: Annotated[float, _device(
        "Take the best student whose image tower has at most so many megabytes.", metavar="MB", default="no limit",
        gt=0,
    )] | None = None  # fmt: skip
    measured: Annotated[AnyPath, _device(
        "Results of `clip-rd-edge benchmark` from the device, whose rows are named by students, for {max_latency} of a "
        "device that is not this one.", metavar="FILE", default="measured here", path=True,
    )] | None = None  # fmt: skip
    labels: Annotated[Labels, _data(
        'Labels such as "a cat" "a dog", or a label file (see classify), for images without captions.',
        metavar="LABEL...|FILE", many=True, complete="labels", default="the names of the classes",
    )] = None  # fmt: skip
    hold_out: Annotated[float, _data(
        "Share of the images that is held back from training, to choose and to test the student.", metavar="SHARE",
        gt=0, le=0.5,
    )] = 0.2  # fmt: skip
    tasks: Annotated[AnyPath | Sequence[AnyPath], _data(
        "Also compare the models on this task (see clip-rd-edge evaluate); can be repeated.", flags=("--task",),
        metavar="NAME", default="none", complete="task",
    )] = ()  # fmt: skip
    csv_img_key: ImageColumn = "filepath"
    csv_caption_key: CaptionColumn = "title"
    teacher: Annotated[AnyPath, _training(
        "The teacher, as for distill: NAME@TAG, local-dir:PATH, hf-hub:ORG/REPO or a run's folder.", metavar="MODEL",
        default="the built-in one, made once",
    )] | None = None  # fmt: skip
    student: Annotated[str, _training(
        "The student, as for distill.", metavar="NAME", complete="student",
        default="the best that the device and the limits allow",
    )] | None = None  # fmt: skip
    image_size: Annotated[int, _training(
        "Edge of the input images in pixels.", metavar="PIXELS", default="that of the images, at most 224", ge=16,
        le=1_024,
    )] | None = None  # fmt: skip
    hours: Annotated[float, _training("Train for at most so many hours.", metavar="HOURS", gt=0)] = 8.0
    steps: Annotated[int, _training(
        "Number of training steps, instead of {hours}.", metavar="N", default="as many as {hours} allow, or suffice",
        ge=1,
    )] | None = None  # fmt: skip
    seed: Annotated[int, _training("Random seed of the student.", metavar="N", ge=0, lt=2**32)] = 0
    workers: Workers = -1
    reporter: Reporter = SILENT
