"""Zero-shot image classification with any encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import (
    REFUSE_KNOWN,
    UNCALIBRATED,
    Embeddings,
    Encoder,
    Probabilities,
    label_embeddings,
    paired,
    require_labels,
    top_indices,
    usual_limit,
)
from clip_rd_edge.bundle.images import ImageInput
from clip_rd_edge.bundle.labels import LabelBank, TemplateNames, background_nouns, parse_templates, template_words
from clip_rd_edge.errors import InputError, UsageError, require_known_options
from clip_rd_edge.runtime.labels import NO_LABELS, Labels, label_names, label_set_key, read_label_set, write_label_set
from clip_rd_edge.runtime.load import encode_inputs
from clip_rd_edge.utils.text import SILENT, Reporter

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from clip_rd_edge.runtime.model import Model

_MANY_LABELS = 2000  # from this number on, embedding them is reported: it takes many seconds
_NO_LENGTH = 1e-12  # up to this, an embedding has no direction
Similarities = npt.NDArray[np.float32]


class _LabelSet(NamedTuple):
    """Labels and their embeddings, (C, D); replaced as one, since another thread may classify meanwhile."""

    labels: tuple[str, ...]
    embeddings: Embeddings


class Prediction(NamedTuple):
    """A label and its probability: among all labels of the classifier, or with `multi`, by itself."""

    label: str
    probability: float


class Deciding(TypedDict, total=False):
    """How answers are decided.

    Attributes:
        none: return no prediction for an image that no label fits: at most 5 % of images of known things, by the
            bundle's calibration.
        refuse_known: the same with another share than 5 %.
        multi: give each label a probability by itself, since several may fit; they need not add up to 1.
        raw: leave the bundle's calibration out: probabilities are those of the model's own scoring.
    """

    none: bool
    refuse_known: float | None
    multi: bool
    raw: bool


class _Decision(NamedTuple):
    refuse_known: float | None  # None if each image gets a label
    multi: bool
    raw: bool


def _decision(given: Deciding) -> _Decision:
    options: dict[str, Any] = {**given}
    require_known_options(options, Deciding.__annotations__, command="classify")
    rate = options.get("refuse_known")
    if rate is None and options.get("none"):
        rate = REFUSE_KNOWN
    if rate is not None and not (isinstance(rate, int | float | np.floating) and 0 <= rate < 1):
        raise UsageError(f"{{refuse_known}} is {rate!r}; expected a share from 0 to 1.", option="refuse_known")
    return _Decision(None if rate is None else float(rate), bool(options.get("multi")), bool(options.get("raw")))


class ZeroShotClassifier:
    """Classify images among a set of labels.

    Args:
        encoder: a `Model`, or any `Encoder`.
        labels: label names, a single label, or a label file (see `runtime.labels`); None uses those of the bundle's
            label bank. If the bank contains all labels, their embeddings are taken from it and the text tower is not
            loaded.
        templates: a prompt template with one `{}`, several, a file of them, or `imagenet` for CLIP's 80; None uses the
            model's own. The bank's embeddings are only used with the model's own templates; others embed its labels.
        cache: keep the embeddings of a bundle's labels in the user's cache folder (see `runtime.labels`), so that the
            next process with the same labels need not load the text tower. Set to False if labels change often.
        deciding: see `Deciding`.

    Raises:
        InputError: there are no labels, a label is empty or looks like the path of a missing file, or a template has
            no `{}`.
        UsageError: `refuse_known` is not a share.
    """

    def __init__(
        self,
        encoder: Encoder | Model,
        labels: Labels = None,
        *,
        templates: TemplateNames = None,
        cache: bool = True,
        reporter: Reporter = SILENT,
        **deciding: Unpack[Deciding],
    ) -> None:
        self.encoder = encoder = getattr(encoder, "encoder", encoder)  # of a `Model`
        self._decision, self._cache, self._reporter = _decision(deciding), cache, reporter
        description = encoder.describe()
        self.scoring, self.calibration = description.scoring, description.calibration
        self._templates = parse_templates(template_words(templates)).prompts or description.templates
        self._size, self._has_own_templates = description.embedding_size, self._templates == description.templates
        self._bank: LabelBank = getattr(encoder, "label_bank", None) or NO_LABELS
        self._nouns: Embeddings | None = None
        self._kept_limit: tuple[Embeddings, float, float] | None = None  # of labels, for a share
        self._set: _LabelSet
        self.set_labels(labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the columns of `probabilities`."""
        return self._set.labels

    @property
    def has_trivial_label(self) -> bool:
        """Whether there is a single label, whose softmax is 1 whatever the image shows."""
        return len(self._set.labels) == 1 and not self.scoring.is_independent

    def set_labels(self, labels: Labels) -> None:
        """Change the labels; duplicates are removed."""
        given = label_names(labels)
        require_labels(names := self._bank.names if given is None else given)
        unique = tuple(dict.fromkeys(names))
        rows = self._bank.find(unique) if self._has_own_templates else None
        if rows is None:
            texts = self._bank.untaught(unique)
            note = f"embedding {len(texts):,} labels; a bundle exported with --labels has them at once"
            rows = self._embed(texts, note if len(texts) >= _MANY_LABELS else "")
            rows = self._bank.completed(unique, rows)
        self._set = _LabelSet(unique, rows)

    def probabilities(self, images: ImageInput | Iterable[ImageInput]) -> Probabilities:
        """Return the probability of each label for each image, (N, C)."""
        return self._answers(encode_inputs(self.encoder, images), self._set.embeddings, self._decision)[0]

    def classify(self, images: ImageInput | Iterable[ImageInput], *, top: int = 5) -> list[list[Prediction]]:
        """Return the `top` most likely labels of each image, most likely first; see also `Deciding`."""
        return self.classify_embeddings(encode_inputs(self.encoder, images), top=top)

    def classify_embeddings(
        self, embeddings: Embeddings, *, top: int = 5, deciding: Deciding | None = None
    ) -> list[list[Prediction]]:
        """Like `classify`, for image embeddings of any length, (N, D), or a single one, (D,).

        Raises:
            InputError: the embeddings have another shape, are not numbers, or one is zero or not finite.
            UsageError: a share is not one.
        """
        decision = self._decision if deciding is None else _decision(deciding)
        labels, of_labels = self._set
        rows, fits = self._answers(self._unit_rows(embeddings), of_labels, decision)
        return [
            [Prediction(labels[i], float(row[i])) for i in top_indices(row, top) if fit[i]]
            for row, fit in zip(rows, fits, strict=True)
        ]

    def _answers(
        self, images: Embeddings, labels: Embeddings, decision: _Decision
    ) -> tuple[Probabilities, npt.NDArray[np.bool_]]:
        """Return the probability of each label for each image, and whether it may be an answer, (N, C) each."""
        own = None if decision.raw else self.calibration
        calibration = own or UNCALIBRATED
        compared = decision.multi or decision.refuse_known is not None
        found = self.scoring.matches(images, labels, self.background()) if compared else None
        fits = np.ones((len(images), len(labels)), bool)
        if found is not None and decision.refuse_known is not None:
            fits = found >= self._limit(images, labels, decision.refuse_known)
            if not decision.multi:  # a softmax is shown whole, or not at all
                fits = np.broadcast_to(fits.any(axis=1, keepdims=True), fits.shape)
        by_itself = decision.multi or (self.has_trivial_label and not decision.raw)
        if found is not None and by_itself and (own or not self.scoring.is_independent):
            return calibration.probabilities(found), fits
        return calibration.softened(self.scoring).probabilities(images, labels), fits

    def _limit(self, images: Embeddings, labels: Embeddings, refuse_known: float) -> float | Similarities:
        """Return the match below which a label does not fit: one for all images, or one for each, (N, 1)."""
        known: Embeddings | None = getattr(self.encoder, "known_images", None)
        if self.calibration is None or known is None:
            nouns = self.background()
            return usual_limit(self.scoring.matches(images, nouns, nouns), len(labels))
        kept = self._kept_limit
        if kept is None or kept[0] is not labels or kept[1] != refuse_known:
            best = self.scoring.matches(known, labels, self.background()).max(axis=1)
            self._kept_limit = kept = (labels, refuse_known, self.calibration.limit(best, refuse_known))
        return kept[2]

    def background(self) -> Embeddings:
        """Return the embeddings of common nouns that labels are compared with, (K, D), stored or embedded now."""
        stored: Embeddings | None = getattr(self.encoder, "background", None)
        if stored is not None and self._has_own_templates:
            return stored
        if self._nouns is None:
            nouns = background_nouns()
            self._nouns = self._embed(nouns, f"embedding {len(nouns):,} common nouns to compare labels with: once")
        return self._nouns

    def similarities(self, embeddings: Embeddings) -> Similarities:
        """Return the cosine similarity of image embeddings, (N, D), to each label, (N, C); as `classify_embeddings`."""
        of_labels = self._set.embeddings
        rows: Similarities = paired(self._unit_rows(embeddings), of_labels) @ of_labels.T
        return rows

    def _unit_rows(self, embeddings: Embeddings) -> Embeddings:
        """Return the embeddings that a caller has, (N, D), divided by their lengths; errors: `classify_embeddings`."""
        width, given = self._size, np.asarray(embeddings)
        hint = f"pass what encode_images of this model returns: (N, {width}), or ({width},) for one image"
        if given.dtype.kind not in "fiu" or given.ndim not in (1, 2) or given.shape[-1] != width:
            raise InputError(f"Image embeddings have the shape {given.shape} and the type {given.dtype}.", hint=hint)
        rows = given.reshape(-1, width).astype(np.float64)  # in which no length overflows
        lengths = np.linalg.norm(rows, axis=1)
        if not (np.isfinite(lengths) & (lengths > _NO_LENGTH)).all():
            raise InputError("An image embedding is zero, or has entries that are not finite numbers.", hint=hint)
        unit: Embeddings = (rows / lengths[:, None]).astype(np.float32)
        return unit

    def _embed(self, labels: Sequence[str], note: str) -> Embeddings:
        """Return the embeddings of labels as texts, (C, D), from the cache or by the text tower, which `note` says."""
        if not labels:
            return np.zeros((0, self._size), np.float32)
        key = self._cache_key(labels)
        rows = read_label_set(key, count=len(labels)) if key else None
        if rows is None:
            reporter = self._reporter if note else SILENT
            reporter.note(note)
            rows = label_embeddings(self.encoder, labels, self._templates, by_text=True, reporter=reporter)
            if key := self._cache_key(labels):  # now of where the text tower really runs
                write_label_set(key, rows)
        return rows

    def _cache_key(self, labels: Sequence[str]) -> str:
        text_key: str = getattr(self.encoder, "text_key", "") if self._cache else ""
        return label_set_key(text_key, labels, self._templates) if text_key else ""
