"""Base class of the bundle encoders: preprocessing, tokenisation and batching, common to all runtimes."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import Description, Embeddings, as_list, image_batch_size, in_batches, require_finite
from clip_rd_edge.bundle.images import ImageInput, as_rgb
from clip_rd_edge.bundle.labels import LabelBank, Taught, in_words, read_labels, read_taught
from clip_rd_edge.bundle.manifest import (
    BACKGROUND,
    KNOWN,
    LABELS,
    TAUGHT,
    TOKENIZER,
    Manifest,
    Tower,
    require_intact,
    require_intact_tower,
)
from clip_rd_edge.bundle.preprocess import preprocess, to_uint8
from clip_rd_edge.bundle.tokenizer import Tokenizer
from clip_rd_edge.errors import ConfigError, InputError, UsageError, in_one_line, near_matches
from clip_rd_edge.utils.files import size_bytes
from clip_rd_edge.utils.process import NativeCall
from clip_rd_edge.utils.text import printable

AUTO = "auto"  # the device that a runtime chooses
BATCH_SIZE = 32
MAX_THREADS = 1_024  # each takes memory, and hundreds of thousands take minutes to start
_SESSIONS = "_image_session", "_text_session"
_WITH_TEXT = "export the model again, with its text tower or with --labels"


class Placement(NamedTuple):
    """Where a loaded tower runs.

    Attributes:
        runtime, device: what runs it.
        fallback: why it does not run where it was meant to, or empty.
        hint: what to do about that, or empty.
    """

    runtime: str
    device: str
    fallback: str = ""
    hint: str = ""


@dataclass(frozen=True)
class RunOptions:
    """How to run a bundle; each runtime takes what applies to it.

    Attributes:
        threads: threads per tower; None leaves the choice to the runtime.
        device: one of `backends.onnxruntime.DEVICES`.
        spin: as for `backends.onnxruntime.open_session`.
        required: fail rather than fall back to another runtime.
    """

    threads: int | None = None
    device: str = AUTO
    spin: bool = True
    required: bool = False


class BundleEncoder(ABC):
    """An `Encoder` for a bundle; each runtime's subclass implements `open_tower`. See `runtime.load`.

    Attributes:
        force: see `runtime.load.load`.
    """

    runtime: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = (AUTO, "cpu")  # that it takes
    force = False

    def __init__(self, folder: Path, manifest: Manifest, options: RunOptions | None = None) -> None:
        self.folder = folder.absolute()  # towers are opened on first use, when the working folder may be another one
        self.manifest = manifest
        self.options = options or RunOptions()
        self._placements: dict[str, Placement] = {}  # of the loaded towers, by file name
        if self.options.device not in self.devices:
            raise UsageError(
                f"The runtime {self.runtime} has no device {self.options.device!r}; expected one of "
                f"{', '.join(self.devices)}."
            )

    @property
    def threads(self) -> int | None:
        return self.options.threads

    def __getstate__(self) -> dict[str, object]:
        """Return what pickle or copy takes; the process or copy that gets it opens the towers itself."""
        opened = (*_SESSIONS, "_tokenizer")
        return {name: value for name, value in vars(self).items() if name not in opened}

    @abstractmethod
    def open_tower(self, tower: Tower) -> Any:
        """Open a tower's file; return an object with the method `run(names, feed)` of an ONNX Runtime session."""

    def device_for(self, tower: Tower) -> str:
        """Return the device that a tower is meant to run on."""
        return "cpu"

    def placement(self, tower: Tower) -> Placement:
        """Return where a tower really runs, or before it is loaded, where it is meant to."""
        return self._placements.get(tower.file) or Placement(self.runtime, self.device_for(tower))

    def int8_fault(self, tower: Tower) -> str:
        """Return why a tower's INT8 gives wrong answers where it runs, and what to do, or an empty string."""
        placement = self.placement(tower)
        # ONNX Runtime's provider for OpenVINO runs on the CPU, too, in kernels of its own.
        runtime = {"cpu": placement.runtime, "openvino": "openvino"}.get(placement.device, "")
        if not runtime:
            return ""
        from clip_rd_edge.runtime.backends.onnxruntime import int8_fault  # late: it imports this module

        return int8_fault(tower.instruction_sets, runtime=runtime)

    def describe(self) -> Description:
        """Describe this encoder; `precision`, `runtime` and `device` name both towers' if they differ."""
        manifest = self.manifest
        placements = [self.placement(tower) for tower in manifest.towers.values()]
        return Description(
            name=manifest.name,
            runtime=" + ".join(dict.fromkeys(placement.runtime for placement in placements)),
            device=" + ".join(dict.fromkeys(placement.device for placement in placements)),
            precision=manifest.precision,
            embedding_size=manifest.embedding_size,
            preprocessing=manifest.preprocessing,
            logit_scale=manifest.logit_scale,
            logit_bias=manifest.scoring.bias,
            calibration=manifest.features.calibration if manifest.features else None,
            templates=manifest.templates,
            parameters=manifest.parameters,
            size_bytes=size_bytes(self.folder),
        )

    @cached_property
    def label_bank(self) -> LabelBank | None:
        """The bundle's precomputed labels and their embeddings, or None."""
        return self._stored_bank(LABELS, taught=self.manifest.taught)

    @cached_property
    def background(self) -> Embeddings | None:
        """The stored embeddings of common nouns, (K, D), or None; see `bundle.encoder.Scoring.matches`."""
        bank = self._stored_bank(BACKGROUND)
        return bank.embeddings if bank else None

    @cached_property
    def known_images(self) -> Embeddings | None:
        """The stored embeddings of the images that answers were calibrated on, (n, D), or None."""
        calibration = self.describe().calibration
        bank = self._stored_bank(KNOWN, rows=len(calibration.curve)) if calibration else None
        return bank.embeddings if bank else None

    def _stored_bank(self, name: str, *, taught: Sequence[str] = (), rows: int | None = None) -> LabelBank | None:
        require_intact(self.folder, self.manifest, name)
        bank = read_labels(self.folder, name=name)
        # Removed since the manifest was read, or unchecked.
        fits = not self.manifest.files or (bank is not None) == (name in self.manifest.files)
        if bank is not None:
            shape = (len(bank.names) if rows is None else rows, self.manifest.embedding_size + bool(taught))
            fits = fits and bank.embeddings.shape == shape and set(taught) <= set(bank.names)
        if not fits:
            raise ConfigError(f"{self.folder / name} does not fit the manifest.", hint="export the bundle again")
        return bank and msgspec.structs.replace(bank, taught=taught)

    @cached_property
    def taught(self) -> Taught | None:
        if not self.manifest.taught:
            return None
        require_intact(self.folder, self.manifest, TAUGHT)
        taught = read_taught(self.folder / TAUGHT, size=self.manifest.embedding_size)
        if taught.names != self.manifest.taught or taught.model != image_key(self.manifest):
            raise ConfigError(
                f"{self.folder / TAUGHT} does not fit this bundle: it has other labels, or another model's images.",
                hint="copy the bundle again, or teach it again from the images",
            )
        return taught

    @property
    def text_key(self) -> str:
        """A key that changes when text embeddings may change; empty if they are not worth keeping.

        They are not if the manifest lacks the checksums for a key, or the text tower's INT8 gives wrong answers here,
        which other processors of the same user would repeat. It changes when the text tower is loaded and does not run
        where it was meant to.
        """
        manifest, text = self.manifest, self.manifest.text
        files = [manifest.files.get(name, "") for name in (*manifest.files_of(text), TOKENIZER)] if text else []
        if text is None or not all(files) or self.int8_fault(text):
            return ""
        placement = self.placement(text)
        where = (placement.runtime, placement.device, text.precision)
        content = msgspec.json.encode((files, manifest.tokenizer, where, text.one_at_a_time))
        return hashlib.sha256(content).hexdigest()

    @property
    def has_text_tower(self) -> bool:
        """Whether this bundle embeds texts, beyond the labels of its bank."""
        return self.manifest.text is not None

    def stored_label_embeddings(self, labels: Sequence[str], templates: Sequence[str]) -> Embeddings:
        """Return the label bank's embeddings of these labels, (C, D), for a bundle without a text tower."""
        bank, own, near = self.label_bank, self.manifest.templates, ""
        if bank is None:
            has = "no labels: it embeds images alone"
        elif tuple(templates) != own:
            has = f"labels with {in_words(own)} alone"
        elif (embeddings := bank.find(labels)) is not None:
            return embeddings
        else:
            unknown = next(label for label in labels if label not in bank.names)
            has = f"no {unknown!r} among its {len(bank.names):,} labels"
            near = near_matches(unknown, bank.names)
        raise InputError(f"The bundle of {self.manifest.name} has no text tower and {has}.{near}", hint=_WITH_TEXT)

    def require_right(self, tower: Tower) -> None:
        """Refuse a tower whose INT8 gives wrong answers here with a UsageError; with `force`, warn of it."""
        if not (reason := self.int8_fault(tower)):
            return
        fault = f"{tower.file} of {self.manifest.name} gives wrong answers here: {reason}."
        if not self.force:
            raise UsageError(fault, hint="do so, or use a device where clip-rd-edge verify passes, or {force}")
        warn(fault)

    def encode_images(self, images: Sequence[ImageInput]) -> Embeddings:
        if self.manifest.image.preprocesses:
            run = partial(self._run, self._image_session, self.manifest.image)
            return self._run_batches(run, (np.asarray(as_rgb(image))[None] for image in images))
        preprocessing = self.manifest.preprocessing
        batches = in_batches(len(images), image_batch_size(BATCH_SIZE, preprocessing))
        pixels = (np.stack([preprocess(as_rgb(image), preprocessing) for image in images[batch]]) for batch in batches)
        return self._run_batches(self.encode_pixels, pixels)

    def encode_pixels(self, pixels: npt.NDArray[np.float32]) -> Embeddings:
        if self.manifest.image.preprocesses:
            # The graph takes bytes: undo the normalisation. They have the final size already, so it does not resize.
            images = to_uint8(pixels, self.manifest.preprocessing)
            run = partial(self._run, self._image_session, self.manifest.image)
            return self._run_batches(run, (image[None] for image in images))
        return self._run(self._image_session, self.manifest.image, pixels)

    def encode_texts(self, texts: str | Sequence[str]) -> Embeddings:
        texts = as_list(texts)
        ids = (self.tokenize(texts[batch]) for batch in in_batches(len(texts), BATCH_SIZE))
        return self._run_batches(self.encode_ids, ids)

    def encode_ids(self, ids: npt.NDArray[np.int64]) -> Embeddings:
        return self._run(self._text_session, self.manifest.require_text(), ids)

    def tokenize(self, texts: str | Sequence[str]) -> npt.NDArray[np.int64]:
        return self._tokenizer(as_list(texts))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        self.manifest.require_text()
        require_intact(self.folder, self.manifest, TOKENIZER)
        return Tokenizer(self.folder / TOKENIZER, self.manifest.tokenizer)

    @cached_property
    def _image_session(self) -> Any:
        return self._open_intact(self.manifest.image)

    @cached_property
    def _text_session(self) -> Any:
        return self._open_intact(self.manifest.require_text())

    def _open_intact(self, tower: Tower) -> Any:
        require_intact_tower(self.folder, self.manifest, tower)
        with NativeCall():
            session = self.open_tower(tower)
        _opened.add(self)
        self.require_right(tower)
        return session

    def _run(self, session: Any, tower: Tower, inputs: npt.NDArray[Any]) -> Embeddings:
        if tower.one_at_a_time and len(inputs) > 1:
            return self._run_batches(partial(self._run, session, tower), (row[None] for row in inputs))
        path = self.folder / tower.file
        try:
            (embeddings,) = session.run([tower.output_name], {tower.input_name: inputs})
        except Exception as error:  # each runtime has its own; a bundle whose files do not fit together ends here
            raise ConfigError(f"{path} does not run on {inputs.shape}: {in_one_line(error)}.") from error
        expected = (len(inputs), self.manifest.embedding_size)
        if getattr(embeddings, "shape", None) != expected:
            raise ConfigError(f"{path} returns {getattr(embeddings, 'shape', type(embeddings))}; expected {expected}.")
        return require_finite(embeddings, str(path))

    def _run_batches(
        self, run: Callable[[npt.NDArray[Any]], Embeddings], batches: Iterable[npt.NDArray[Any]]
    ) -> Embeddings:
        parts = [run(batch) for batch in batches]
        return np.concatenate(parts) if parts else np.zeros((0, self.manifest.embedding_size), dtype=np.float32)


