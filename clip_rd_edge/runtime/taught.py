"""Labels that a few images of each have taught: a linear head on frozen embeddings, in closed form, by NumPy alone.

Where a label c has a text t(c) alone, an image x gets the logit s x·t(c). A taught one adds what its images show:

    s x·[β t(c) + (1 − β) t̄] + b (x·r(c) − τ)

t̄ is the mean of the taught labels' texts. r is a ridge regression from the embeddings of all images onto their labels,
in which `reference_images` are images of none. τ is the share 0.4 of what an image that was left out gets for its own
label: with less, the label becomes less likely than by its text. So those beside it, which have texts alone, keep their
images. β, b and the ridge λ are those which best predict every image while it is left out; that is exact and costs
nothing in a linear regression. With b = 0 and β = 1 the answer is zero-shot's, for texts that need no images.

Sources: Tip-Adapter (Zhang et al. 2022) combines images and texts in this way; "A closer look at the few-shot
adaptation of large vision-language models" (Silva-Rodríguez et al. 2024) warns of choices that no small set of images
can make; left-out residuals of a ridge regression, Allen (1974).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import Embeddings, Encoder, Scoring, embeds_texts, label_embeddings, require_labels
from clip_rd_edge.bundle.images import ImageInput
from clip_rd_edge.bundle.labels import LabelBank, Taught, read_taught, require_readable, taught_bytes, write_labels
from clip_rd_edge.bundle.manifest import LABELS, TAUGHT, write_manifest
from clip_rd_edge.bundle.reference import reference_images
from clip_rd_edge.errors import ConfigError, InputError, near_matches
from clip_rd_edge.runtime.encoder import BundleEncoder, image_key
from clip_rd_edge.runtime.labels import NO_LABELS
from clip_rd_edge.runtime.load import copy_bundle, encode_inputs
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.outputs import new_folder

Matrix = npt.NDArray[np.float64]


class EmbeddedImages(NamedTuple):
    """Images of a label whose embeddings are known, (N, D)."""

    rows: npt.NDArray[np.floating]


Examples = Mapping[str, ImageInput | Iterable[ImageInput] | EmbeddedImages]
_TEXT_SHARES, _BOOSTS, _RIDGES = (1.0, 0.5, 0.0), (0.0, 2.0, 4.0, 8.0, 16.0), (0.1, 0.3, 1.0)  # β, b, λ
# With one image of each label, none is left to compare with: β, b, λ, and what another image would get for its label.
_SINGLE, _UNSEEN = (0.5, 16.0, 0.3), 0.54
_THRESHOLD = 0.4
_NONE = -1  # the class of the reference images


class Lesson(msgspec.Struct, frozen=True, kw_only=True):
    """What was taught.

    Attributes:
        labels: the number of images of each taught label.
        beside: number of labels that have texts alone.
        accuracy: share of the images that get their own label while they are left out; None with one of each.
        by_texts: the same by the texts alone.
        text_share, boost, ridge, threshold: β, b, λ and τ.
    """

    labels: dict[str, int]
    beside: int
    accuracy: float | None = None
    by_texts: float | None = None
    text_share: float = 1.0
    boost: float = 0.0
    ridge: float = 0.0
    threshold: float = 0.0


def teach(encoder: Encoder, examples: Examples, *, forget: Sequence[str] = (), alone: bool = False) -> Lesson:
    """Teach an encoder's label bank labels by images of each, beside those that it has been taught before.

    Args:
        encoder: its attributes `label_bank` and `taught` are replaced.
        examples: images of each label; those of a label that was taught before are added to its earlier ones.
        forget: labels to be forgotten with their images.
        alone: leave out the labels that have only texts.
    """
    taught: Taught = getattr(encoder, "taught", None) or nothing_taught(encoder)
    for name in forget:
        if name not in taught.names:
            raise InputError(
                f"No images have taught {name!r}.{near_matches(name, taught.names)}",
                hint=f"the taught labels are: {', '.join(taught.names) or 'none'}",
            )
    for name, images in examples.items():
        rows = images.rows if isinstance(images, EmbeddedImages) else encode_inputs(encoder, images)
        taught = _with_images(encoder, taught, name, rows)
    kept = [name for name in taught.names if name not in forget]
    beside = NO_LABELS if alone else _beside(_bank_of(encoder), taught, forget)
    taught = _only(taught, kept)
    new, lesson = beside, Lesson(labels={}, beside=len(beside.names))
    if kept:
        require_readable((*kept, *beside.names), encoder.describe().embedding_size + 1, "fp32")
        new, lesson = taught_bank(taught, beside, _scoring(encoder))
    encoder.label_bank, encoder.taught = new if new.names else None, taught  # type: ignore[attr-defined]
    return lesson


def _bank_of(encoder: Encoder) -> LabelBank:
    return getattr(encoder, "label_bank", None) or NO_LABELS


def images_of(encoder: BundleEncoder, file: Path) -> dict[str, EmbeddedImages]:
    """Return the images of each label in a taught.npz, such as the demo's page saves."""
    taught = read_taught(file, size=encoder.manifest.embedding_size)
    if taught.model != image_key(encoder.manifest):
        raise ConfigError(
            f"{file} has the images of another model.", hint="teach the bundle with which it was saved, or by images"
        )
    return {name: EmbeddedImages(taught.images[taught.classes == number]) for number, name in enumerate(taught.names)}


