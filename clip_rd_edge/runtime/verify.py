"""Verify that a bundle is intact and runs on this machine, without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from PIL import __version__ as PILLOW

from clip_rd_edge.contract.bundle import (
    LABELS,
    MANIFEST,
    TOKENIZER,
    Manifest,
    is_bundle,
    manifest_is_intact,
    read_manifest,
)
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import open_bundle
from clip_rd_edge.utils.io import read_json, sha256_of

TEXT = "a photo of a cat"
# INT8 towers normalise in float32, too, so norms deviate from 1 by rounding only.
_NORM_TOLERANCE = 1e-3
# From this major version on, Pillow resizes some tall images by height first and rounds in between.
_PILLOW_RESIZE_CHANGE = 13


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check.

    Attributes:
        what: the file name, tower or package that was checked.
        passed: whether the check passed.
        detail: what was found, in a few words.
    """

    what: str
    passed: bool
    detail: str


def verify_bundle(folder: Path, *, threads: int | None = None) -> list[Check]:
    """Check the SHA-256 of every file of a bundle, then run each intact tower once.

    Raises:
        InputError: the folder is not a bundle.
        ConfigError: the manifest is damaged or has a newer format.
    """
    manifest = _read_manifest(folder)
    checks = [_check_manifest(folder, manifest)]
    checks += [_check_file(folder, name, digest) for name, digest in sorted(manifest.files.items())]
    broken = {check.what for check in checks if not check.passed}
    encoder = open_bundle(folder, manifest, threads=threads)
    checks.append(_check_run("image tower", {manifest.image.file} & broken, lambda: _embed_noise(encoder), manifest))
    needed = {manifest.text.file, TOKENIZER}
    checks.append(_check_run("text tower", needed & broken, lambda: encoder.encode_texts([TEXT]), manifest))
    if (folder / LABELS).is_file() or LABELS in manifest.files:
        checks.append(_check_run("label bank", {LABELS} & broken, lambda: _label_embeddings(encoder), manifest))
    return [*checks, *_check_pillow(manifest, PILLOW)]


def _read_manifest(folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except InputError:
        if not is_bundle(folder):
            raise
        # A file is missing, which the manifest lists: read it all the same, to report every missing file.
        return read_json(folder / MANIFEST, Manifest)


def _check_manifest(folder: Path, manifest: Manifest) -> Check:
    intact = manifest_is_intact(folder, manifest)
    return Check(what=MANIFEST, passed=intact, detail="intact" if intact else "changed since the export")


def _check_file(folder: Path, name: str, digest: str) -> Check:
    path = folder / name
    if not path.is_file():
        return Check(what=name, passed=False, detail="missing")
    if sha256_of(path) != digest:
        return Check(what=name, passed=False, detail="changed since the export: its SHA-256 differs")
    return Check(what=name, passed=True, detail=f"intact, {path.stat().st_size / 1e6:.1f} MB")


def _check_pillow(manifest: Manifest, installed: str) -> list[Check]:
    """Return a note if the installed Pillow resizes differently from the one used for the export, else nothing."""
    exported = manifest.provenance.get("pillow", installed)
    if (_major(exported) < _PILLOW_RESIZE_CHANGE) == (_major(installed) < _PILLOW_RESIZE_CHANGE):
        return []
    detail = f"{installed} here, {exported} at the export: tall images differ by a few grey levels, embeddings slightly"
    return [Check(what="Pillow", passed=True, detail=detail)]


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _check_run(what: str, broken: set[str], run: Callable[[], Embeddings], manifest: Manifest) -> Check:
    if broken:
        return Check(what=what, passed=False, detail=f"not run because of {' and '.join(sorted(broken))}")
    try:
        embeddings = run()
    except ClipRdEdgeError as error:
        return Check(what=what, passed=False, detail=str(error))
    except Exception as error:  # noqa: BLE001 — any failure of the runtime is the finding
        return Check(what=what, passed=False, detail=f"{type(error).__name__}: {error}")
    return _check_embeddings(what, embeddings, manifest.embedding_size)


def _check_embeddings(what: str, embeddings: Embeddings, size: int) -> Check:
    if embeddings.ndim != 2 or embeddings.shape[1] != size:
        return Check(what=what, passed=False, detail=f"returns shape {embeddings.shape}; expected (N, {size})")
    norms = np.linalg.norm(embeddings, axis=1)
    deviation = float(np.abs(norms - 1).max())
    if not deviation <= _NORM_TOLERANCE:  # also fails for NaN
        return Check(
            what=what, passed=False, detail=f"returns embeddings with a norm that differs from 1 by {deviation:.2g}"
        )
    return Check(what=what, passed=True, detail=f"returns shape {embeddings.shape}, norm 1")


def _embed_noise(encoder: BundleEncoder) -> Embeddings:
    # Noise rather than zeros, which a tower without biases embeds as zeros.
    size = (1, 3, *encoder.manifest.preprocessing.size)
    return encoder.encode_pixels(np.random.default_rng(0).standard_normal(size).astype(np.float32))


def _label_embeddings(encoder: BundleEncoder) -> Embeddings:
    bank = encoder.label_bank
    return bank.embeddings if bank else np.zeros((0, 0), dtype=np.float32)
