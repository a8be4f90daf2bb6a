"""What a model is trained on, whatever its source: images with captions, images alone, and texts alone."""

from __future__ import annotations

import atexit
import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from clip_rd_edge.bundle.images import ImageFile, open_image
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.files import machine_failure
from clip_rd_edge.utils.outputs import exclusive_writer, new_folder
from clip_rd_edge.utils.paths import cache_home
from clip_rd_edge.utils.text import as_unicode

GROUP_ROWS = 4096
"""Image files that are shuffled as a group: they lie apart, so that any block of them serves."""
INDEX = "index.json"  # written last into the folder of an index
MAX_EXAMPLES = 20  # messages about single samples that are kept; of the others there is the number
MAX_BAD_SHARE = 0.01  # of all samples
_PAUSE_S = 2.0  # most errors of networks and disks pass
T = TypeVar("T")


class Sample(NamedTuple):
    """An image with one or more equivalent captions, of which training picks one per view; or only one of the two.

    Attributes:
        captions: empty in a source of images alone.
        file: the image; None for a text alone.
        paired: whether the captions are this image's and no other's.
    """

    captions: tuple[str, ...]
    file: ImageFile | None
    paired: bool = True

    def image(self) -> Image.Image:
        """Return the image as RGB, of a sample that has one; raises InputError if it cannot be read."""
        assert self.file is not None
        return open_image(self.file)


class Counts(NamedTuple):
    """How many pairs there are, images without captions, and texts; and for class folders, of how many classes."""

    pairs: int = 0
    images: int = 0
    texts: int = 0
    classes: int = 0

    @property
    def is_mixed(self) -> bool:
        """Whether there is anything but pairs."""
        return bool(self.images or self.texts)

    @property
    def has_images(self) -> bool:
        """Whether each row has an image: always, unless there are only texts."""
        return bool(self.pairs or self.images)

    def recorded(self) -> dict[str, int]:
        """Return what goes into a run's record: `pairs` alone, if that is all."""
        mixed = {"images": self.images, "texts": self.texts} if self.is_mixed else {}
        return {"pairs": self.pairs, **mixed, **({"classes": self.classes} if self.classes else {})}

    def __str__(self) -> str:
        """Return such as `900 images without captions and 12 texts`, or `900 images of 12 classes`."""
        words = {"pairs": "pair{}", "images": "image{} without captions", "texts": "text{}"}
        if self.classes:
            words["pairs"] = f"image{{}} of {self.classes:,} classes"
        named = [(getattr(self, kind), word) for kind, word in words.items() if getattr(self, kind)]
        parts = [f"{count:,} {word.format('s' * (count != 1))}" for count, word in named]
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


class Problems(msgspec.Struct, frozen=True):
    """What a source holds that is not a sample, such as a row whose image does not exist.

    Attributes:
        count: how many there are.
        examples: messages that name the place and the reason of the first ones.
        lost: about how many further samples are in damaged parts, of which nothing else is known.
        hint: what to do about them, or empty.
    """

    count: int = 0
    examples: tuple[str, ...] = ()
    lost: int = 0
    hint: str = ""

    @classmethod
    def of(cls, messages: Sequence[str], *, count: int | None = None, hint: str = "") -> Problems:
        """Return the problems that these messages name, or of which these are the first."""
        examples = tuple(map(as_unicode, messages[:MAX_EXAMPLES]))
        count = len(messages) if count is None else count
        return cls(count, examples, hint=hint if count else "")

    @property
    def total(self) -> int:
        """About how many samples there would be without the problems."""
        return self.count + self.lost

    @property
    def sentence(self) -> str:
        """How many were left out and why the first, after a space; empty if none."""
        return f" {self.count:,} were left out; the first: {self.examples[0]}." if self.count else ""

    def __add__(self, other: Problems) -> Problems:
        examples = (*self.examples, *other.examples)[:MAX_EXAMPLES]
        return Problems(self.count + other.count, examples, self.lost + other.lost, self.hint or other.hint)


NO_PROBLEMS = Problems()