def write_taught_bundle(encoder: BundleEncoder, output: Path, *, overwrite: bool = False) -> None:
    """Write a copy of a bundle with the labels that its encoder has been taught."""
    bank, taught = encoder.label_bank, encoder.taught
    with new_folder(output, overwrite=overwrite) as folder:
        copy_bundle(encoder.folder, encoder.manifest, folder)
        for name in (LABELS, TAUGHT):
            (folder / name).unlink(missing_ok=True)
        if bank is not None:
            write_labels(folder, bank)
        if taught is not None and taught.names:
            write_bytes(folder / TAUGHT, taught_bytes(taught))
        write_manifest(folder, encoder.manifest.with_features(taught=taught.names if taught else ()))


def taught_among(
    encoder: Encoder, taught: Taught, labels: Sequence[str], rows: Mapping[str, Embeddings]
) -> tuple[Taught, LabelBank]:
    """Return what is taught with further images, and the bank of these labels, for a page that writes nothing.

    Args:
        taught: what was taught before; other labels are left out.
        labels: the labels, those without images, too.
        rows: embeddings of images by label, (N, D).
    """
    taught, size = _only(taught, [name for name in taught.names if name in labels]), taught.texts.shape[1]
    for name in labels:
        taught = _with_images(encoder, taught, name, rows[name]) if name in rows else taught
    beside = NO_LABELS
    if others := tuple(name for name in labels if name not in taught.names):
        beside = LabelBank(others, label_embeddings(encoder, others, encoder.describe().templates)[:, :size])
    return taught, taught_bank(taught, beside, _scoring(encoder))[0]


def _scoring(encoder: Encoder) -> Scoring:
    """Return how the model's answers become probabilities, by its calibration if there is one."""
    description = encoder.describe()
    calibration = description.calibration
    return calibration.softened(description.scoring) if calibration else description.scoring


def nothing_taught(encoder: Encoder) -> Taught:
    """Return a start without labels: the embeddings of the reference images."""
    description = encoder.describe()
    rows = encode_inputs(encoder, list(reference_images(description.preprocessing.size)))
    none = np.full(len(rows), _NONE, np.int32)
    empty = np.zeros((0, description.embedding_size), np.float32)
    key = image_key(encoder.manifest) if isinstance(encoder, BundleEncoder) else ""
    return Taught((), empty, np.zeros(0, np.bool_), rows.astype(np.float16), none, key)


def _with_images(encoder: Encoder, taught: Taught, name: str, rows: npt.NDArray[np.floating]) -> Taught:
    """Return what was taught, with new images of a label, (N, D); those that it already has are left out."""
    require_labels([name])
    if not len(rows):
        raise InputError(f"There are no images of {name!r}.", hint="name one to fifty of them")
    names, texts, own = taught.names, taught.texts, taught.own
    if name not in names:
        text = stored = _bank_of(encoder).find([name])
        if text is None and embeds_texts(encoder):
            text = label_embeddings(encoder, [name], encoder.describe().templates)
        elif text is None:
            text = np.zeros((1, texts.shape[1]), np.float32)
        names = (*names, name)
        texts, own = np.concatenate([texts, text[:, : texts.shape[1]]]), np.append(own, stored is not None)
    number = names.index(name)
    known = {row.tobytes() for row in taught.images[taught.classes == number]}
    added = {key: row for row in rows.astype(np.float16) if (key := row.tobytes()) not in known}
    images = np.concatenate([taught.images, np.stack(list(added.values()))]) if added else taught.images
    classes = np.append(taught.classes, np.full(len(added), number, np.int32)).astype(np.int32)
    return Taught(names, texts, own, images, classes, taught.model)


def _only(taught: Taught, names: Sequence[str]) -> Taught:
    rows = [taught.names.index(name) for name in names]
    numbers = {_NONE: _NONE} | {row: number for number, row in enumerate(rows)}
    kept = np.array([number in numbers for number in taught.classes.tolist()], np.bool_)
    classes = np.array([numbers[number] for number in taught.classes[kept].tolist()], np.int32)
    return Taught(tuple(names), taught.texts[rows], taught.own[rows], taught.images[kept], classes, taught.model)


def _beside(bank: LabelBank, taught: Taught, forget: Sequence[str]) -> LabelBank:
    """Return the labels of a bank that have only texts, and those that it has again once others are forgotten."""
    size = taught.texts.shape[1]
    rows = {name: row for name, row in zip(bank.names, bank.embeddings, strict=True) if name not in taught.names}
    before = zip(taught.names, taught.texts, taught.own, strict=True)
    rows |= {name: text for name, text, own in before if own and name in forget}
    return LabelBank(tuple(rows), np.stack([row[:size] for row in rows.values()])) if rows else NO_LABELS


