"""What a run reports: metrics.jsonl, plots, and predictions to look at."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from clip_rd_edge.bundle.encoder import label_embeddings
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.bundle.preprocess import Pixels, preprocess
from clip_rd_edge.bundle.runs import EVALUATION_PREFIX, METRICS_FILE, TERM_PREFIX, read_metrics
from clip_rd_edge.data.samples import BadSamples, Samples
from clip_rd_edge.losses.terms import EmbeddingBatch
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.host import peak_memory_bytes

if TYPE_CHECKING:
    from clip_rd_edge.data.tasks import Task


class MetricsLog:
    """Appends to metrics.jsonl. On resume, lines after the checkpoint are dropped first.

    Args:
        start: number of completed steps.
    """

    def __init__(self, run: Path, *, start: int) -> None:
        self._path = run / METRICS_FILE
        kept = [line for line in read_metrics(run) if line["step"] <= start]
        write_bytes(self._path, b"".join(msgspec.json.encode(line) + b"\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and flush it to disk."""
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(line) + b"\n")


def last_evaluation(run: Path, *, step: int) -> dict[str, float]:
    """Return a run's scores at a step, its last one so far, by task; empty if the step was not evaluated."""
    lines = [line for line in read_metrics(run) if line["step"] == step]
    scores = [item for line in lines for item in line.items() if item[0].startswith(EVALUATION_PREFIX)]
    return {name.removeprefix(EVALUATION_PREFIX): value for name, value in scores}


def peak_memory_on(device: torch.device) -> int:
    """Return this process's peak memory in bytes: GPU memory on a GPU, else host memory; 0 if unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes() or 0


@torch.no_grad()
def embedding_geometry(batch: EmbeddingBatch) -> dict[str, float]:
    """Return the mean cosine of positive pairs, of negative pairs, and their gap, for student and teacher.

    Only the pairs count of a batch that has other rows; fewer than two of them have no such values.
    """
    if batch.paired is not None:
        batch = batch.only_pairs()
        if len(batch.student_image) < 2:
            return {}
    models = {"student": (batch.student_image, batch.student_text)}
    if batch.teacher_image is not None and batch.teacher_text is not None:
        models["teacher"] = (batch.teacher_image, batch.teacher_text)
    result = dict[str, float]()
    for name, (image, text) in models.items():
        positive, negative = mean_similarities(image, text)
        result |= {f"{name}_positive": positive, f"{name}_negative": negative, f"{name}_gap": positive - negative}
    return result


def mean_similarities(image: Tensor, text: Tensor) -> tuple[float, float]:
    """Return the mean cosines of the B positive and the B·(B − 1) negative pairs of a batch; NaN without negatives.

    Args:
        image, text: (B, D), L2-normalised.
    """
    pairs = len(image)
    positive = (image.float() * text.float()).sum().item()
    # Σ_ij v_i·t_j = (Σ_i v_i)·(Σ_j t_j): memory grows with B·D rather than with B².
    total = (image.float().sum(dim=0) @ text.float().sum(dim=0)).item()
    return positive / pairs, (total - positive) / (pairs * (pairs - 1)) if pairs > 1 else math.nan


STUDENT_COLOUR, TEACHER_COLOUR = "#c2410c", "#1d4ed8"


def plot_run(run: Path, folder: Path) -> None:
    """Plot `losses.png`, `geometry.png` and `evaluation.png` into `folder`, as far as there is data."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = read_metrics(run)
    _plot_losses(lines, folder / "losses.png")
    _plot_geometry(lines, folder / "geometry.png")
    _plot_evaluations(lines, folder / "evaluation.png")


def _plot_losses(lines: list[dict[str, Any]], path: Path) -> None:
    names = sorted({key for line in lines for key in line if key.startswith(TERM_PREFIX)})
    if not names:
        return
    series = {name: _series(lines, name) for name in names}
    scale = "log" if all(values.size and values.min() > 0 for _, values in series.values()) else "linear"
    with _figure(path, len(names), "Unweighted loss terms over training steps") as axes:
        for axis, (name, (steps, values)) in zip(axes, series.items(), strict=True):
            axis.plot(steps, values, color=STUDENT_COLOUR, linewidth=1.4)
            axis.set_title(name.removeprefix(TERM_PREFIX), fontsize=10)
            axis.set_yscale(scale)  # of one kind, so that the curves can be compared


