"""PyTorch implementations of the `Encoder` protocol, so that one benchmark serves teachers, students and bundles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.encoder import Description, Embeddings, as_list, in_batches
from clip_rd_edge.bundle.images import ImageInput, as_rgb
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.bundle.scoring import require_finite
from clip_rd_edge.errors import UsageError, first_line
from clip_rd_edge.models.clip import ClipModel, ImageTower, TextTower, evaluation_mode, on_cpu, parameter_count
from clip_rd_edge.models.text_towers import CaptionTower
from clip_rd_edge.utils.files import size_bytes

BATCH_SIZE = 64


class _ThreadNumbers(threading.local):
    """The number of torch's threads that `torch_threads` has set in this thread; None outside of its blocks."""

    here: int | None = None


_numbers, _lock, _inside, _before = _ThreadNumbers(), threading.Lock(), 0, 0


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Within the block, torch computes with this many threads; None leaves their number as it is.

    Torch has a number for each thread, and when a thread first computes or asks, gives it what any other has set last.
    So each asks before it sets its own, and restores what held before the first one came.
    """
    global _inside, _before
    if number is None:
        yield
        return
    with _lock:
        now = torch.get_num_threads()
        _before = _before if _inside else now
        _inside += 1
    outer, _numbers.here = _numbers.here, number
    torch.set_num_threads(number)
    try:
        yield
    finally:
        _numbers.here = outer
        torch.set_num_threads(outer or _before)
        with _lock:
            _inside -= 1


class TorchEncoder:
    """Runs a `ClipModel` in eager PyTorch, in evaluation mode; each module is then back in its own previous mode.

    Args:
        folder: the model's folder, for its size on disk; None if it is not saved yet.
        image_tower: replaces the model's image tower, for instance by one that simulates INT8.
        threads: that a tower computes with; None leaves their number to torch.
    """

    def __init__(
        self,
        clip: ClipModel,
        *,
        folder: Path | None = None,
        image_tower: nn.Module | None = None,
        threads: int | None = None,
    ) -> None:
        self.clip = clip
        self.folder = folder
        self.threads = threads
        self._image_tower = image_tower or ImageTower(clip.model)
        self._text_tower = TextTower(clip.model)
        self._caption_tower: nn.Module = CaptionTower(self._text_tower, clip.model)

    def describe(self) -> Description:
        """Describe this encoder."""
        parameters = parameter_count(self.clip.model)
        weights = next(iter(self.folder.glob("*.safetensors")), self.folder) if self.folder else None
        return Description(
            name=self.clip.name,
            runtime="torch",
            precision="fp32",
            embedding_size=self.clip.embedding_size,
            preprocessing=self.clip.preprocessing,
            logit_scale=self.clip.scoring.scale,
            logit_bias=self.clip.scoring.bias,
            templates=self.clip.templates,
            parameters=parameters,
            size_bytes=size_bytes(weights) if weights else 4 * parameters,
        )

    def encode_images(self, images: Sequence[ImageInput]) -> Embeddings:
        """Embed images, (N, D)."""
        batches = []
        for batch in in_batches(len(images), BATCH_SIZE):
            pixels = np.stack([preprocess(as_rgb(image), self.clip.preprocessing) for image in images[batch]])
            batches.append(self.encode_pixels(pixels))
        return np.concatenate(batches) if batches else self._no_embeddings()

    def encode_texts(self, texts: str | Sequence[str]) -> Embeddings:
        """Embed texts, (N, D), at the cost of their own lengths; `encode_ids` always computes whole contexts."""
        texts, batches = as_list(texts), list[Embeddings]()
        for batch in in_batches(len(texts), BATCH_SIZE):
            ids = self.tokenize(texts[batch])
            batches.append(self._run(self._callable_for(self._caption_tower, len(ids)), ids))
        return np.concatenate(batches) if batches else self._no_embeddings()

    @on_cpu()
    def tokenize(self, texts: str | Sequence[str]) -> npt.NDArray[np.int64]:
        """Convert texts to token ids, (N, T)."""
        ids: npt.NDArray[np.int64] = self.clip.tokenizer(as_list(texts)).numpy()
        return ids

    def encode_pixels(self, pixels: npt.NDArray[np.float32]) -> Embeddings:
        """Embed preprocessed images, (N, 3, H, W) to (N, D)."""
        return self._run(self._callable_for(self._image_tower, len(pixels)), pixels)

    def encode_ids(self, ids: npt.NDArray[np.int64]) -> Embeddings:
        """Embed tokenised texts, (N, T) to (N, D)."""
        return self._run(self._callable_for(self._text_tower, len(ids)), ids)

    def _callable_for(self, tower: nn.Module, batch_size: int) -> Callable[[Tensor], Tensor]:
        """Return the callable that runs a tower at this batch size: in eager mode, the tower itself."""
        return tower

    def _run(
        self, tower: Callable[[Tensor], Tensor], inputs: npt.NDArray[np.float32] | npt.NDArray[np.int64]
    ) -> Embeddings:
        device = next(self.clip.model.parameters()).device
        with on_cpu(), torch_threads(self.threads), evaluation_mode(self.clip.model), torch.inference_mode():
            embeddings: Embeddings = tower(torch.from_numpy(inputs).to(device)).cpu().numpy()
            return require_finite(embeddings, self.clip.name)

    def _no_embeddings(self) -> Embeddings:
        return np.zeros((0, self.clip.embedding_size), dtype=np.float32)


class CompiledEncoder(TorchEncoder):
    """Runs a `ClipModel` with torch.compile, which compiles each tower once for single inputs and once for batches."""

    def __init__(
        self,
        clip: ClipModel,
        *,
        folder: Path | None = None,
        image_tower: nn.Module | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__(clip, folder=folder, image_tower=image_tower, threads=threads)
        self._caption_tower = self._text_tower  # each length would be compiled apart
        self._compiled: dict[tuple[int, bool], Callable[[Tensor], Tensor]] = {}

    def describe(self) -> Description:
        """Describe this encoder."""
        return msgspec.structs.replace(super().describe(), runtime="torch-compile")

    def _callable_for(self, tower: nn.Module, batch_size: int) -> Callable[[Tensor], Tensor]:
        key = (id(tower), batch_size > 1)
        if key not in self._compiled:
            self._compiled[key] = torch.compile(tower, dynamic=batch_size > 1)
        return self._compiled[key]

    def _run(
        self, tower: Callable[[Tensor], Tensor], inputs: npt.NDArray[np.float32] | npt.NDArray[np.int64]
    ) -> Embeddings:
        try:
            return super()._run(tower, inputs)
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, or an unsupported model
            raise UsageError(f"torch.compile does not work on {self.clip.name} here: {first_line(error)}.") from error
