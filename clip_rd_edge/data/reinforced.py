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

D is the sum of the teachers' widths. What the shards do not say is in a file of `StoredTeachers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from clip_rd_edge.bundle.manifest import MAX_EMBEDDING_SIZE
from clip_rd_edge.bundle.preprocess import MAX_EDGE
from clip_rd_edge.data.shard_files import TarMember
from clip_rd_edge.data.webdataset import Shards, read_json_member
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.structs import CheckedError, CheckedStruct, PositiveFloat, read_json
from clip_rd_edge.utils.text import is_unicode

STORED = "stored:"  # before the path of a file of StoredTeachers, in the place of a teacher
# RandAugment's operations in the order of their numbers, which is that of torchvision.
OPERATIONS = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)


_MAX_MAGNITUDE = 10_000  # pixels of a translation are the largest


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
        share_text: the teachers have one text tower; see `losses.ensemble`.
    """

    teachers: Annotated[tuple[StoredTeacher, ...], Meta(min_length=1)]
    image_size: Annotated[int, Meta(ge=1, le=MAX_EDGE)] = 224
    share_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share_text and len(set(self.widths)) > 1:
            sizes = " and ".join(map(str, self.widths))
            raise CheckedError(f"share_text is true, but the teachers have the embedding sizes {sizes}; expected one")

    @property
    def widths(self) -> tuple[int, ...]:
        """Embedding size of each teacher."""
        return tuple(teacher.embedding_size for teacher in self.teachers)

    @property
    def logit_scales(self) -> tuple[float, ...]:
        """Logit scale of each teacher."""
        return tuple(teacher.logit_scale for teacher in self.teachers)


def read_stored_teachers(path: Path) -> StoredTeachers:
    """Read a file that says whose embeddings are stored."""
    if not path.is_file():
        raise InputError(
            f"The file {path} of stored teachers does not exist.",
            hint="write one with the name, embedding_size and logit_scale of each teacher; see the guide",
        )
    return read_json(path, StoredTeachers)


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
        shard, located = self.locate(index)
        member = TarMember(shard, "", *located.augmentations)
        try:
            content = read_json_member(member)
            parameters = content["param_aug"]
            if isinstance(parameters, str):
                parameters = msgspec.json.decode(parameters)
            augmentations = tuple(map(_augmentation, parameters))
        except (TypeError, KeyError, ValueError, OverflowError, msgspec.DecodeError, RecursionError) as error:
            raise InputError(
                f"{member} is not as expected: param_aug as a list of [[top, left, height, width], [[operation, "
                "magnitude], …]] for each augmentation."
            ) from error
        if not augmentations:
            raise InputError(f"{member} has no augmentations.")
        return augmentations

    def synthetic_captions(self, index: int) -> dict[str, tuple[str, ...]]:
        """Return a pair's synthetic captions by their key, as they are; raises InputError if they cannot be read."""
        shard, located = self.locate(index)
        if located.synthetic[0] < 0:
            return {}
        member = TarMember(shard, "", *located.synthetic)
        content = read_json_member(member)
        if not isinstance(content, dict):
            raise InputError(f"{member} is not a JSON object.")
        captions = {key: value for key, value in content.items() if isinstance(value, list)}
        texts = [text for value in captions.values() for text in value]
        if not all(isinstance(text, str) and is_unicode(text) for text in texts):
            raise InputError(f"{member} has captions that are no texts.")
        return {key: tuple(value) for key, value in captions.items()}

    def embeddings(self, index: int) -> tuple[TarMember, bool]:
        """Return the file with a pair's embeddings, and whether it is a .pth.gz and not a .npz."""
        shard, located = self.locate(index)
        return TarMember(shard, "", *located.embeddings), located.is_torch


def _augmentation(parameters: Any) -> Augmentation:
    crop, operations = parameters
    top, left, height, width = (int(value) for value in crop)
    if min(top, left) < 0 or min(height, width) < 1:
        raise ValueError(crop)
    named = []
    for number, magnitude in operations or ():
        if not 0 <= number < len(OPERATIONS) or not abs(magnitude) <= _MAX_MAGNITUDE:
            raise ValueError(number, magnitude)
        named.append((OPERATIONS[number], float(magnitude)))
    return Augmentation(top, left, height, width, tuple(named))