def _plot_geometry(lines: list[dict[str, Any]], path: Path) -> None:
    titles = {
        "positive": "Matching pairs: mean cosine",
        "negative": "Other pairs: mean cosine",
        "gap": "Gap between the two",
    }
    if not any("student_gap" in line for line in lines):
        return
    with _figure(path, 3, "Separation of matching from other pairs in the training batches") as axes:
        for axis, (kind, title) in zip(axes, titles.items(), strict=True):
            for model, colour in (("student", STUDENT_COLOUR), ("teacher", TEACHER_COLOUR)):
                steps, values = _series(lines, f"{model}_{kind}")
                if steps.size:
                    axis.plot(steps, values, color=colour, linewidth=1.4, label=model)
            axis.set_title(title, fontsize=10)
        axes[0].legend(frameon=False, fontsize=9)


def _plot_evaluations(lines: list[dict[str, Any]], path: Path) -> None:
    names = sorted({key for line in lines for key in line if key.startswith(EVALUATION_PREFIX)})
    if not names:
        return
    with _figure(path, 1, "Accuracy over training") as (axis,):
        for name in names:
            steps, values = _series(lines, name)
            axis.plot(
                steps, 100 * values, marker="o", markersize=3, label=verbatim(name.removeprefix(EVALUATION_PREFIX))
            )
        axis.set_ylabel("%")
        axis.legend(frameon=False, fontsize=9)


def _short(text: str) -> str:
    return verbatim(textwrap.shorten(text, 40, placeholder=" …"))


def verbatim(name: str) -> str:
    """Return a name as matplotlib takes it to draw just that: a text with two dollar signs would be a formula."""
    return name.replace("$", r"\$")


def _series(lines: list[dict[str, Any]], key: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


@contextmanager
def _figure(path: Path, count: int, title: str, *, xlabel: str = "step") -> Iterator[list[Any]]:
    """Yield the axes of `count` plots, which are written to `path` as one PNG after the block."""
    from matplotlib.figure import Figure  # the object interface needs no display and no global state

    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.6 * rows + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.set_xlabel(xlabel, fontsize=8)
    yield axes[:count]
    png = io.BytesIO()
    with warnings.catch_warnings():  # of characters that the font lacks
        warnings.simplefilter("ignore")
        figure.savefig(png, format="png", dpi=120)
    write_bytes(path, png.getvalue())


SAMPLES = 12
MAX_LABELS = 64  # of a task with more; a thousand would take the time of many steps


def plot_predictions(task: Task | None, pairs: Samples, encoder: TorchEncoder, path: Path) -> None:
    """Plot a student's predictions about images of a task or, without one, of the pairs that it is trained on.

    An image of a class is compared with the task's labels; one with a caption, with the captions of the others. Beside
    what was found in it, there is what is right where that is wrong.
    """
    from clip_rd_edge.data.tasks import ZeroShotTask

    thumbnails, pixels, own = list[Image.Image](), list[Pixels](), list[str]()
    for image, text in _open_some(task, pairs):
        pixels.append(preprocess(image, encoder.clip.preprocessing))
        thumbnails.append(image.copy())
        thumbnails[-1].thumbnail((128, 128))
        own.append(text)
    labels, template = list[str](), "{}"
    if isinstance(task, ZeroShotTask):
        order = np.random.default_rng(0).permutation(len(task.labels))
        labels, template = [task.labels[index] for index in order[:MAX_LABELS]], task.templates[0]
    texts = list(dict.fromkeys([*own, *labels]))
    embeddings = label_embeddings(encoder, texts, [template])
    rows = encoder.clip.scoring.probabilities(encoder.encode_pixels(np.stack(pixels)), embeddings)
    with _figure(path, len(own), "Predictions", xlabel="") as axes:
        for axis, thumbnail, right, row in zip(axes, thumbnails, own, rows, strict=True):
            axis.imshow(thumbnail)
            axis.set_axis_off()
            found = texts[row.argmax()]
            lines = [f"{_short(found)} {row.max():.0%}", *([] if found == right else [f"({_short(right)})"])]
            axis.set_title("\n".join(lines), fontsize=8, color="black" if found == right else STUDENT_COLOUR)


def _open_some(task: Task | None, pairs: Samples) -> Iterator[tuple[Image.Image, str]]:
    """Open some images, chosen at random, each with its class or its first caption."""
    from clip_rd_edge.data.tasks import RetrievalTask

    permutation = np.random.default_rng(0).permutation
    if task is None:
        bad = BadSamples(pairs, max_share=1)
        for image, own in map(bad.take, permutation(pairs.counts.pairs)[:SAMPLES].tolist()):
            yield image, own[0]
    elif isinstance(task, RetrievalTask):
        captions = task.first_captions()
        for index in permutation(sorted(captions))[:SAMPLES].tolist():
            yield open_image(task.images[index]), task.captions[captions[index]]
    else:
        for index in permutation(len(task.images))[:SAMPLES].tolist():
            yield open_image(task.images[index]), task.labels[task.targets[index]]
