"""Options of the commands that measure: a model on tasks, a suite's models, training methods, the whole pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from clip_rd_edge.settings.deploying import Labels, Modules, Threads
from clip_rd_edge.settings.options import Reported, argument, option, output_to
from clip_rd_edge.settings.training import CaptionColumn, ImageColumn, Tasks, Templates, Workers
from clip_rd_edge.utils.paths import AnyPath

_tasks = partial(option, group="Tasks")
_model = partial(option, group="Model")
_output = partial(option, group="Output")
_suite = partial(option, group="Suite")
_recommendation = partial(option, group="Recommendation")
_training = partial(option, group="Training")
_report = partial(option, group="Report")
_teacher = partial(option, group="Teacher")
_data = partial(option, group="Data")
_device = partial(option, group="Device")


class _Evaluated(Reported, frozen=True):
    model: Annotated[AnyPath | Any, argument("A loaded model, or anything that `load` takes.")]
    tasks: Annotated[Tasks, _tasks(
        "A folder of images with one subfolder per class, a data set that CLIP_benchmark exported, a CSV file or "
        "shards of images and captions, or a task of the built-in data set, such as emoji:unseen-style or "
        "emoji:unseen-style:retrieval. Can be repeated.", flags=("--task",), metavar="NAME", complete="task",
    )]  # fmt: skip


class Evaluate(_Evaluated, frozen=True, kw_only=True):
    """Measure zero-shot accuracy and retrieval of a model."""

    pretrained: Annotated[AnyPath, _model(
        "Weights, for an architecture of open_clip.", metavar="TAG", default="none",
    )] | None = None  # fmt: skip
    modules: Modules = ()
    templates: Annotated[Templates, _tasks(
        'Prompt template with {} for the label, such as "a photo of a {}", a file with one per line, or imagenet for '
        "CLIP's 80; can be repeated.", flags=("--template",), metavar="PROMPT|FILE",
        default="the data set's, else imagenet", complete="imagenet",
    )] = None  # fmt: skip
    csv_img_key: ImageColumn = "filepath"
    csv_caption_key: CaptionColumn = "title"
    threads: Threads | None = None
    shots: Annotated[int, _tasks(
        "Also measure the accuracy after `teach` with 1, 2, 4, … at most N images of each label, on the others.",
        metavar="N", default="none", ge=0, le=256,
    )] = 0  # fmt: skip
    per_class: Annotated[bool, _output(
        "The recall and precision of each class, lowest recall first, and the label that it was most often mistaken "
        "for.",
    )] = False  # fmt: skip


class _Compared(Reported, frozen=True):
    suite: Annotated[AnyPath, argument("A YAML file, or the name of a suite that ships with the package.")]
    output: Annotated[AnyPath, output_to("Folder for the report.")]


class Benchmark(_Compared, frozen=True, kw_only=True):
    """Compare the models of a suite by accuracy, latency and size."""

    root: Annotated[AnyPath, _suite("Folder with the data sets.", metavar="DIR", default="the suite's")] | None = None
    models: Annotated[str | Sequence[str], _suite(
        "Use this model instead of the suite's, such as student=runs/first; ROLE is teacher, baseline, student, "
        "exported or quantised. Can be repeated.", flags=("--model",), metavar="ROLE=MODEL", default="the suite's",
    )] = ()  # fmt: skip
    budget_ms: Annotated[float, _recommendation(
        "Recommend only models with at most this latency from file to result (95th percentile), in ms.", metavar="MS",
        default="no limit", gt=0,
    )] | None = None  # fmt: skip
    min_accuracy: Annotated[float, _recommendation(
        "Recommend only models with at least this top-1 accuracy, such as 0.25.", metavar="FRACTION", default="none",
        ge=0, le=1,
    )] | None = None  # fmt: skip
    force: Annotated[bool, _output(
        "Write into FOLDER even if it is not empty; only an earlier report is replaced.",
    )] = False  # fmt: skip


class _Walked(Reported, frozen=True):
    output: Annotated[AnyPath, output_to("Folder for all results.")] = "quickstart"


class Quickstart(_Walked, frozen=True, kw_only=True):
    """Run the whole pipeline on the built-in data."""

    student: Annotated[str, _training(
        "The student: resnet10t, mobilevit_xxs, … or any timm name.", metavar="NAME", complete="student",
    )] = "resnet10t"  # fmt: skip
    recipe: Annotated[str, _training(
        "Training recipe: clip-kd-bank, clip-rd, clip-kd, tinyclip, …", metavar="NAME|FILE", complete="recipe",
    )] = "clip-kd-bank"  # fmt: skip
    seed: Annotated[int, _training("Random seed of the student.", metavar="N")] = 0
    with_baseline: Annotated[bool, _training("Also train the same student without a teacher, for comparison.")] = False
    student_steps: Annotated[int, _training(
        "Steps of the student, of 32 pairs each.", metavar="N", ge=1, default="1100; of a MobileViT, 2.2 times as many",
    )] | None = None  # fmt: skip
    teacher_steps: Annotated[int, _training("Steps of the teacher, of 64 pairs each.", metavar="N", ge=1)] = 400
    photos: Annotated[AnyPath, _report(
        "Also compare the models on photographs, which benchmarks/data/tuxpaint.py makes.", metavar="FOLDER",
        default="none", path=True,
    )] | None = None  # fmt: skip


class EvidenceRun(Reported, frozen=True):
    """Train a suite's students with each method and seed, and measure them."""

    suite: Annotated[AnyPath, argument("A YAML file, or the name of a suite that ships with the package.")]
    output: Annotated[AnyPath, output_to("Folder for the runs and results; finished runs are reused.")]
    teacher: Annotated[AnyPath, _teacher(
        "local-dir:PATH, hf-hub:ORG/REPO or a run.", metavar="MODEL", default="the built-in one, fine-tuned first",
    )] | None = None  # fmt: skip
    terms: Annotated[AnyPath | Sequence[AnyPath], option(
        "Python file or module with loss terms of your own, as for distill; can be repeated.",
        group="Training", metavar="FILE|MODULE", default="those of installed packages",
    )] = ()  # fmt: skip


