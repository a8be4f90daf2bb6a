"""The interface shared by all models, whichever runtime they use, and zero-shot classification with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.bundle.images import is_table
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.scoring import Calibration, Scoring, require_finite
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.text import is_unicode

Embeddings = npt.NDArray[np.float32]


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """Description of an encoder.

    Attributes:
        runtime: `torch`, `onnxruntime`, …
        precision: of the image tower and the text tower, such as `fp32` or `int8 + fp32`.
        logit_scale, logit_bias: see `scoring`.
        parameters: number of parameters, 0 if unknown.
        size_bytes: size on disk of everything needed to run it.
        device: where it runs, such as `cpu`, or `cuda + cpu` if its towers differ.
        calibration: of a bundle that was exported with pairs.
    """

    name: str
    runtime: str
    precision: str
    embedding_size: int
    preprocessing: Preprocessing
    logit_scale: float
    templates: tuple[str, ...] = ("{}",)
    parameters: int = 0
    size_bytes: int = 0
    device: str = "cpu"
    logit_bias: float | None = None
    calibration: Calibration | None = None

    @property
    def scoring(self) -> Scoring:
        """How cosine similarities become probabilities."""
        return Scoring(self.logit_scale, self.logit_bias)


@runtime_checkable
class Encoder(Protocol):
    """Maps images and texts to embeddings: float32, L2-normalised rows, shape (N, D).

    An encoder raises NotFiniteError rather than return entries that are not finite numbers.
    """

    def describe(self) -> Description:
        """Describe this encoder."""
        ...

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Embed RGB images of any size, shape (N, D)."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts as given, without templates, shape (N, D)."""
        ...


@runtime_checkable
class SharedEncoder(Encoder, Protocol):
    """An encoder that several processes run together: all call the same methods in the same order, and get all rows."""

    def share(self, batches: Sequence[slice], embed: Callable[[slice], Embeddings]) -> Embeddings:
        """Return the rows of all batches, each of which one of the processes computes with `embed`."""
        ...


@runtime_checkable
class LabelsEncoder(Encoder, Protocol):
    """An encoder that may have no text tower, and then knows the labels that it has stored."""

    @property
    def has_text_tower(self) -> bool:
        """Whether it embeds texts."""
        ...

    def stored_label_embeddings(self, labels: Sequence[str], templates: Sequence[str]) -> Embeddings:
        """Return the stored embeddings of labels, (C, D)."""
        ...


def embeds_texts(encoder: Encoder) -> bool:
    """Return whether an encoder has a text tower."""
    return not isinstance(encoder, LabelsEncoder) or encoder.has_text_tower


def embed_batches(encoder: Encoder, batches: Sequence[slice], embed: Callable[[slice], Embeddings]) -> Embeddings:
    """Return the rows of all batches, computed by this process or, for a `SharedEncoder`, by several."""
    if isinstance(encoder, SharedEncoder):
        return encoder.share(batches, embed)
    return np.concatenate([embed(batch) for batch in batches])


def in_batches(count: int, batch_size: int) -> list[slice]:
    """Return slices that split `count` items into batches; the last may be smaller."""
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


_MAX_BATCH_BYTES = 1 << 27  # of preprocessed images: 32 of them up to 590 × 590 pixels


