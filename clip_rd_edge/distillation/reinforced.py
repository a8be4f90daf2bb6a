"""Reinforced samples in MobileCLIP's published format: pairs with stored augmentations, captions and embeddings.

MobileCLIP (Vasu et al. 2024) computes once what its teachers say of each image in some strong augmentations, and of
some captions, and stores it beside the image in WebDataset shards, as in its data set DataCompDR:

    NAME.jpg, NAME.txt             the image and its own caption (or .json, as in other shards)
    NAME.syn.json                  {"syn_text": [caption, …]}: S synthetic captions; there may be none
    NAME.paug.json                 {"param_aug": [[[top, left, height, width], [[operation, magnitude], …]], …]}: A
                                   augmentations, each a crop in pixels of the image, and RandAugment's operations on
                                   the resized crop, or null for none; the list may be a JSON text itself
    NAME.npz or NAME.pth.gz        "image_emb" (A, D), "text_emb" (1 + S, D), of the own and then of the synthetic
                                   captions; or (1, D), and "syn_text_emb" (S, D), as MobileCLIP2's generator writes it

D is the sum of the teachers' widths. What the shards lack is in a file of `StoredTeachers`.
"""

from __future__ import annotations

import gzip
import io
import pickle
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple, cast

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from msgspec import Meta
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import _apply_op  # RandAugment's operations cannot be called otherwise

from clip_rd_edge.bundle.manifest import MAX_EMBEDDING_SIZE
from clip_rd_edge.bundle.preprocess import MAX_EDGE, Preprocessing
from clip_rd_edge.data.load import TrainingData, names_shards
from clip_rd_edge.data.order import View
from clip_rd_edge.data.shard_files import TarMember
from clip_rd_edge.data.webdataset import Shards, parse_sources, read_json_member
from clip_rd_edge.distillation.loader import PairView, ViewDataset
from clip_rd_edge.distillation.pixels import Crops, crop_levels
from clip_rd_edge.distillation.store import HalfArray
from clip_rd_edge.errors import ConfigError, InputError, UsageError, first_line
from clip_rd_edge.losses.terms import Ensemble
from clip_rd_edge.utils.arrays import read_npz
from clip_rd_edge.utils.structs import CheckedStruct, PositiveFloat
from clip_rd_edge.utils.text import Reporter, is_unicode, shown_sources

_MAX_MAGNITUDE = 10_000  # pixels of a translation are the largest
_SHAPES = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_LEVELS = ("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize")
OPERATIONS = (*_SHAPES, *_LEVELS)  # of torchvision's RandAugment, by their numbers


