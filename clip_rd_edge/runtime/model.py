"""An open model as Python users see it: it classifies and embeds paths, PIL images, arrays, and lists of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from clip_rd_edge.contract.encoder import Description, Embeddings, TowerEncoder, in_batches
from clip_rd_edge.contract.images import ImageInput, as_rgb, is_one_image, open_image
from clip_rd_edge.contract.preprocess import quick_edge
from clip_rd_edge.runtime.classifier import Prediction, ZeroShotClassifier
from clip_rd_edge.runtime.embed import embed_images

BATCH_SIZE = 32


class Model:
    """A bundle or a CLIP model that is open; `clip_rd_edge.load` makes it.

    Args:
        encoder: what runs it; a single image or text in gives a single row or answer out.

    Attributes:
        encoder: the same, for what this class does not offer.
    """

    def __init__(self, encoder: TowerEncoder) -> None:
        self.encoder = encoder
        self._classifier: tuple[tuple[Any, ...], ZeroShotClassifier] | None = None

    def __repr__(self) -> str:
        about = self.describe()
        return f"<clip_rd_edge model {about.name}: {about.precision} in {about.runtime}, D = {about.embedding_size}>"

    def describe(self) -> Description:
        """Name, runtime, precision, preprocessing and size."""
        return self.encoder.describe()

    @property
    def label_bank(self) -> Any:
        """The labels that a bundle brings with their embeddings, or None."""
        return getattr(self.encoder, "label_bank", None)

    @property
    def text_key(self) -> str:
        """Changes when the same text might get another embedding; empty where that is not known."""
        return str(getattr(self.encoder, "text_key", ""))

    def encode_images(self, images: ImageInput | Sequence[ImageInput], *, quick: bool = False) -> Embeddings:
        """Embed images: float32, unit norm; (D,) for one image, (N, D) for a list or a batch (N, H, W, 3) of bytes.

        Args:
            quick: decode large JPEGs at a fraction of their size, which changes embeddings a little.

        Raises:
            InputError: an image cannot be read; the first such one is named.
        """
        if is_one_image(images):
            row: Embeddings = self._encode([images], quick)[0]  # type: ignore[list-item]
            return row
        return self._encode(list(images), quick)  # type: ignore[arg-type]

    def encode_texts(self, texts: str | Sequence[str]) -> Embeddings:
        """Embed texts as they stand, without templates: float32, unit norm; (D,) for one text, (N, D) for a list."""
        if isinstance(texts, str):
            row: Embeddings = self.encoder.encode_texts([texts])[0]
            return row
        return self.encoder.encode_texts(list(texts))

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is a sequence, too; it means one image
        self,
        images: ImageInput,
        labels: str | Sequence[str] | None = None,
        *,
        templates: Sequence[str] | None = None,
        top: int = 5,
        none_below: float = 0.0,
        cache: bool = True,
        quick: bool = False,
    ) -> list[Prediction]: ...

    @overload
    def classify(
        self,
        images: Sequence[ImageInput],
        labels: str | Sequence[str] | None = None,
        *,
        templates: Sequence[str] | None = None,
        top: int = 5,
        none_below: float = 0.0,
        cache: bool = True,
        quick: bool = False,
    ) -> list[list[Prediction]]: ...

    def classify(
        self,
        images: ImageInput | Sequence[ImageInput],
        labels: str | Sequence[str] | None = None,
        *,
        templates: Sequence[str] | None = None,
        top: int = 5,
        none_below: float = 0.0,
        cache: bool = True,
        quick: bool = False,
    ) -> list[Prediction] | list[list[Prediction]]:
        """The likeliest labels of an image, likeliest first; a list of such answers for several images.

        The labels of the last call are remembered, so that a second image with the same ones costs no text tower.

        Args:
            labels, templates, none_below, cache: see `ZeroShotClassifier`.
            top: labels per image.
            quick: see `encode_images`.

        Raises:
            InputError: an image cannot be read, or labels or templates do not fit.
            UsageError: `none_below` is not between 0 and 1.
        """
        classifier = self._classifier_for(labels, templates, none_below, cache)
        one = is_one_image(images)
        rows = self._encode([images] if one else list(images), quick)  # type: ignore[arg-type, list-item]
        answers = classifier.classify_embeddings(rows, top=top)
        return answers[0] if one else answers

    def classify_camera(
        self,
        camera: str | int = 0,
        labels: str | Sequence[str] | None = None,
        *,
        templates: Sequence[str] | None = None,
        top: int = 5,
        none_below: float = 0.0,
    ) -> Iterator[list[Prediction]]:
        """Classify what a camera sees, frame by frame, until it ends; arguments as `classify`.

        Args:
            camera: its number, a device's path, a video file or a stream's address.
        """
        from clip_rd_edge.runtime.camera import frames

        classifier = self._classifier_for(labels, templates, none_below, True)
        for frame in frames(str(camera)):
            yield classifier.classify([frame], top=top)[0]

    def _encode(self, images: Sequence[ImageInput], quick: bool) -> Embeddings:
        files = [Path(image) for image in images if isinstance(image, str | os.PathLike)]
        if len(files) == len(images) > 1:
            return self._encode_files(files, quick)
        at_least = quick_edge(self.describe().preprocessing) if quick else None
        parts = [self._nothing()]
        for batch in in_batches(len(images), BATCH_SIZE):
            opened = [
                open_image(Path(image), at_least=at_least) if isinstance(image, str | os.PathLike) else as_rgb(image)
                for image in images[batch]
            ]
            parts.append(self.encoder.encode_images(opened))
        return np.concatenate(parts)

    def _encode_files(self, files: Sequence[Path], quick: bool) -> Embeddings:
        """Threads open the files while the model works."""
        parts = [self._nothing()]
        for batch in embed_images(self.encoder, files, quick=quick):
            if batch.unreadable:
                raise batch.unreadable[0]
            parts.append(batch.embeddings)
        return np.concatenate(parts)

    def _nothing(self) -> Embeddings:
        return np.zeros((0, self.describe().embedding_size), dtype=np.float32)

    def _classifier_for(
        self, labels: str | Sequence[str] | None, templates: Sequence[str] | None, none_below: float, cache: bool
    ) -> ZeroShotClassifier:
        wanted = [labels] if isinstance(labels, str) else labels
        key = (tuple(wanted) if wanted is not None else None, tuple(templates or ()), none_below, cache)
        if self._classifier is None or self._classifier[0] != key:
            classifier = ZeroShotClassifier(
                self.encoder, wanted, templates=templates, none_below=none_below, cache=cache
            )
            self._classifier = (key, classifier)
        return self._classifier[1]
