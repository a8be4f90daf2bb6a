"""PyTorch implementations of the `Encoder` protocol, so that one benchmark serves teachers, students and bundles.

Their text tower computes no more positions than each text needs: a context has 77, a caption some 15.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from clip_rd_edge.bundle.encoder import Description, Embeddings, as_list, in_batches, require_finite
from clip_rd_edge.bundle.images import ImageInput, as_rgb
from clip_rd_edge.bundle.preprocess import preprocess
from clip_rd_edge.models.clip import (
    ClipModel,
    ImageTower,
    TextTower,
    evaluation_mode,
    on_cpu,
    parameter_count,
    text_module,
)
from clip_rd_edge.utils.files import size_bytes
from clip_rd_edge.utils.text import Reporter

# Texts are computed together with those of about the same length.
LENGTHS = (8, 16, 32, 64)
_BATCH = 1_024  # texts between two reports of progress
# So many positions of padding take less time than a pass of their own for the shorter texts; by trial on a CPU.
_PASS = 96
# Tensors of open_clip's own towers that have a row, and maybe a column, per position; those of Hugging Face adapt.
_ROWS, _ROWS_AND_COLUMNS = "positional_embedding", "attn_mask"
# While a tower computes fewer positions, its model has parts in the place of these tensors, for all threads.
_replaced = threading.Lock()
_MASKED_POOLERS = ("MeanPooler", "ClsPooler", "ClsLastHiddenStatePooler")


class CaptionTower(nn.Module):
    """Computes what a text tower returns for token ids (N, T), without the positions after a text's end.

    They have no influence on the result where a token attends to those before it alone, as in CLIP, or not to padding,
    as in towers of Hugging Face. In all other towers, every position is computed.

    Args:
        tower: maps ids (N, T) to rows (N, D), such as a `TextTower`.
        model: the open_clip model, or its text tower, whose weights `tower` uses.
        choices: ascending; a text is computed with the first number of positions that is enough, or else with all T.

    Attributes:
        choices: empty if every position matters.
    """

    def __init__(self, tower: nn.Module, model: nn.Module, *, choices: Sequence[int] = LENGTHS) -> None:
        super().__init__()
        self.tower = tower
        self._text: Any = text_module(model)
        self._needed = _needed_positions(self._text) if choices else None
        self.choices = tuple(choices) if self._needed else ()
        tensors = {id(getattr(self._text, own, None)): own for own in (_ROWS, _ROWS_AND_COLUMNS)}
        named = chain(tower.named_parameters(), tower.named_buffers())
        self._positional = {name: tensors[id(tensor)] for name, tensor in named if id(tensor) in tensors}

    def lengths(self, input_ids: Tensor) -> list[int]:
        """Return how many positions are computed for each text, given ids (N, T) on any device."""
        whole = input_ids.shape[1]
        if self._needed is None:
            return [whole] * len(input_ids)
        needed = self._needed(input_ids).tolist()
        return [next((n for n in self.choices if need <= n < whole), whole) for need in needed]

    def rows_by_length(self, input_ids: Tensor) -> dict[int, list[int]]:
        """Return the rows of the texts that are computed together, by `lengths`, the shortest first."""
        lengths = self.lengths(input_ids)
        return {length: [row for row, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))}

    def passes(self, input_ids: Tensor) -> list[tuple[int, list[int]]]:
        """Return what `forward` computes together: numbers of positions, ascending, and the rows of the texts."""
        passes = list(self.rows_by_length(input_ids).items())
        # Only there was it measured; kernels of GPUs also prefer multiples of 8 positions.
        if self._needed is None or next(self.tower.parameters()).device.type != "cpu":
            return passes
        return _fewer_passes(passes, self._needed(input_ids).tolist())

    def forward(self, input_ids: Tensor) -> Tensor:
        passes = self.passes(input_ids)
        computed = torch.cat([self.compute(input_ids[own], length) for length, own in passes])
        order = torch.tensor([row for _, own in passes for row in own]).argsort()
        return computed[order.to(computed.device, non_blocking=True)]

    def compute(self, input_ids: Tensor, length: int) -> Tensor:
        """Return the rows of texts that need no more than the first `length` positions."""
        ids = input_ids[:, :length].to(next(self.tower.parameters()).device, non_blocking=True)
        with _replaced if self._positional else nullcontext():
            cut = {}
            if length < input_ids.shape[1]:
                cut = {name: self._part(own, slice(length)) for name, own in self._positional.items()}
            rows: Tensor = functional_call(self.tower, cut, (ids,))
        return rows

    def _part(self, name: str, part: slice) -> Tensor:
        tensor: Tensor = getattr(self._text, name)
        return tensor[part, part] if name == _ROWS_AND_COLUMNS else tensor[part]


def _fewer_passes(passes: list[tuple[int, list[int]]], needed: list[int]) -> list[tuple[int, list[int]]]:
    """Return passes over the same rows, each no longer than its rows need, and joined where that costs less."""
    fewer = list[tuple[int, list[int]]]()
    for _, rows in passes:
        length = max(needed[row] for row in rows)
        if fewer and (length - fewer[-1][0]) * len(fewer[-1][1]) < _PASS:
            rows = fewer.pop()[1] + rows
        fewer.append((length, rows))
    return fewer


def embed_with_progress(
    texts: list[str], embed: Callable[[list[str]], Tensor], *, stage: str, reporter: Reporter
) -> Tensor:
    """Embed N texts, (N, D), part by part, and report how many are done."""
    rows = list[Tensor]()
    for part in in_batches(len(texts), _BATCH):
        rows.append(embed(texts[part]))
        reporter.update(stage, min(part.stop, len(texts)), len(texts))
    return torch.cat(rows)


def pooling_of(text: nn.Module) -> str | None:
    """Return how a text tower of open_clip's own makes one row of all positions: argmax takes the end token's."""
    return getattr(text, "pool_type", getattr(text, "text_pool_type", None))


def _needed_positions(text: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what maps ids (N, T) to the number of positions that matter, (N,); None if all do."""
    if hasattr(text, "pooler"):  # Hugging Face's
        padding = getattr(text.config, "pad_token_id", None)
        if padding is None or type(text.pooler).__name__ not in _MASKED_POOLERS:
            return None
        return partial(_before_padding, padding)
    appends = getattr(text, "cls_emb", None) is not None  # a token after the padding, as in CoCa
    if appends or getattr(text, "attn_mask", None) is None:
        return None
    pool = pooling_of(text)
    end = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
    if pool == "argmax":
        return _up_to_highest
    if pool == "eos" and end is not None:
        return partial(_up_to_end, end)
    return None


