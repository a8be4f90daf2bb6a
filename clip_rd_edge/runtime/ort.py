"""A bundle's towers in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.contract.bundle import TOKENIZER, LabelBank, Manifest, Tower, bundle_size_bytes, read_labels
from clip_rd_edge.contract.encoder import Description, Embeddings, in_batches
from clip_rd_edge.contract.preprocess import preprocess
from clip_rd_edge.contract.tokenizer import Tokenizer
from clip_rd_edge.errors import ConfigError, UsageError

BATCH_SIZE = 32


def open_session(model: str | bytes, *, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU for a file's path or a model's bytes.

    Raises:
        ConfigError: it is no model that this ONNX Runtime can run.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own graph rewriting
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; at least 1 is needed.")
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        shown = model if isinstance(model, str) else "the model"
        raise ConfigError(f"ONNX Runtime {ort.__version__} cannot run {shown}: {error}.") from error


class OrtEncoder:
    """An `Encoder` over a bundle; see `clip_rd_edge.runtime.load`."""

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.threads = threads

    def describe(self) -> Description:
        """What this encoder is; `precision` is both towers' where they differ."""
        manifest = self.manifest
        return Description(
            name=manifest.name,
            runtime="onnxruntime",
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

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Embed RGB pictures, (N, D)."""
        parts = []
        for batch in in_batches(len(images), BATCH_SIZE):
            pixels = np.stack([preprocess(image, self.manifest.preprocessing) for image in images[batch]])
            parts.append(self.encode_pixels(pixels))
        return np.concatenate(parts) if parts else self._nothing()

    def encode_pixels(self, pixels: npt.NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed pictures, (N, 3, H, W) to (N, D)."""
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
        return open_session(str(self.folder / self.manifest.image.file), threads=self.threads)

    @cached_property
    def _text_session(self) -> Any:
        return open_session(str(self.folder / self.manifest.text.file), threads=self.threads)

    def _run(self, session: Any, tower: Tower, inputs: npt.NDArray[Any]) -> Embeddings:
        (embeddings,) = session.run([tower.output_name], {tower.input_name: inputs})
        result: Embeddings = embeddings
        return result

    def _nothing(self) -> Embeddings:
        return np.zeros((0, self.manifest.embedding_size), dtype=np.float32)