def image_key(manifest: Manifest) -> str:
    """Return a key of a bundle's image tower, to which embeddings of images belong."""
    files = [manifest.files.get(name, "") for name in manifest.files_of(manifest.image)]
    return hashlib.sha256(msgspec.json.encode((files, manifest.preprocessing))).hexdigest()


_opened: weakref.WeakSet[BundleEncoder] = weakref.WeakSet()  # those with a session


def _leave_sessions_to_parent() -> None:
    """Make a forked process open sessions of its own: the threads of those it inherits are its parent's alone.

    Closing one would wait for them for ever, and so does whatever closes it: the end of the process, too. Hence what is
    inherited is never freed.
    """
    for encoder in list(_opened):
        for name in vars(encoder).keys() & set(_SESSIONS):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(vars(encoder).pop(name)))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_sessions_to_parent)


def warn(message: str) -> None:
    """Log a warning for the user: on stderr unless logging is configured otherwise."""
    logging.getLogger("clip_rd_edge").warning("%s", printable(message))


class NamedInput(NamedTuple):
    name: str


class TowerModel(ABC):
    """A tower in another runtime, with the two methods of an ONNX Runtime session that are used here.

    Calls run one at a time: an engine owns its buffers, or does not document that several threads may call it. Rows are
    computed in batches of `batch_size`.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._inputs = [NamedInput(name) for name in inputs]

    def get_inputs(self) -> list[NamedInput]:
        return self._inputs

    def run(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run the model; return the named outputs, or all, in the model's order, as copies."""
        count = len(next(iter(feed.values())))
        with self._lock, NativeCall():
            batches = in_batches(count, self.batch_size(count))
            parts = [self.compute(names, {name: rows[part] for name, rows in feed.items()}) for part in batches]
        return parts[0] if len(parts) == 1 else [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]

    def batch_size(self, count: int) -> int:
        """Return how many rows are computed at once if there are `count`."""
        return count

    @abstractmethod
    def compute(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Do what `run` does, for a batch."""


def require_threads(threads: int | None) -> None:
    """Raise UsageError if a number of threads is neither None nor a whole number from 1 to MAX_THREADS."""
    if threads is not None and not (isinstance(threads, int | np.integer) and 1 <= threads <= MAX_THREADS):
        raise UsageError(
            f"The number of threads is {threads!r}; expected 1 to {MAX_THREADS:,}.",
            hint=f"this machine has {os.cpu_count()} cores",
        )
