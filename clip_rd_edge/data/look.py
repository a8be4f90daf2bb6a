"""What a data set of image files holds before anything is trained on it: damage, duplicates, and a part to hold back.

Near-duplicates, such as a photograph that was resized and compressed again or two frames of a film, are found by a
perceptual hash: the 16 × 16 grey levels of an image, without their mean and contrast. The correlation of two hashes is
that of the images. All copies of an image are on one side of a division; otherwise, a test would contain what was
trained on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.bundle.encoder import in_batches
from clip_rd_edge.bundle.images import MAX_PIXELS, open_image, opened_image
from clip_rd_edge.data.folders import Folder
from clip_rd_edge.data.samples import Samples
from clip_rd_edge.data.tables import Table
from clip_rd_edge.errors import InputError, in_one_line
from clip_rd_edge.utils.files import sha256_of
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.text import SILENT, Reporter

HASH_EDGE = 16
NEAR = 0.985  # correlation of hashes; that of copies in JPEG of a third of the edge is above it
_FLAT = 2.0  # grey levels: the hash of an image with less contrast is nearly zero, and like no other
_DECODED_EDGE = 64  # at least; of a JPEG, so many pixels take a fraction of the time
_CHUNK = 1_024
CHOSEN_BY = 3  # one in so many held-out images is for choosing, the others for the report
MAX_HELD_OUT = 6_000
MAX_LOOKED_AT = 1_000
Part = Literal["train", "choose", "test"]
Hashes = npt.NDArray[np.float32]


class Seen(NamedTuple):
    """What is known of an image file: a digest of its bytes, its hash (256,), its size, or why it cannot be read."""

    digest: str
    hash: Hashes
    size: tuple[int, int] = (0, 0)
    problem: str = ""


def perceptual_hash(image: Image.Image) -> Hashes:
    """Return the hash of an RGB image, (256,) float32 of length 1, or less for an image without contrast."""
    grey = np.asarray(image.convert("L").resize((HASH_EDGE, HASH_EDGE), Image.Resampling.BOX), np.float32).ravel()
    grey -= grey.mean()
    return grey / max(float(np.linalg.norm(grey)), _FLAT * HASH_EDGE)


def see(path: Path) -> Seen:
    """Look at an image file."""
    try:
        image = open_image(path, min_edge=_DECODED_EDGE)
        # `image` may have been decoded at a fraction of its size.
        with opened_image(path, MAX_PIXELS) as header:
            return Seen(sha256_of(path), perceptual_hash(image), header.size)
    except (InputError, OSError) as error:
        return Seen("", np.zeros(HASH_EDGE**2, np.float32), problem=in_one_line(error))


def see_all(paths: Sequence[Path], *, reporter: Reporter = SILENT) -> list[Seen]:
    """Look at image files, with a thread for each core: Pillow decodes without Python's lock."""
    seen = list[Seen]()
    with ThreadPoolExecutor(usable_cores()) as threads:
        for one in threads.map(see, paths):
            seen.append(one)
            reporter.update("looking at the images", len(seen), len(paths))
    return seen


def near_pairs(first: Hashes, second: Hashes) -> Iterator[tuple[int, int]]:
    """Yield the rows of two sets of hashes, (N, 256) and (M, 256), that are of near-duplicates."""
    for chunk in in_batches(len(first), _CHUNK):
        rows, columns = np.nonzero(first[chunk] @ second.T > NEAR)
        yield from zip((rows + chunk.start).tolist(), columns.tolist(), strict=True)


def groups_of(seen: Sequence[Seen], keys: Sequence[str] = ()) -> list[int]:
    """Return the group number of each image: images with the same bytes, near-duplicates, or the same key.

    The number of a group is that of its first image. Images that cannot be read are alone.
    """
    above = list(range(len(seen)))

    def first(index: int) -> int:
        while above[index] != index:
            above[index] = above[above[index]]
            index = above[index]
        return index

    def join(one: int, other: int) -> None:
        low, high = sorted((first(one), first(other)))
        above[high] = low

    same = dict[str, int]()
    for index, (own, key) in enumerate(zip(seen, keys or [""] * len(seen), strict=True)):
        for name in filter(None, (own.digest, key and f"\0{key}")):
            join(index, same.setdefault(name, index))
    hashes = np.stack([own.hash for own in seen]) if seen else np.zeros((0, HASH_EDGE**2), np.float32)
    for one, other in near_pairs(hashes, hashes):
        if one < other:
            join(one, other)
    return [first(index) for index in range(len(seen))]


def hold_back(
    seen: Sequence[Seen], groups: Sequence[int], classes: Sequence[str], share: float, chosen_by: int = CHOSEN_BY
) -> list[Part]:
    """Return the part of each image: most are for training, some to choose a student, others only for the report.

    Whole groups are held back, in the order of a digest, so that the same images are held back whenever the rest of the
    data changes a little. Of each class with three images or more, at least one is held back, and at most half.

    Args:
        groups: of `groups_of`.
        classes: the class of each image; one class for all where there are none.
        share: of the images that can be read; of many images it is less, see MAX_HELD_OUT.
        chosen_by: one in this many is for choosing; 0 for none.
    """
    parts: list[Part] = ["train"] * len(seen)
    members, readable = dict[int, list[int]](), [index for index, own in enumerate(seen) if not own.problem]
    for index in readable:
        members.setdefault(groups[index], []).append(index)
    share = min(share, MAX_HELD_OUT / max(len(readable), 1))

    def order(group: int) -> str:
        return min(seen[index].digest for index in members[group])

    def class_of(group: int) -> str:
        return classes[members[group][0]]

    for _, of_class in groupby(sorted(members, key=lambda group: (class_of(group), order(group))), key=class_of):
        rows = [members[group] for group in of_class]
        count = sum(map(len, rows))
        wanted = max(round(share * count), 1) if count >= 3 else 0
        held = 0
        for own in rows:
            if held >= wanted:
                break
            if held + len(own) <= count // 2:
                number = int(min(seen[index].digest for index in own)[-8:], 16)
                part: Part = "choose" if chosen_by and number % chosen_by == 0 else "test"
                for index in own:
                    parts[index] = part
                held += len(own)
    return parts


def overlap(
    trained: Sequence[Path], evaluated: Sequence[Path], *, reporter: Reporter = SILENT
) -> tuple[list[tuple[Path, Path]], int]:
    """Return which images of a task are trained on, as they are or as near-duplicates, and how many were looked at.

    Of many images, a random part is drawn, always the same: MAX_LOOKED_AT of the task and four times as many others.
    """
    draw = random.Random(0)
    first, second = (
        list(paths) if len(paths) <= most else draw.sample(list(paths), most)
        for paths, most in ((trained, 4 * MAX_LOOKED_AT), (evaluated, MAX_LOOKED_AT))
    )
    seen, other = see_all(first, reporter=reporter), see_all(second, reporter=reporter)
    digests = {one.digest: number for number, one in enumerate(seen) if one.digest}
    found = {number: digests[one.digest] for number, one in enumerate(other) if one.digest in digests}
    if seen and other:
        for row, column in near_pairs(*(np.stack([one.hash for one in part]) for part in (seen, other))):
            found.setdefault(column, row)
    return [(first[row], second[column]) for column, row in sorted(found.items())], len(second)


def image_paths(samples: Samples) -> list[Path]:
    """Return the files of those samples that are files."""
    if isinstance(samples, Table):
        return [samples.pair(index).path for index in range(len(samples))]
    return list(samples.images) if isinstance(samples, Folder) else []