class Samples(Protocol):
    """N samples. Any process can read any of them at any time, so a batch depends only on the seed and the step.

    Attributes:
        name: as shown in logs and provenance.
        counts: of what kinds the samples are.
        groups: numbers of consecutive samples that are stored together, such as those of each shard; see
            `data.order.EpochOrder` for those in several parts.
        problems: what the source holds beside them.
    """

    @property
    def name(self) -> str: ...

    @property
    def counts(self) -> Counts: ...

    @property
    def groups(self) -> Sequence[int] | npt.NDArray[np.int64]: ...

    @property
    def problems(self) -> Problems: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """Return a sample; raises InputError if its captions cannot be read. The image is read when it is opened."""
        ...

    def prefetch(self, groups: Sequence[int]) -> None:
        """Begin to fetch what these groups are read from, if that is elsewhere; returns at once."""
        ...

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify these samples and their order; a copy in another folder yields the same.

        Names without folders, captions and sizes in bytes, as far as they are known without reading samples.
        """
        ...


class LocalFiles(Sized):
    """What image files on this machine have in common as `Samples`: they lie apart, and need not be fetched."""

    @property
    def groups(self) -> Sequence[int]:
        """Sizes of blocks of rows."""
        return [min(GROUP_ROWS, len(self) - start) for start in range(0, len(self), GROUP_ROWS)]

    def prefetch(self, groups: Sequence[int]) -> None:
        """Do nothing."""


def fingerprint(samples: Samples) -> str:
    """Return a SHA-256 of what identifies the samples, wherever they lie.

    No sample is read, so that a run over millions of them starts at once: an image that is replaced by another one of
    the same name and size in bytes is not noticed.
    """
    digest = hashlib.sha256(f"{len(samples)}\n".encode())
    for part in samples.identity():
        digest.update(part + b"\x1e")
    return digest.hexdigest()


def require_batch(samples: Samples, batch_size: int, *, processes: int = 1) -> None:
    """Check that a batch has negatives, that there are enough samples to fill it, and that processes can share it."""
    if not 2 <= batch_size <= len(samples) or batch_size % processes:
        shared = f", and a multiple of the {processes} processes" if processes > 1 else ""
        raise UsageError(
            f"The batch size is {batch_size:,}; expected at least 2, and at most the {len(samples):,} "
            f"{'samples' if samples.counts.is_mixed else 'pairs'} of {samples.name}{shared}.",
            hint=f"{{batch_size}} {len(samples) // processes * processes} or less",
            option="batch_size",
        )


def require_images(samples: Samples) -> None:
    """Raise a UsageError if there are texts alone."""
    if not samples.counts.has_images:
        raise UsageError(
            "There are texts alone, but a teacher's store holds embeddings of images.",
            hint="name images: {images} FOLDER, or {data} PAIRS; a run on texts alone needs no store",
            option="store",
        )


BadPair = tuple[int, str]  # index and reason


def read_twice(read: Callable[[int], T], index: int) -> T:
    """Return `read(index)`; a sample that the machine fails to deliver is not a bad one: it is read once more."""
    try:
        return read(index)
    except InputError as error:
        if machine_failure(error) is None:
            raise
    time.sleep(_PAUSE_S)
    try:
        return read(index)
    except InputError as error:
        raise machine_failure(error) or error from error


class BadSamples:
    """Counts bad samples: the problems of a source, and the samples that fail when they are read."""

    def __init__(self, samples: Samples, *, max_share: float = MAX_BAD_SHARE) -> None:
        self._samples, self._max_share = samples, max_share
        self._reasons: dict[int, str] = {}  # by the index of the bad sample
        self._shared = 0  # of these, the number that all processes know
        self._total = len(samples) + samples.problems.total
        self.allowed = math.floor(max_share * self._total)
        self._check(samples.problems.examples)

    def __len__(self) -> int:
        return self._samples.problems.total + len(self._reasons)

    @property
    def unshared(self) -> int:
        """Number of bad samples not yet shared with the other processes."""
        return len(self._reasons) - self._shared

    @property
    def summary(self) -> str:
        """Number of samples that cannot be read and the reason of the first, as a sentence; empty if there are none."""
        if not self._reasons:
            return ""
        count, first = len(self._reasons), next(iter(self._reasons.values()))
        are = "pair cannot be read and is" if count == 1 else "pairs cannot be read and are"
        return f"{count:,} of {len(self._samples):,} {are} left out; the first: {first}"

    def add(self, bad: Iterable[BadPair]) -> None:
        """Count bad samples, each only once."""
        new = {index: reason for index, reason in bad if index not in self._reasons}
        self._reasons.update(new)
        self._check(tuple(new.values()))

    def share(self, gather: Callable[[list[BadPair]], list[list[BadPair]]]) -> None:
        """Count the bad samples of all processes. Over the epochs, each process meets the same ones: they count once.

        Args:
            gather: returns what each process passes to it.
        """
        own = list(islice(self._reasons.items(), self._shared, None))
        bad = list(chain.from_iterable(gather(own)))
        self._reasons.update(bad)
        self._shared = len(self._reasons)
        self._check([reason for _, reason in bad[-1:]])

    def next_valid(self, index: int, read: Callable[[int], T]) -> tuple[T | None, tuple[BadPair, ...]]:
        """Return the first sample from `index` on that `read` reads without an InputError.

        Returns:
            What `read` returned, or None if the bad samples exceed the limit; and the bad samples. They are not counted
            yet: this may run in a worker process, and `add` must be called in the main process.
        """
        bad: list[BadPair] = []
        while len(bad) <= self.allowed:
            candidate = (index + len(bad)) % len(self._samples)
            try:
                return read_twice(read, candidate), tuple(bad)
            except InputError as error:
                bad.append((candidate, str(error)))
        return None, tuple(bad)

    def take(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """Return image and captions of the first valid sample from `index` on, and count the bad ones."""

        def read(index: int) -> tuple[Image.Image, tuple[str, ...]]:
            sample = self._samples.read(index)
            return sample.image(), sample.captions

        found, bad = self.next_valid(index, read)
        self.add(bad)
        assert found is not None  # otherwise the limit was exceeded and `add` has raised
        return found

    def _check(self, latest: Sequence[str]) -> None:
        bad = len(self)
        if bad <= self.allowed or not latest:
            return
        hint = "check the source: half of it or more is unusable"
        if bad <= self._total / 2:
            hint = f"fix or remove them, or accept them: {{max_bad}} {math.ceil(100 * bad / self._total) / 100:g}"
        raise InputError(
            f"{bad:,} of {self._total:,} samples of {self._samples.name} are bad, more than {self._max_share:.2%}: "
            f"{latest[0].rstrip('.')}.",
            hint="; ".join(filter(None, (hint, self._samples.problems.hint))),
        )


def kept_index(kind: str, identity: Iterable[str], build: Callable[[Path], None]) -> Path:
    """Return the folder of an index: the one in the cache, or else one that is built now.

    Several processes that need the same index build it once. Where the cache is full or read-only, the index
    lasts as long as this process.

    Args:
        kind: name of the folder of all such indices.
        identity: texts that identify the index.
        build: fills an empty folder; the file INDEX is written last.
    """
    key = hashlib.sha256("\n".join(identity).encode(errors="surrogateescape")).hexdigest()[:32]
    folder = cache_home() / kind / key
    try:
        if not (folder / INDEX).is_file():
            with exclusive_writer(folder.with_suffix(".lock.d"), on_wait=lambda message: None):
                if not (folder / INDEX).is_file():
                    with new_folder(folder) as new:
                        build(new)
    except InputError:  # about the data
        raise
    except (OSError, UsageError):  # the cache cannot be read or written
        folder = Path(tempfile.mkdtemp(prefix="clip-rd-edge-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        build(folder)
    return folder


class Stored:
    """Bytes in memory, or those of a file, mapped into memory: a process that receives a copy maps them itself."""

    def __init__(self, source: bytes | Path) -> None:
        self._source = source
        self.view = memoryview(b"") if isinstance(source, Path) else memoryview(source)
        if isinstance(source, Path) and source.stat().st_size:  # an empty one cannot be mapped
            self.view = np.memmap(source, np.uint8, mode="r").data

    def __reduce__(self) -> tuple[type[Stored], tuple[bytes | Path]]:
        return Stored, (self._source,)

    def damage(self, number: int) -> ConfigError:
        """Return the error for a pair, counted from 0, whose entry has changed since it was written."""
        place = self._source.parent if isinstance(self._source, Path) else "in memory"
        return ConfigError(
            f"The index {place} is damaged: its entry of pair {number:,} has changed since it was written.",
            hint="delete it; it is made again",
        )
