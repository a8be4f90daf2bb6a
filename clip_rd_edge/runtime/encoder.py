"""What every runtime does alike with a bundle: preprocess, tokenise, batch, describe."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.contract.bundle import TOKENIZER, Manifest, Tower, bundle_size_bytes
from clip_rd_edge.contract.encoder import Description, Embeddings, in_batches
from clip_rd_edge.contract.label_bank import LabelBank, read_labels
from clip_rd_edge.contract.preprocess import preprocess, to_bytes
from clip_rd_edge.contract.tokenizer import Tokenizer

BATCH_SIZE = 32


class BundleEncoder(ABC):
    """An `Encoder` over a bundle; a runtime adds how it opens a tower. See `clip_rd_edge.runtime.load`.

    Args:
        folder, manifest: the bundle.
        threads: threads a tower runs on; None leaves it to the runtime.
    """

    runtime: ClassVar[str]

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.threads = threads

    @abstractmethod
    def open_tower(self, tower: Tower) -> Any:
        """The tower's file in this runtime: something with ONNX Runtime's `run(names, feed)`."""

    def describe(self) -> Description:
        """What this encoder is; `precision` is both towers' where they differ."""
        manifest = self.manifest
        return Description(
            name=manifest.name,
            runtime=self.runtime,
            precision=manifest.precision,
            embedding_size=manifest.embedding_size,
            preprocessing=manifest.preprocessing,
            logit_scale=manifest.logit_scale,
            templates=manifest.templates,
            parameters=manifest.parameters,
            size_bytes=bundle_size_bytes(self.folder),
        )

    @cached_property
    def label_bank(self) -> LabelBank | None:
        """The labels that the bundle brings with their embeddings, or None."""
        return read_labels(self.folder)

    @cached_property
    def text_key(self) -> str:
        """Changes when the same text might get another embedding; empty where the manifest does not tell."""
        manifest = self.manifest
        files = [manifest.files.get(name, "") for name in (manifest.text.file, TOKENIZER)]
        if not all(files):
            return ""
        content = msgspec.json.encode((files, manifest.tokenizer, self.runtime, manifest.text.one_at_a_time))
        return hashlib.sha256(content).hexdigest()

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Embed RGB pictures, (N, D)."""
        if self.manifest.image.preprocesses:
            return self._each(self._image_session, self.manifest.image, [np.asarray(image)[None] for image in images])
        parts = []
        for batch in in_batches(len(images), BATCH_SIZE):
            pixels = np.stack([preprocess(image, self.manifest.preprocessing) for image in images[batch]])
            parts.append(self.encode_pixels(pixels))
        return np.concatenate(parts) if parts else self._nothing()

    def encode_pixels(self, pixels: npt.NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed pictures, (N, 3, H, W) to (N, D)."""
        if self.manifest.image.preprocesses:
            # Back to the bytes that they were made of, which the graph then has nothing to resize in.
            pictures = to_bytes(pixels, self.manifest.preprocessing)
            return self._each(self._image_session, self.manifest.image, [picture[None] for picture in pictures])
        return self._run(self._image_session, self.manifest.image, pixels)

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts, (N, D)."""
        parts = []
        for batch in in_batches(len(texts), BATCH_SIZE):
            parts.append(self.encode_ids(self.tokenize(texts[batch])))
        return np.concatenate(parts) if parts else self._nothing()

    def encode_ids(self, ids: npt.NDArray[np.int64]) -> Embeddings:
        """Embed tokenised texts, (N, T) to (N, D)."""
        return self._run(self._text_session, self.manifest.text, ids)

    def tokenize(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Texts as token ids, (N, T)."""
        return self._tokenizer(texts)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder / TOKENIZER, self.manifest.tokenizer)

    @cached_property
    def _image_session(self) -> Any:
        return self.open_tower(self.manifest.image)

    @cached_property
    def _text_session(self) -> Any:
        return self.open_tower(self.manifest.text)

    def _run(self, session: Any, tower: Tower, inputs: npt.NDArray[Any]) -> Embeddings:
        if tower.one_at_a_time and len(inputs) > 1:
            return self._each(session, tower, [one[None] for one in inputs])
        (embeddings,) = session.run([tower.output_name], {tower.input_name: inputs})
        result: Embeddings = embeddings
        return result

    def _each(self, session: Any, tower: Tower, inputs: Sequence[npt.NDArray[Any]]) -> Embeddings:
        parts = [self._run(session, tower, one) for one in inputs]
        return np.concatenate(parts) if parts else self._nothing()

    def _nothing(self) -> Embeddings:
        return np.zeros((0, self.manifest.embedding_size), dtype=np.float32)