class _Built(Reported, frozen=True):
    data: Annotated[AnyPath, argument(
        "A folder with a sub-folder of images for each class; a CSV, TSV or Parquet file of images and captions "
        "(columns filepath,title); or a folder of images, with {labels}.", path=True,
    )]  # fmt: skip
    output: Annotated[AnyPath, output_to("Folder for all results.", metavar="OUT")]


class Build(_Built, frozen=True, kw_only=True):
    """Build a bundle for a device from a user's own images."""

    target: Annotated[str, _device(
        "The device: one of `clip-rd-edge targets`, such as cpu-arm or jetson-orin.", metavar="NAME",
        complete="targets",
    )]  # fmt: skip
    max_latency: Annotated[float, _device(
        "The best student whose image tower takes at most this many milliseconds, on one thread.", metavar="MS",
        default="no limit", gt=0,
    )] | None = None  # fmt: skip
    max_size: Annotated[float, _device(
        "The best student whose image tower has at most this many megabytes.", metavar="MB", default="no limit",
        gt=0,
    )] | None = None  # fmt: skip
    measured: Annotated[AnyPath, _device(
        "Results of `clip-rd-edge benchmark` run on the device, with rows named after students: the latencies for "
        "{max_latency} if the device is another machine.", metavar="FILE", default="measured here", path=True,
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
    hours: Annotated[float, _training("Train for at most this many hours.", metavar="HOURS", gt=0)] = 8.0
    steps: Annotated[int, _training(
        "Number of training steps, instead of {hours}.", metavar="N", default="as many as {hours} allow, or suffice",
        ge=1,
    )] | None = None  # fmt: skip
    seed: Annotated[int, _training("Random seed of the student.", metavar="N", ge=0, lt=2**32)] = 0
    workers: Workers = -1
