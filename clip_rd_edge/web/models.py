"""The bundles that the page can switch between, and what they say of pictures."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from clip_rd_edge.contract.bundle import MANIFEST, read_manifest
from clip_rd_edge.contract.images import open_image
from clip_rd_edge.contract.preprocess import preprocess
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.embed import open_image_tower
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import load

MAX_PIXELS = 50_000_000  # of a picture that is sent: a phone's camera has up to that
MAX_LABELS = 2_000
MAX_LABEL_LENGTH = 300  # characters
BANK_SHOWN = 20
_REMEMBERED = 8  # sets of labels a bundle


class GoneError(InputError):
    """A bundle that the page was started with is no longer where it was."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the page shows of a bundle; `bank` is how many labels it brings."""

    name: str
    folder: str
    precision: str
    size_bytes: int
    bank: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle says of a picture; labels likeliest first, by their place in the list, and their probabilities."""

    labels: list[str]
    probabilities: list[float]
    open_ms: float
    model_ms: float


@dataclass(frozen=True)
class _Bytes:
    """A picture that was sent, as `open_image` takes it."""

    content: bytes

    def read_bytes(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return "that was sent"


class Model:
    """A bundle that is opened when it is first asked, and again when it was exported anew."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self.folder = folder
        self._threads = threads
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._encoder: BundleEncoder
        self._classifiers: OrderedDict[str, ZeroShotClassifier] = OrderedDict()
        read_manifest(folder)  # says what is wrong with a folder that never was a bundle
        self._facts = self._describe(self.encoder())

    def encoder(self) -> BundleEncoder:
        """The encoder of what is in the folder now.

        Raises:
            GoneError: the bundle was removed.
        """
        try:
            stat = (self.folder / MANIFEST).stat()
        except OSError as error:
            raise GoneError(f"The bundle {self.folder} is no longer there.", hint="export it again") from error
        with self._lock:
            if self._stamp != (stat.st_mtime_ns, stat.st_size):
                self._encoder = load(self.folder, threads=self._threads)
                open_image_tower(self._encoder)
                self._classifiers.clear()
                self._stamp = (stat.st_mtime_ns, stat.st_size)
            return self._encoder

    def facts(self) -> Facts:
        """What the page shows; of a bundle that is gone, what it was."""
        with suppress(ClipRdEdgeError):
            self._facts = self._describe(self.encoder())
        return self._facts

    def answer(self, content: bytes, labels: Sequence[str] | None) -> Answer:
        """Classify a picture's file among labels; None takes the bundle's own, and gives the BANK_SHOWN likeliest.

        Raises:
            InputError: it is no picture, or of more than MAX_PIXELS.
        """
        encoder = self.encoder()
        classifier = self._classifier(encoder, labels)
        began = time.perf_counter()
        _refuse_large(content)
        pixels = preprocess(open_image(_Bytes(content)), encoder.manifest.preprocessing)[None]
        opened = time.perf_counter()
        embeddings = encoder.encode_pixels(pixels)
        (best,) = classifier.classify_embeddings(embeddings, top=BANK_SHOWN if labels is None else len(labels))
        done = time.perf_counter()
        return Answer(
            labels=[prediction.label for prediction in best],
            probabilities=[round(prediction.probability, 5) for prediction in best],
            open_ms=(opened - began) * 1e3,
            model_ms=(done - opened) * 1e3,
        )

    def _describe(self, encoder: BundleEncoder) -> Facts:
        description = encoder.describe()
        bank = encoder.label_bank
        return Facts(
            name=description.name,
            folder=self.folder.resolve().name,
            precision=description.precision,
            size_bytes=description.size_bytes,
            bank=len(bank.names) if bank else 0,
        )

    def _classifier(self, encoder: BundleEncoder, labels: Sequence[str] | None) -> ZeroShotClassifier:
        key = label_key(labels) if labels is not None else ""
        with self._lock:
            known = self._classifiers.get(key)
            if known is None:
                known = self._classifiers[key] = ZeroShotClassifier(encoder, labels, cache=False)
            self._classifiers.move_to_end(key)
            while len(self._classifiers) > _REMEMBERED:
                self._classifiers.popitem(last=False)
            return known


class LabelSets:
    """The labels that pages sent lately, by key, so that a camera's every frame need not bring a thousand of them."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._sets: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def add(self, labels: Sequence[Any]) -> str:
        """Keep labels; returns their key.

        Raises:
            InputError: none, too many, an empty or a too long one, or something that is no text.
        """
        if not labels:
            raise InputError("There are no labels.")
        if len(labels) > MAX_LABELS:
            raise InputError(f"There are {len(labels):,} labels; at most {MAX_LABELS:,} are taken.")
        for number, label in enumerate(labels, start=1):
            if not isinstance(label, str) or not label.strip():
                raise InputError(f"Label {number} of {len(labels)} is no text.")
            if len(label) > MAX_LABEL_LENGTH:
                raise InputError(f"Label {number} has {len(label):,} characters; at most {MAX_LABEL_LENGTH} are taken.")
        key = label_key(labels)
        self._sets[key] = tuple(labels)
        self._sets.move_to_end(key)
        while len(self._sets) > self._most:
            self._sets.popitem(last=False)
        return key

    def get(self, key: str) -> tuple[str, ...] | None:
        """The labels of that key, or None where they are no longer known."""
        return self._sets.get(key)


def label_key(labels: Sequence[str]) -> str:
    """A name for a list of labels by its content."""
    return hashlib.sha256(msgspec.json.encode(list(labels))).hexdigest()[:32]


def _refuse_large(content: bytes) -> None:
    # The header alone tells the size; open_image has a limit, too, but one for machines with more memory.
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.width * image.height
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return  # open_image says what is wrong with it
    if pixels > MAX_PIXELS:
        raise InputError(
            f"The picture has {pixels / 1e6:,.0f} megapixels; at most {MAX_PIXELS // 1_000_000} are taken."
        )