class StoredTeacher(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A teacher whose embeddings are stored.

    Attributes:
        logit_scale: γ_t, a multiplier.
    """

    name: str
    embedding_size: Annotated[int, Meta(ge=1, le=MAX_EMBEDDING_SIZE)]
    logit_scale: PositiveFloat


class StoredTeachers(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose embeddings are stored, side by side in this order.

    Attributes:
        image_size: edge in pixels to which crops were resized for the teachers, bicubically, before RandAugment.
        share_text: the teachers have one text tower; see `losses.terms`.
    """

    teachers: Annotated[tuple[StoredTeacher, ...], Meta(min_length=1)]
    image_size: Annotated[int, Meta(ge=1, le=MAX_EDGE)] = 224
    share_text: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Embedding size of each teacher."""
        return tuple(teacher.embedding_size for teacher in self.teachers)

    @property
    def ensemble(self) -> Ensemble:
        """How the embeddings of the teachers, one or more, become those of one."""
        scales = tuple(teacher.logit_scale for teacher in self.teachers)
        return Ensemble(self.widths, scales, share_text=self.share_text)


class Augmentation(NamedTuple):
    """A crop of the image in pixels, and RandAugment's operations on it, by name, with their magnitudes."""

    top: int
    left: int
    height: int
    width: int
    operations: tuple[tuple[str, float], ...] = ()


class Reinforced(Shards):
    """Pairs from shards of reinforced samples; samples that lack augmentations or embeddings are left out."""

    reinforced = True

    def augmentations(self, index: int) -> tuple[Augmentation, ...]:
        """Return a pair's augmentations; raises InputError if they cannot be read."""
        member = self.files(index)["augmentations"]
        with _as_expected(member):
            parameters = read_json_member(member)["param_aug"]
            if isinstance(parameters, str):
                parameters = msgspec.json.decode(parameters)
            augmentations = tuple(map(_augmentation, parameters))
            _require(len(augmentations) > 0, "it has no augmentations")
        return augmentations

    def synthetic_captions(self, index: int) -> dict[str, tuple[str, ...]]:
        """Return a pair's synthetic captions by their key, as they are; raises InputError if they cannot be read."""
        member = self.files(index).get("synthetic")
        if member is None:
            return {}
        with _as_expected(member):
            content = read_json_member(member)
            captions = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
            texts = [text for value in captions.values() for text in value]
            _require(all(isinstance(text, str) and is_unicode(text) for text in texts), "its captions are not texts")
        return captions

    def embeddings(self, index: int) -> tuple[TarMember, bool]:
        """Return the file with a pair's embeddings, and whether it is a .pth.gz and not a .npz."""
        files = self.files(index)  # with both, the arrays, which are more precise
        return files.get("arrays") or files["tensors"], "arrays" not in files


@contextmanager
def _as_expected(source: object) -> Iterator[None]:
    """Within the block, a file that differs from what `data` should hold is a bad sample."""
    try:
        yield
    except (
        ConfigError, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError, zlib.error,
        RuntimeError, RecursionError, pickle.UnpicklingError, msgspec.DecodeError,
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{source} is not as expected of reinforced samples: {reason}.") from error


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _augmentation(parameters: Any) -> Augmentation:
    crop, operations = parameters
    top, left, height, width = (int(value) for value in crop)
    _require(min(top, left) >= 0 and min(height, width) >= 1, f"a crop is {crop}")
    named = []
    for number, magnitude in operations or ():
        _require(0 <= number < len(OPERATIONS) and abs(magnitude) <= _MAX_MAGNITUDE, f"{number}, {magnitude}")
        named.append((OPERATIONS[number], float(magnitude)))
    return Augmentation(top, left, height, width, tuple(named))


_MAX_BYTES = 1 << 26  # of a sample's embeddings, unpacked: 30 + 6 rows of 1,536 numbers are 221 KB
_IMAGES, _TEXTS, _SUFFIX = "image_emb", "text_emb", "_emb"


class ReinforcedSample(NamedTuple):
    """What is stored of a pair: A augmentations with their embeddings (A, D), and captions with theirs.

    Attributes:
        own, synthetic: captions with the row of each in `text_embeddings`, (C, D).
    """

    augmentations: Sequence[Augmentation]
    image_embeddings: HalfArray
    own: Sequence[tuple[str, int]]
    synthetic: Sequence[tuple[str, int]]
    text_embeddings: HalfArray


class ReinforcedDataset(ViewDataset):
    """Views of reinforced pairs: one of the stored augmentations, and a caption, by (seed, epoch, index).

    The caption is one of the pair's own with a probability of a half, else a synthetic one: MobileCLIP gives both kinds
    the same weight.
    """

    def __init__(
        self,
        pairs: Reinforced,
        stored: StoredTeachers,
        student: Preprocessing,
        *,
        seed: int,
        views: int,
        max_bad: float,
    ) -> None:
        super().__init__(pairs, student, [], crops=Crops(scale=(1, 1)), seed=seed, views=views, max_bad=max_bad)
        self._reinforced, self._stored = pairs, stored

    def _read(self, view: View) -> PairView:
        index = view.sample
        rng = np.random.default_rng((self.seed, view.epoch, index))
        sample = read_sample(self._reinforced, index, self._stored)
        number = int(rng.integers(len(sample.augmentations)))
        captions = sample.synthetic if sample.synthetic and rng.random() < 0.5 else sample.own
        caption, row = captions[int(rng.integers(len(captions)))]
        image = augment(self.pairs.read(index).image(), sample.augmentations[number], size=self._stored.image_size)
        embeddings = sample.image_embeddings[number], sample.text_embeddings[row]
        (pixels,) = crop_levels(image, (0, 0, image.width, image.height), [self.student])
        return PairView(pixels, (), caption, teacher_embeddings=embeddings)


def reinforced_pairs(source: TrainingData, stored: StoredTeachers, reporter: Reporter) -> Reinforced:
    """Return the pairs of shards whose embeddings have the width of all stored teachers together."""
    if source.data is None or not names_shards(source.data):
        raise UsageError(
            f"Stored teachers were named, but the data are {shown_sources(source.data)}; expected WebDataset shards of "
            "reinforced samples.",
            hint="{data} 'store/{00000..00012}.tar', or name another {teacher}",
        )
    sources = parse_sources(source.data, source.train_data_upsampling_factors)
    pairs = Reinforced(source.data, sources, json_key=source.json_caption_key, reporter=reporter)
    width = int(_embeddings(pairs, 0)[_IMAGES].shape[-1])
    if width != sum(stored.widths):
        total = " + ".join(map(str, stored.widths))
        raise ConfigError(
            f"The stored embeddings of {pairs.name} have {width} numbers; expected {total}, those of the teachers "
            f"{', '.join(teacher.name for teacher in stored.teachers)}.",
            hint="set embedding_size of each teacher in the file after stored:",
        )
    return pairs


def read_sample(pairs: Reinforced, index: int, stored: StoredTeachers) -> ReinforcedSample:
    """Return what is stored of a pair; the embeddings of each teacher are made unit vectors."""
    augmentations, arrays = pairs.augmentations(index), _embeddings(pairs, index)
    images, texts = arrays[_IMAGES], arrays[_TEXTS]
    own, synthetic = list(pairs.read(index).captions), pairs.synthetic_captions(index)
    with _as_expected(pairs.embeddings(index)[0]):
        _require(len(images) == len(augmentations), f"{len(images)} embeddings for {len(augmentations)} augmentations")
        # Rows are those of text_emb, then those of each array of a key's own, in whatever order the keys come.
        beside, apart, rows, unknown = list[str](), list[str](), [texts], len(texts) - len(own)
        for key, captions in synthetic.items():
            array = arrays.get(key + _SUFFIX)
            if array is not None:
                _require(len(array) == len(captions), f"{len(array)} embeddings for {len(captions)} captions of {key}")
                rows.append(array)
                apart += captions
            elif unknown and unknown == len(captions):
                beside, unknown = list(captions), 0
            # Captions without embeddings, those of other keys than their generator was asked for, are of no use.
        may_be_more = len(own) == 1 and not synthetic
        _require(unknown == 0 or (unknown > 0 and may_be_more), f"{len(texts)} embeddings for {len(own)} captions")
        text_embeddings = np.concatenate(rows)
        numbered = list(zip([*own, *beside, *apart], range(len(text_embeddings)), strict=False))
        return ReinforcedSample(
            augmentations,
            _unit_parts(images, stored.widths),
            numbered[: len(own)],
            [(caption.strip(), row) for caption, row in numbered[len(own) :] if caption.strip()],
            _unit_parts(text_embeddings, stored.widths),
        )


def augment(image: Image.Image, augmentation: Augmentation, *, size: int) -> Image.Image:
    """Return what the teachers saw: a crop, resized to `size` pixels, and RandAugment's operations on it."""
    top, left, height, width, operations = augmentation
    with _as_expected(f"The augmentation {augmentation}"):
        _require(
            top + height <= image.height and left + width <= image.width,
            f"the image has {image.width} × {image.height} pixels, so that it is not the one that was augmented",
        )
        augmented: Any = F.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)
        for name, magnitude in operations:
            augmented = _apply_op(augmented, name, magnitude, InterpolationMode.NEAREST, None)
    return cast(Image.Image, augmented)


def _embeddings(pairs: Reinforced, index: int) -> dict[str, npt.NDArray[np.float32]]:
    member, is_torch = pairs.embeddings(index)
    with _as_expected(member):
        _require(member.size <= _MAX_BYTES, f"it has {member.size:,} bytes; the limit is {_MAX_BYTES:,}")
        content = io.BytesIO(member.read_bytes())
        arrays = _from_torch(content) if is_torch else read_npz(content, max_bytes=_MAX_BYTES, name=str(member))
        arrays = {name: array.astype(np.float32) for name, array in arrays.items() if name.endswith(_SUFFIX)}
        _require(_IMAGES in arrays and _TEXTS in arrays, f"it has no {_IMAGES}, or no {_TEXTS}")
    return arrays


def _from_torch(content: io.BytesIO) -> dict[str, npt.NDArray[Any]]:
    with gzip.GzipFile(fileobj=content) as file:
        unpacked = file.read(_MAX_BYTES + 1)
    _require(len(unpacked) <= _MAX_BYTES, f"it would take more than {_MAX_BYTES:,} bytes")
    # Only tensors and containers of them: any other content of a pickle could be code.
    tensors: Any = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    return {str(name): torch.as_tensor(value).float().numpy() for name, value in tensors.items()}


def _unit_parts(embeddings: npt.NDArray[np.float32], widths: Sequence[int]) -> HalfArray:
    width = sum(widths)
    _require(embeddings.ndim == 2 and embeddings.shape[1] == width, f"its embeddings have another width than {width}")
    parts = np.split(embeddings, np.cumsum(widths)[:-1], axis=1)
    norms = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    _require(all((norm > 0).all() and np.isfinite(norm).all() for norm in norms), "an embedding is zero or not finite")
    units: HalfArray = np.concatenate([part / norm for part, norm in zip(parts, norms, strict=True)], axis=1)
    return units.astype(np.float16)
