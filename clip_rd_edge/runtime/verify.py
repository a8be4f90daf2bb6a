"""Whether a bundle is whole and runs here, without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from PIL import __version__ as PILLOW

from clip_rd_edge.contract.bundle import MANIFEST, TOKENIZER, Manifest, is_bundle, manifest_is_intact, read_manifest
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.contract.label_bank import LABELS
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import encoder_of
from clip_rd_edge.utils.io import read_json, sha256_of

TEXT = "a photo of a cat"
# INT8 towers normalise in float32, so that only rounding keeps a norm from 1.
_NORM_TOLERANCE = 1e-3
# From this major version on Pillow resizes some tall pictures by their height first, and rounds in between.
_RESIZES_OTHERWISE = 13


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes:
        what: a file's name, or a tower.
        passed: whether it is as it should be.
        detail: what was found, in a few words.
    """

    what: str
    passed: bool
    detail: str


def verify_bundle(folder: Path, *, threads: int | None = None) -> list[Check]:
    """Check every file of a bundle by its SHA-256, the manifest by its own, and run what is intact once.

    Raises:
        InputError: it is no bundle.
        ConfigError: its manifest is damaged, or of a newer format.
    """
    manifest = _manifest_of(folder)
    checks = [_check_manifest(folder, manifest)]
    checks += [_check_file(folder, name, digest) for name, digest in sorted(manifest.files.items())]
    broken = {check.what for check in checks if not check.passed}
    encoder = encoder_of(folder, manifest, threads=threads)
    checks.append(_check_run("image tower", {manifest.image.file} & broken, lambda: _noise(encoder), manifest))
    needed = {manifest.text.file, TOKENIZER}
    checks.append(_check_run("text tower", needed & broken, lambda: encoder.encode_texts([TEXT]), manifest))
    if LABELS in manifest.files:
        checks.append(_check_run("label bank", {LABELS} & broken, lambda: _bank(encoder), manifest))
    return [*checks, *_pillow(manifest, PILLOW)]


def _manifest_of(folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except InputError:
        if not is_bundle(folder):
            raise
        # A file is missing: the manifest itself is good, and every missing file is to be named, not the first alone.
        return read_json(folder / MANIFEST, Manifest)


def _check_manifest(folder: Path, manifest: Manifest) -> Check:
    intact = manifest_is_intact(folder, manifest)
    return Check(what=MANIFEST, passed=intact, detail="intact" if intact else "not as it was exported: it was changed")


def _check_file(folder: Path, name: str, digest: str) -> Check:
    path = folder / name
    if not path.is_file():
        return Check(what=name, passed=False, detail="missing")
    if sha256_of(path) != digest:
        return Check(what=name, passed=False, detail="not the file that was exported: its SHA-256 differs")
    return Check(what=name, passed=True, detail=f"intact, {path.stat().st_size / 1e6:.1f} MB")


def _pillow(manifest: Manifest, here: str) -> list[Check]:
    """A word on Pillow where it resizes otherwise than the one that the bundle was made beside."""
    made = manifest.provenance.get("pillow", here)
    if (_major(made) < _RESIZES_OTHERWISE) == (_major(here) < _RESIZES_OTHERWISE):
        return []
    detail = f"{here} here, {made} at the export: tall pictures differ by some grey levels, and embeddings a little"
    return [Check(what="Pillow", passed=True, detail=detail)]


def _major(name: str) -> int:
    return int(name.partition(".")[0])


def _check_run(what: str, broken: set[str], run: Callable[[], Embeddings], manifest: Manifest) -> Check:
    if broken:
        return Check(what=what, passed=False, detail=f"not run, because of {' and '.join(sorted(broken))}")
    try:
        embeddings = run()
    except ClipRdEdgeError as error:
        return Check(what=what, passed=False, detail=str(error))
    except Exception as error:  # noqa: BLE001 — a model that this runtime fails on is what is looked for
        return Check(what=what, passed=False, detail=f"{type(error).__name__}: {error}")
    return _check_embeddings(what, embeddings, manifest.embedding_size)


def _check_embeddings(what: str, embeddings: Embeddings, size: int) -> Check:
    if embeddings.ndim != 2 or embeddings.shape[1] != size:
        return Check(what=what, passed=False, detail=f"gives shape {embeddings.shape}; expected (N, {size})")
    norms = np.linalg.norm(embeddings, axis=1)
    off = float(np.abs(norms - 1).max())
    if not off <= _NORM_TOLERANCE:  # NaN is off, too
        return Check(what=what, passed=False, detail=f"gives embeddings whose norm is off 1 by {off:.2g}")
    return Check(what=what, passed=True, detail=f"gives {embeddings.shape[0]} × {size}, of norm 1")


def _noise(encoder: BundleEncoder) -> Embeddings:
    # Not zeros: a tower without biases embeds them as zeros.
    size = (1, 3, *encoder.manifest.preprocessing.size)
    return encoder.encode_pixels(np.random.default_rng(0).standard_normal(size).astype(np.float32))


def _bank(encoder: BundleEncoder) -> Embeddings:
    bank = encoder.label_bank
    return bank.embeddings if bank else np.zeros((0, 0), dtype=np.float32)
