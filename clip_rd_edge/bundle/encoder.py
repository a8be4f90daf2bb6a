"""The interface shared by all models, whichever runtime they use, and how their cosines become probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from PIL import Image

from clip_rd_edge.bundle.images import is_table
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.errors import ConfigError, InputError, NotFiniteError
from clip_rd_edge.utils.structs import CheckedStruct, PositiveFloat
from clip_rd_edge.utils.text import SILENT, Reporter, is_unicode

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


def embeds_texts(encoder: Encoder) -> bool:
    """Return whether an encoder has a text tower, or else only the labels that its bundle stores."""
    return bool(getattr(encoder, "has_text_tower", True))


def in_batches(count: int, batch_size: int) -> list[slice]:
    """Return slices that split `count` items into batches; the last may be smaller."""
    return [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


_MAX_BATCH_BYTES = 1 << 27  # of preprocessed images: 32 of them up to 590 × 590 pixels


def image_batch_size(batch_size: int, preprocessing: Preprocessing) -> int:
    """Return `batch_size`, or fewer images if a batch of the model's large input would take too much memory."""
    height, width = preprocessing.size
    return max(1, min(batch_size, _MAX_BATCH_BYTES // (12 * height * width)))


def top_indices(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Return the indices of the `count` largest of values, (N,), largest first; ties keep their order; none below 1."""
    if 0 < count < len(values):
        # Sorting a thousand labels takes longer than a small tower takes to embed the image; partitioning does not.
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    top: npt.NDArray[np.intp] = candidates[np.argsort(-values[candidates], kind="stable")[: max(count, 0)]]
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
    """Return a list of texts, with one entry for a single text: otherwise, a str would be a sequence of characters."""
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
    """Return cosine similarities; raise as `require_finite`, or a ConfigError if the vectors are not of unit length."""
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
    """
    require_labels(labels)
    bank: Any = getattr(encoder, "label_bank", None)
    if not by_text and bank is not None and len(texts := bank.untaught(labels)) < len(labels):
        size = encoder.describe().embedding_size
        rows = label_embeddings(encoder, texts, templates) if texts else np.zeros((0, size), np.float32)
        completed: Embeddings = bank.completed(labels, rows)
        return completed
    if not embeds_texts(encoder):
        stored: Embeddings = encoder.stored_label_embeddings(labels, templates)  # type: ignore[attr-defined]
        return stored
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


Probabilities = npt.NDArray[np.float32]
Matches = npt.NDArray[np.float32]
REFUSE_KNOWN = 0.05  # share of images of known things that `none` may refuse
# Limits on what a manifest may say, far above those of any model that open_clip has.
LogitScale = Annotated[PositiveFloat, Meta(le=1e6)]
LogitBias = Annotated[float, Meta(ge=-1e6, le=1e6)]


class Scoring(CheckedStruct, frozen=True):
    """A softmax over the labels, as CLIP was trained, or a sigmoid for each label, as SigLIP was (Zhai et al. 2023).

    Attributes:
        scale: multiplies cosine similarities.
        bias: added to them afterwards, for the sigmoid. None: a softmax, in which a bias would change nothing.
    """

    scale: LogitScale
    bias: LogitBias | None = None

    @property
    def is_independent(self) -> bool:
        """Whether each label has a probability of its own, whatever the others are; they need not add up to 1."""
        return self.bias is not None

    def probabilities(self, images: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> Probabilities:
        """Return the probability of each label for each image, (N, C), from (N, D) and (C, D), or as in `paired`."""
        logits = require_finite(self.scale * (paired(images, labels) @ labels.T), "An image or a label")
        if self.bias is not None:
            sigmoid: Probabilities = np.exp(-np.logaddexp(0, -(logits + self.bias))).astype(np.float32)
            return sigmoid
        logits -= logits.max(axis=1, keepdims=True)
        exponents = np.exp(logits)
        softmax: Probabilities = (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)
        return softmax

    def matches(
        self, images: npt.NDArray[np.float32], labels: npt.NDArray[np.float32], background: npt.NDArray[np.float32]
    ) -> Matches:
        """Return how well each label fits each image, (N, C), whatever the other labels are.

        It is the logarithm of how much likelier the label is than a common noun, by the model's softmax: the score of
        NegLabel (Jiang et al. 2024) for a single label.

        Args:
            images, labels: embeddings, (N, D) and (C, D), or as in `paired`.
            background: embeddings of K common nouns, (K, D), few of which fit any image.
        """
        usual = require_finite(self.scale * (images @ background.T), "An image or the background")
        top = usual.max(axis=1, keepdims=True)
        mean = top + np.log(np.exp(usual - top).mean(axis=1, keepdims=True))
        logits = require_finite(self.scale * (paired(images, labels) @ labels.T), "An image or a label")
        above: Matches = (logits - mean).astype(np.float32)
        return above


_Figure = Annotated[float, Meta(ge=-1e6, le=1e6)]


class Calibration(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What pairs of images and captions show of a model's answers, beside its own `Scoring`.

    A *match* is how well one label fits one image, whatever the other labels are (`Scoring.matches`). An image is
    refused if its best match is below a limit, which depends on the labels: see `limit`.

    Attributes:
        temperature: divides the logits of the softmax (Guo et al. 2017); 1 leaves them as they are.
        slope, intercept: the probability that a label fits is sigmoid(slope · match + intercept) (Platt 1999).
        curve: the match of each pair's image with its own caption; the images' embeddings are in known.npz.
        source: the name of the pairs.
        error, error_before: expected calibration error of the softmax with the temperature and without, as a fraction.
    """

    temperature: Annotated[float, Meta(ge=1e-3, le=1e3)] = 1.0
    slope: _Figure
    intercept: _Figure
    curve: Annotated[tuple[_Figure, ...], Meta(max_length=1_000)] = ()
    source: str = ""
    error: float = 0.0
    error_before: float = 0.0

    def softened(self, scoring: Scoring) -> Scoring:
        """Return the model's scoring with the temperature; a sigmoid, which has a bias of its own, is left as it is."""
        return scoring if scoring.bias is not None else Scoring(scoring.scale / self.temperature)

    def limit(self, best: Matches, refuse_known: float) -> float:
        """Return the match below which an image is refused, for a share of images of known things.

        It depends on the labels at hand: each pair's image, with its own caption as one more label, stands for an image
        of a known thing. The limit is the k-th smallest of their n best matches, k = ⌊share · (n + 1)⌋, which
        refuses at most this share of new such images on average (split conformal prediction, Vovk et al. 2005).

        Args:
            best: the best match of each pair's image among the labels, (n,).
        """
        rank = math.floor(refuse_known * (len(best) + 1) + 1e-9)
        return float(np.sort(np.maximum(best, self.curve))[rank - 1]) if rank else -math.inf

    def probabilities(self, matches: Matches) -> Probabilities:
        """Return the probability that each label fits each image, by itself."""
        own: Probabilities = np.exp(-np.logaddexp(0, -(self.slope * matches + self.intercept))).astype(np.float32)
        return own


# Of models that were exported without pairs: those of benchmarks/devices/none_of_these.py are within 0.3 of it.
UNCALIBRATED = Calibration(slope=0.97, intercept=-3.3)


def usual_limit(usual: Matches, labels: int) -> Matches:
    """Return the match below which an image is refused without calibration, (N, 1), from those of the nouns, (N, K).

    Among as many nouns as there are labels, two would match at least as well.
    """
    limit: Matches = np.quantile(usual, 1 - min(0.5, 2 / (labels + 1)), axis=1, keepdims=True).astype(np.float32)
    return limit


def paired(images: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return image embeddings, (N, D), with a 1 at the end if labels are (C, D + 1), whose last entry is an offset."""
    if labels.shape[1] != images.shape[1] + 1:
        return images
    return np.concatenate([images, np.ones((len(images), 1), dtype=np.float32)], axis=1)


def require_finite(embeddings: npt.NDArray[np.float32], source: str) -> npt.NDArray[np.float32]:
    """Return the embeddings if all entries are finite."""
    if not np.isfinite(embeddings).all():
        raise NotFiniteError(
            f"{source} has embeddings with entries that are not finite numbers.",
            hint="the model is damaged, or its precision does not work on this device; check a bundle with "
            "clip-rd-edge verify",
        )
    return embeddings
