"""Average two models of one architecture, and measure the models between them (WiSE-FT, Wortsman et al. 2022)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.accuracy import evaluate
from clip_rd_edge.benchmarking.metrics import primary_metric
from clip_rd_edge.bundle.outputs import require_output
from clip_rd_edge.bundle.runs import model_folder, read_training_record
from clip_rd_edge.data.tasks import Task
from clip_rd_edge.distillation.metrics import plot_average
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import PROBE_TEXT, ClipModel, float32_on_cpu, model_fingerprint
from clip_rd_edge.models.edit import interpolate_clip
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.tokenizers import vocabulary_of
from clip_rd_edge.utils.files import require_utf8_path
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.reporting import SILENT, Reporter

BEST: Literal["best"] = "best"
PLOT = "average.png"
_CURVE = tuple(number / 10 for number in range(11))


class CurvePoint(msgspec.Struct, frozen=True):
    """The accuracy of the model with this share of the second model's weights.

    Attributes:
        scores: top-1, or R@1 from image to text, by task.
    """

    weight: float
    scores: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean over tasks."""
        return statistics.fmean(self.scores.values())


@dataclass(frozen=True)
class AveragedModel(os.PathLike[str]):
    """An average of two models. It is path-like: pass it wherever the folder of a model is expected.

    Attributes:
        folder: an open_clip folder.
        weight: share of the second model's weights.
        curve: accuracy by weight, in ascending order; empty without tasks.
    """

    folder: Path
    weight: float
    curve: tuple[CurvePoint, ...] = ()

    def __fspath__(self) -> str:
        return str(self.folder)


@float32_on_cpu()
def average_models(
    names: tuple[Typed, Typed],
    folder: Path,
    *,
    weight: float | Literal["best"],
    tasks: Sequence[Task] = (),
    force: bool = False,
    reporter: Reporter = SILENT,
) -> AveragedModel:
    """Write the model with the weights (1 − weight) · first + weight · second to `folder`.

    Args:
        names: the two models, as `load_clip` takes them.
        weight: a number from 0 to 1; or `best` for that of the highest mean accuracy on the tasks among the weights of
            the curve, of equal ones the nearest to 0.5.
        tasks: what the models are measured on, with every tenth and the weight itself.
        force: replace an earlier average in `folder`; a folder with anything else is refused.
    """
    if isinstance(weight, str) and weight != BEST:
        raise UsageError(f"The weight is {weight!r}; expected a number from 0 to 1, or best.")
    if weight == BEST and not tasks:
        raise UsageError(
            "The best weight was asked for, but there is no task to measure it on.",
            hint="name labelled images: {tasks} my-images/, or a number: {weight} 0.5",
        )
    require_utf8_path(folder)
    sources = [source for name in names if (source := model_folder(name))]
    require_output(folder, "average", overwrite=force, sources=sources)
    reporter.update("loading both models")
    first, second = (load_clip(name) for name in names)
    require_same_model(first, second)
    curve = []
    if tasks:
        weights = sorted({*_CURVE, *([] if weight == BEST else [float(weight)])})
        for number, share in enumerate(weights):
            reporter.update("evaluating weights", number, len(weights))
            encoder = TorchEncoder(interpolate_clip(first, second, share=share))
            curve.append(CurvePoint(share, {task.name: primary_metric(evaluate(encoder, task)) for task in tasks}))
    chosen = _best(curve) if weight == BEST else float(weight)
    before, after = map(read_training_record, names)
    record = {
        **((after or before) if chosen > 0 else before),  # with a weight of 0, it is the first
        "average": {
            "models": [first.name, second.name],
            "sha256": [model_fingerprint(first), model_fingerprint(second)],
            "weight": chosen,
            "chosen_by": BEST if weight == BEST else "user",
            "curve": msgspec.to_builtins(curve),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    save_clip(
        folder,
        interpolate_clip(first, second, share=chosen),
        provenance=record,
        extras=(lambda path: _plot(curve, chosen, path / PLOT)) if curve else None,
        overwrite=force,
    )
    return AveragedModel(folder, chosen, tuple(curve))


def require_same_model(first: ClipModel, second: ClipModel) -> None:
    """Check that two models differ in their weights alone."""
    weights = [{name: tensor.shape for name, tensor in clip.model.state_dict().items()} for clip in (first, second)]
    difference = None
    if weights[0] != weights[1] or repr(first.model) != repr(second.model):
        difference = "different architectures"
    elif first.preprocessing != second.preprocessing:
        difference = "different preprocessing of images"
    elif any(
        describe(first.tokenizer) != describe(second.tokenizer)
        for describe in (vocabulary_of, lambda tokenizer: tokenizer([PROBE_TEXT]).tolist())
    ):
        difference = "different tokenizers"
    elif not _compute_the_same(first, interpolate_clip(first, second, share=0)):
        difference = "different architectures"
    if difference:
        raise ConfigError(
            f"{first.name} and {second.name} have {difference}; expected models that differ in their weights alone.",
            hint="average a model with one that was trained from it, or two runs from the same start",
        )


def _compute_the_same(first: ClipModel, second: ClipModel) -> bool:
    """Return whether two models with the same weights give the same embeddings.

    Modules do not show all that decides this, such as the number of heads, the mask or the pooling of a text tower.
    """
    encoders = [TorchEncoder(clip) for clip in (first, second)]
    texts = [PROBE_TEXT, "a"]  # one that is cut off, and one that is padded
    image = np.random.default_rng(0).integers(0, 256, (*first.preprocessing.size, 3), dtype=np.uint8)
    own, other = (np.concatenate([e.encode_images([image]), e.encode_texts(texts)]) for e in encoders)
    return np.allclose(own, other, atol=1e-3)


def _best(curve: Sequence[CurvePoint]) -> float:
    return max(curve, key=lambda point: (point.mean, -abs(point.weight - 0.5))).weight


def _plot(curve: Sequence[CurvePoint], chosen: float, path: Path) -> None:
    scores = {name: [point.scores[name] for point in curve] for name in curve[0].scores}
    plot_average([point.weight for point in curve], scores, chosen, path)
