"""What reads input of unknown origin, by kind, and what each may do with it: answer, or say why not in a sentence."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from clip_rd_edge.errors import ClipRdEdgeError, InputError

MAX_SECONDS, MAX_BYTES, MAX_MESSAGE = 10, 800_000_000, 4_000
_PAIRS = 40  # of a file that are read
TEXTS = ["a photo of a red dog", "", "ünï &amp; " * 40, "\ud800", "a" * 5_000, "\x00\u202e🦄"]


class TooSlowError(BaseException):
    """Input took more than MAX_SECONDS; a BaseException, so that nothing under test mistakes it for its own."""


def read_image(path: Path) -> object:
    from clip_rd_edge.bundle.images import open_image
    from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess

    return preprocess(open_image(path), Preprocessing(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3))


def read_pairs(path: Path) -> object:
    """Read a table or a shard; a pair may be bad, and the others are read."""
    from clip_rd_edge.data.load import load_pairs
    from clip_rd_edge.data.samples import fingerprint

    pairs = load_pairs(str(path))
    fingerprint(pairs)
    captions = []
    for index in range(min(len(pairs), _PAIRS)):
        with suppress(InputError):
            captions += pairs.read(index).captions
            pairs.read(index).image()
    for caption in captions:
        caption.encode()  # goes into files and tokenizers
    return captions


def read_labels(path: Path) -> object:
    from clip_rd_edge.runtime.labels import read_labels_file

    labels = read_labels_file(path)
    for label in labels:
        label.encode()
    return labels


def read_config(path: Path) -> object:
    """Read a file as each kind of YAML."""
    from clip_rd_edge.benchmarking.suite import read_suite
    from clip_rd_edge.distillation.config import load_recipe
    from clip_rd_edge.evidence.suite import EvidenceSuite
    from clip_rd_edge.exporting.plan import Target
    from clip_rd_edge.utils.structs import read_yaml

    readers: list[Callable[[], object]] = [
        lambda: load_recipe(str(path)),
        lambda: read_suite(path),
        lambda: read_yaml(path, EvidenceSuite),
        lambda: read_yaml(path, Target),
    ]
    errors = []
    for reader in readers:
        try:
            reader()
        except ClipRdEdgeError as error:
            require_sentence(error)
            errors.append(error)
    if len(errors) == len(readers):
        raise errors[0]
    return len(errors)


class BundleReader:
    """Reads a file in its place in a bundle whose other files are good; its checksum is made to fit."""

    def __init__(self, bundle: Path, place: str) -> None:
        self._bundle, self._place = bundle, place

    def __call__(self, path: Path) -> object:
        import msgspec

        from clip_rd_edge.bundle.manifest import MANIFEST, read_manifest
        from clip_rd_edge.runtime.classifier import ZeroShotClassifier
        from clip_rd_edge.runtime.load import load
        from clip_rd_edge.utils.files import sha256_of

        folder = path.parent / f"{path.name}.bundle"
        shutil.copytree(self._bundle, folder)
        try:
            (folder / self._place).unlink(missing_ok=True)
            (folder / self._place).hardlink_to(path)  # a copy of a huge file would take long
            manifest = read_manifest(folder)
            if self._place != MANIFEST:
                digests = {**manifest.files, self._place: sha256_of(folder / self._place)}
                manifest = msgspec.structs.replace(manifest, files=digests)
            encoder = load(folder, manifest=manifest, threads=1)
            labels = encoder.label_bank.names if encoder.label_bank else ("red", "green")
            encoder.encode_images([np.zeros((20, 30, 3), np.uint8)])
            for text in TEXTS:
                with suppress(InputError):  # a text that is no Unicode
                    encoder.encode_texts([text])
            return ZeroShotClassifier(encoder, None if encoder.label_bank else labels, cache=False)
        finally:
            shutil.rmtree(folder)


class IndexReader:
    """Reads index.json beside the embeddings of two images."""

    def __call__(self, path: Path) -> object:
        from benchmarks.robustness.hostile_input import place_index
        from clip_rd_edge.runtime.index import nearest, read_index

        folder = path.parent / f"{path.name}.index"
        folder.mkdir()
        try:
            place_index(path, folder)
            index, rows = read_index(folder)
            return nearest(index, rows, np.eye(3, dtype=np.float32)[0], top=2, checked=False)
        finally:
            shutil.rmtree(folder)


def readers(bundle: Path) -> dict[str, Callable[[Path], object]]:
    """Return a reader per folder of the corpus."""
    return {
        "images": read_image,
        "shards": read_pairs,
        "tables": read_pairs,
        "labels": read_labels,
        "configs": read_config,
        "manifests": BundleReader(bundle, "manifest.json"),
        "banks": BundleReader(bundle, "labels.npz"),
        "tokenizers": BundleReader(bundle, "tokenizer.json"),
        "towers": BundleReader(bundle, "image.onnx"),
        "indexes": IndexReader(),
    }


def require_sentence(error: ClipRdEdgeError) -> None:
    """Assert that an error is something to read."""
    message = str(error)
    assert message.strip(), f"{type(error).__name__} has no message"
    assert len(message) <= MAX_MESSAGE, f"a message of {len(message):,} characters: {message[:200]}…"


def answer_or_sentence(read: Callable[[], Any]) -> Any:
    """Return an answer, or the error that says why there is none; anything else is the finding of a test.

    Raises:
        TooSlowError: it took more than MAX_SECONDS.
        AssertionError: it took more than MAX_BYTES of memory, or its error is no sentence.
        Exception: whatever is no error of this project.
    """
    before = _reset_peak()
    with _time_limit():
        try:
            return read()
        except ClipRdEdgeError as error:
            require_sentence(error)
            return error
        finally:
            growth = _peak() - before
            assert growth <= MAX_BYTES, f"it took {growth / 1e6:,.0f} MB"


@contextmanager
def _time_limit() -> Iterator[None]:
    """Limit the processor's time, for the machine may be busy, and the time on the clock, for a wait takes none."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"no answer within {MAX_SECONDS} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, MAX_SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, 6 * MAX_SECONDS))
    previous = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, previous, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def _reset_peak() -> int:
    """Start to measure the peak of resident memory anew, where Linux can; return the memory now, in bytes."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return _peak()


def _peak() -> int:
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