# Functions of the module, since pickle takes no others to another process.
def _before_padding(padding: int, ids: Tensor) -> Tensor:
    return ids.shape[1] - (ids != padding).int().flip(1).argmax(1)


def _up_to_highest(ids: Tensor) -> Tensor:
    return ids.argmax(1) + 1


def _up_to_end(end: int, ids: Tensor) -> Tensor:
    return (ids == end).int().argmax(1) + 1


def text_transformer(clip: ClipModel) -> Any:
    """Return the transformer of a model's text tower."""
    return text_module(clip.model).get_submodule("transformer")


def text_layers(clip: ClipModel) -> nn.ModuleList:
    """Return the layers of a model's text tower, in order."""
    transformer = text_transformer(clip)
    if clip.has_hugging_face_text:
        count = getattr(transformer.config, layers_key(clip))
        lists = (module for module in transformer.modules() if isinstance(module, nn.ModuleList))
        return next(module for module in lists if len(module) == count)
    layers: nn.ModuleList = transformer.resblocks
    return layers


def layers_key(clip: ClipModel) -> str:
    """Return what the configuration of a Hugging Face text tower calls the number of its layers."""
    import open_clip

    key: str = open_clip.hf_configs.arch_dict[text_transformer(clip).config.model_type]["config_names"]["layers"]
    return key


def token_embedding(clip: ClipModel) -> Any:
    if clip.has_hugging_face_text:
        return text_transformer(clip).get_input_embeddings()
    return text_module(clip.model).get_submodule("token_embedding")


def text_groups(clip: ClipModel) -> list[list[nn.Parameter]]:
    """Return the parameters of a text tower in groups, from the input: embeddings of tokens and positions, each layer.

    What comes after the layers, such as the projection, is in none of them.
    """
    if clip.has_hugging_face_text:
        transformer = text_transformer(clip)
        embeddings = list(getattr(transformer, "embeddings", token_embedding(clip)).parameters())
    else:
        text: Any = text_module(clip.model)
        others = (text.positional_embedding, getattr(text, "cls_emb", None))
        embeddings = [*token_embedding(clip).parameters(), *(one for one in others if one is not None)]
    return [embeddings, *(list(layer.parameters()) for layer in text_layers(clip))]


BATCH_SIZE = 64


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Within the block, torch computes with this many threads; None leaves their number as it is.

    A thread of Python that first computes while another one is in such a block keeps that one's number.
    """
    if number is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        self._caption_tower = CaptionTower(self._text_tower, clip.model)

    def describe(self) -> Description:
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
            batches.append(self._run(self._caption_tower, ids))
        return np.concatenate(batches) if batches else self._no_embeddings()

    @on_cpu()
    def tokenize(self, texts: str | Sequence[str]) -> npt.NDArray[np.int64]:
        ids: npt.NDArray[np.int64] = self.clip.tokenizer(as_list(texts)).numpy()
        return ids

    def encode_pixels(self, pixels: npt.NDArray[np.float32]) -> Embeddings:
        return self._run(self._image_tower, pixels)

    def encode_ids(self, ids: npt.NDArray[np.int64]) -> Embeddings:
        return self._run(self._text_tower, ids)

    def _run(
        self, tower: Callable[[Tensor], Tensor], inputs: npt.NDArray[np.float32] | npt.NDArray[np.int64]
    ) -> Embeddings:
        device = next(self.clip.model.parameters()).device
        with on_cpu(), torch_threads(self.threads), evaluation_mode(self.clip.model), torch.inference_mode():
            embeddings: Embeddings = tower(torch.from_numpy(inputs).to(device)).cpu().numpy()
            return require_finite(embeddings, self.clip.name)

    def _no_embeddings(self) -> Embeddings:
        return np.zeros((0, self.clip.embedding_size), dtype=np.float32)