def image_batch_size(batch_size: int, preprocessing: Preprocessing) -> int:
    """Return `batch_size`, or fewer images if a batch of the model's large input would take too much memory."""
    height, width = preprocessing.size
    return max(1, min(batch_size, _MAX_BATCH_BYTES // (12 * height * width)))


def require_top(top: int) -> None:
    """Raise UsageError if `top`, a number of answers, is not a whole number of at least 1."""
    if not isinstance(top, int | np.integer) or top < 1:
        raise UsageError(f"top is {top}; expected an integer at least 1.")


def top_indices(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Return the indices of the `count` largest of values, (N,), largest first; ties keep their order."""
    if count < len(values):
        # Sorting a thousand labels takes longer than a small tower takes to embed the image; partitioning does not.
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    top: npt.NDArray[np.intp] = candidates[np.argsort(-values[candidates], kind="stable")[:count]]
    return top


@runtime_checkable
class TowerEncoder(Encoder, Protocol):
    """An encoder whose towers can be run separately from preprocessing and tokenisation."""

    def encode_pixels(self, pixels: npt.NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed images, (N, 3, H, W) to (N, D)."""
        ...

    def tokenize(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Convert texts to token ids, (N, T)."""
        ...

    def encode_ids(self, ids: npt.NDArray[np.int64]) -> Embeddings:
        """Embed tokenised texts, (N, T) to (N, D)."""
        ...


def as_list(texts: str | Iterable[str]) -> list[str]:
    """Return a list of texts, which has one entry for a single text: a str is a sequence of characters otherwise."""
    given: Any = texts
    try:
        entries = [given] if isinstance(given, str | bytes) or is_table(given) else list(given)
    except TypeError:
        entries = [given]
    for text in entries:
        if not isinstance(text, str):
            raise InputError(
                f"A text has type {type(text).__name__}; expected a string or a list of strings.",
                hint="pass one of its columns, such as list(table['label'])" if is_table(text) else "",
            )
    return [str(text) for text in entries]  # those of a numpy array are of a type that msgspec does not encode


_MAX_COSINE = 1.01  # rounding to float16 included


def require_cosines(cosines: Embeddings, source: str) -> Embeddings:
    """Return cosine similarities; raise as `require_finite`, or a ConfigError if one is not of unit vectors."""
    if (largest := float(np.abs(require_finite(cosines, source)).max(initial=0.0))) > _MAX_COSINE:
        raise ConfigError(
            f"{source} has embeddings that are not unit vectors: a cosine similarity is {largest:.2f}.",
            hint="the index or the model is damaged: check the bundle with clip-rd-edge verify, and index again",
        )
    return cosines


def require_labels(labels: Sequence[str]) -> None:
    """Raise InputError if there are no labels, or one is empty or not Unicode."""
    if not labels:
        raise InputError("No labels were given.", hint='name some: {labels} "a cat" "a dog"')
    for number, label in enumerate(labels, start=1):
        if not label.strip() or label.endswith("\0") or not is_unicode(label):  # NumPy drops a NUL at the end
            raise InputError(f"Label {number} of {len(labels)}, {label!r}, is empty, not Unicode, or ends in NUL.")


_REPORTED_LABELS = 1024  # from one report of progress to the next; whole batches, whatever the number of templates


def label_embeddings(
    encoder: Encoder,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    by_text: bool = False,
    reporter: Reporter = SILENT,
) -> Embeddings:
    """Return one embedding per label, shape (C, D): the normalised mean of its embeddings over all templates.

    With labels that images have taught the encoder's bundle, (C, D + 1): see `LabelBank`.

    Args:
        labels: names, such as `cat`.
        templates: prompt templates with one `{}` for the name (or `{c}`, as in CLIP_benchmark), such as
            `a photo of a {}.`
        by_text: embed the texts of labels that images have taught, too.
        reporter: hears how many labels are embedded.
    """
    require_labels(labels)
    bank: Any = getattr(encoder, "label_bank", None)
    if not by_text and bank is not None and len(texts := bank.untaught(labels)) < len(labels):
        size = encoder.describe().embedding_size
        rows = label_embeddings(encoder, texts, templates) if texts else np.zeros((0, size), np.float32)
        completed: Embeddings = bank.completed(labels, rows)
        return completed
    if isinstance(encoder, LabelsEncoder) and not encoder.has_text_tower:
        return encoder.stored_label_embeddings(labels, templates)
    means = []
    for part in in_batches(len(labels), _REPORTED_LABELS):
        reporter.update("embedding labels", part.start, len(labels))
        prompts = [fill_template(template, label) for label in labels[part] for template in templates]
        embeddings = encoder.encode_texts(prompts).reshape(part.stop - part.start, len(templates), -1)
        means.append(embeddings.mean(axis=1))
    return normalise(np.concatenate(means))


def fill_template(template: str, label: str) -> str:
    """Return the prompt for a label."""
    placeholder = "{c}" if "{c}" in template else "{}"
    if placeholder not in template:
        raise InputError(f"The template {template!r} has no {{}} for the label's name.")
    return template.replace(placeholder, label)  # not str.format: a label may contain braces


def normalise(rows: npt.NDArray[np.floating]) -> Embeddings:
    """Divide rows by their L2 norm; returns float32."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    normalised: Embeddings = (rows / np.maximum(norms, 1e-12)).astype(np.float32)
    return normalised