def taught_bank(taught: Taught, beside: LabelBank, scoring: Scoring) -> tuple[LabelBank, Lesson]:
    """Return a bank with the taught labels, and after them those beside, as the heading of this module has it."""
    images, classes, count = taught.images.astype(np.float64), taught.classes, len(taught.names)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    texts = taught.texts.astype(np.float64)
    others = beside.embeddings.reshape(-1, texts.shape[1]).astype(np.float64)
    is_known = texts.any(axis=1)
    if len(known := np.concatenate([texts[is_known], others])):
        texts[~is_known] = known.mean(axis=0)
    mean = texts.mean(axis=0)
    sizes = np.bincount(classes + 1, minlength=count + 1)
    weights = len(images) / len(sizes) / sizes[classes + 1]
    targets = (classes[:, None] == np.arange(count)).astype(np.float64)
    judged = (classes != _NONE) & (sizes[classes + 1] > 1)
    shown, scale = images[judged], scoring.scale
    by_text, level, beside_logits = scale * shown @ texts.T, scale * (shown @ mean)[:, None], scale * shown @ others.T
    left = _LeftOut(classes[judged], weights[judged], by_text, level, beside_logits, scoring.bias)
    choice, head = None, np.zeros((count, texts.shape[1]))
    for ridge in _RIDGES if judged.any() else ():
        solved, scores = _regression(images, targets, weights, ridge)
        found = left.best(scores[judged], ridge)
        if choice is None or found.loss < choice.loss:
            choice, head = found, solved
    if choice is None:
        choice = _Choice(0.0, *_SINGLE, _THRESHOLD * _UNSEEN, None, None)
        head, _ = _regression(images, targets, weights, choice.ridge)
    rows = choice.share * texts + (1 - choice.share) * mean + choice.boost / scoring.scale * head
    rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=-choice.boost * choice.threshold / scoring.scale)
    vectors = np.concatenate([rows, np.pad(others, ((0, 0), (0, 1)))]).astype(np.float32)
    lesson = Lesson(
        labels=dict(zip(taught.names, sizes[1:].tolist(), strict=True)), beside=len(others), accuracy=choice.accuracy,
        by_texts=choice.by_texts, text_share=choice.share, boost=choice.boost, ridge=choice.ridge,
        threshold=choice.threshold,
    )  # fmt: skip
    return LabelBank((*taught.names, *beside.names), vectors, taught.names), lesson


def _regression(images: Matrix, targets: Matrix, weights: Matrix, ridge: float) -> tuple[Matrix, Matrix]:
    """Return the head of a weighted ridge regression, (C, D), and what each image gets while it is left out, (N, C)."""
    weighted = images.T * weights
    inverse = np.linalg.inv(weighted @ images + ridge * np.eye(images.shape[1]))
    head = inverse @ (weighted @ targets)
    leverage = weights * ((images @ inverse) * images).sum(axis=1)
    return head.T, (images @ head - leverage[:, None] * targets) / (1 - leverage)[:, None]


class _Choice(NamedTuple):
    loss: float
    share: float
    boost: float
    ridge: float
    threshold: float
    accuracy: float | None
    by_texts: float | None


class _LeftOut(NamedTuple):
    """Images of labels with several, and their logits: by texts, (N, C), by the mean text, and by those beside."""

    classes: npt.NDArray[np.int32]
    weights: Matrix
    by_text: Matrix
    level: Matrix
    beside: Matrix
    bias: float | None

    def best(self, scores: Matrix, ridge: float) -> _Choice:
        """Return the mix of texts and the regression's left-out scores, (N, C), with the lowest loss."""
        own = np.arange(len(self.classes))
        threshold = max(0.0, _THRESHOLD * float(np.average(scores[own, self.classes], weights=self.weights)))
        best, by_texts = None, None
        for share, boost in product(_TEXT_SHARES, _BOOSTS):
            logits = share * self.by_text + (1 - share) * self.level + boost * (scores - threshold)
            logits = np.concatenate([logits, self.beside], axis=1)
            right = float(np.average(logits.argmax(axis=1) == self.classes, weights=self.weights))
            by_texts = right if by_texts is None else by_texts  # the first has texts alone
            losses = _losses(logits, self.classes, self.bias)
            loss = float(np.average(losses, weights=self.weights))
            if best is None or loss < best.loss:
                best = _Choice(loss, share, boost, ridge, threshold, right, by_texts)
        assert best is not None
        return best


def _losses(logits: Matrix, classes: npt.NDArray[np.int32], bias: float | None) -> Matrix:
    """Return the negative logarithm of the probability of each image's answers, by softmax or by sigmoids."""
    own = np.arange(len(classes)), classes
    if bias is None:
        highest = logits.max(axis=1)
        losses: Matrix = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1)) - logits[own]
        return losses
    wrong = np.logaddexp(0, logits + bias)
    losses = wrong.sum(axis=1) - wrong[own] + np.logaddexp(0, -(logits[own] + bias))
    return losses
