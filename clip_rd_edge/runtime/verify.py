"""Verify that a bundle is intact, runs on this machine, and gives the exporter's answers here; without torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from PIL import Image
from PIL import __version__ as PILLOW

from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.manifest import (
    LABELS,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Tower,
    is_bundle,
    manifest_is_intact,
    read_manifest,
)
from clip_rd_edge.bundle.reference import REFERENCE, Reference, read_reference, worst_agreement
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, InputError, UnreachableError
from clip_rd_edge.runtime.encoder import AUTO, BundleEncoder, Placement
from clip_rd_edge.runtime.load import open_bundle
from clip_rd_edge.utils.files import sha256_of, size_bytes
from clip_rd_edge.utils.process import end_calls
from clip_rd_edge.utils.structs import read_json

TEXT = "a photo of a cat"
# INT8 towers normalise in float32, too, so norms deviate from 1 by rounding only.
_NORM_TOLERANCE = 1e-3
# Lowest centred cosine of an answer with its reference, by the precision that a tower is computed in. Kernels of one
# precision add in different orders: that stays above; saturation, another model or another precision does not.
MIN_AGREEMENT = {"fp32": 0.9999, "fp16": 0.998, "bf16": 0.99, "int8": 0.99}
# Rounding alone moves the answers of some deep towers in INT8 farther, and their bundles say how far. The margin is for
# kernels that round in another way than was measured; below the minimum, rounding and faults look alike.
_ROUNDING_MARGIN, _MIN_ROUNDED = 1.5, 0.9
# In float32 on a CPU, no entry may differ by more: the exporter's own limit between the ONNX file and PyTorch.
MAX_DIFFERENCE = 1e-4
_MIN_LIMIT_S = 300
_COPY = "copy or export the bundle again"
_MACHINE = "the machine failed, not the bundle: verify again once that is mended"
_NOT_COMPARED = "not compared: the bundle has no reference answers; one exported by this version does"
# From this major version on, Pillow resizes some tall images by height first and rounds in between.
_PILLOW_RESIZE_CHANGE = 13


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check.

    Attributes:
        what: the file name, tower or package that was checked.
        passed: whether the check passed.
        detail: what was found, in a few words.
        runtime, device: what ran the tower; empty for other checks.
        agreement: lowest centred cosine of a tower's answers with the reference, or None.
        hint: what to do if it failed, or empty.
    """

    what: str
    passed: bool
    detail: str
    runtime: str = ""
    device: str = ""
    agreement: float | None = None
    hint: str = ""


def verify_bundle(
    folder: Path, *, threads: int | None = None, device: str = AUTO, time_limit_s: float | None = None
) -> list[Check]:
    """Check the SHA-256 of every file of a bundle, then run each intact tower and compare its answers.

    A tower passes if it runs where it was meant to (its engine on the GPU, not its ONNX file on the CPU) and its
    embeddings of the bundle's reference inputs agree with the reference. A bundle without reference answers is run
    only, and a check says so.

    Args:
        folder: the bundle.
        threads, device: as for `load`.
        time_limit_s: a tower that runs after so many seconds is ended, and fails. None: five minutes, and a second for
            each megabyte of the bundle, which even a slow board with a slow card does not need.
    """
    manifest = _read_manifest(folder)
    with _time_limit(_MIN_LIMIT_S + size_bytes(folder) / 1e6 if time_limit_s is None else time_limit_s) as limit:
        return _checks(folder, manifest, limit, threads=threads, device=device)


class _Limit(threading.Event):
    """Is set when the time is over; `words` say so."""

    words = ""


@contextmanager
def _time_limit(seconds: float) -> Iterator[_Limit]:
    """Within the block, end what a runtime computes from the limit on, also what it begins after that."""
    limit, over = _Limit(), threading.Event()
    limit.words = f"ended after {seconds:,.0f} s, the time limit"

    def end() -> None:
        limit.set()
        end_calls(ClipRdEdgeError.exit_code, over)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield limit
    finally:
        timer.cancel()
        over.set()


def _checks(folder: Path, manifest: Manifest, limit: _Limit, *, threads: int | None, device: str) -> list[Check]:
    checks = [_check_manifest(folder, manifest)]
    checks += [_check_file(folder, name, digest) for name, digest in sorted(manifest.files.items())]
    broken = {check.what for check in checks if not check.passed}
    reference = None if REFERENCE in broken else _reference(folder, manifest)
    if isinstance(reference, str):
        checks.append(Check(what=REFERENCE, passed=False, detail=reference, hint="export the bundle again"))
        reference = None
    encoder = open_bundle(folder, manifest, threads=threads, device=device, force=True)  # to see how wrong
    for tower in _trials(encoder, reference):
        needed = tower.files & broken
        if needed:
            checks.append(_not_run(tower.what, needed))
        else:  # its files are intact: copying them again would change nothing
            check = _check_tower(encoder, tower)
            if limit.is_set():
                check = Check(what=tower.what, passed=False, detail=limit.words, hint="allow more with --time-limit")
            checks.append(_with_hint(check, hint="try another --device, or export the bundle again"))
    if (folder / LABELS).is_file() or LABELS in manifest.files:
        checks.append(_with_hint(_check_labels({LABELS} & broken, encoder), hint="export the bundle again"))
    if REFERENCE not in manifest.files:
        checks.append(Check(what="answers", passed=True, detail=_NOT_COMPARED))
    return [*checks, *_check_pillow(manifest, PILLOW)]


def _reference(folder: Path, manifest: Manifest) -> Reference | str | None:
    """Return the reference answers, None if the bundle lists none, or why they cannot be used."""
    if REFERENCE not in manifest.files:
        return None
    try:
        reference = read_reference(folder)
    except ConfigError as error:
        return str(error)
    expected = (*manifest.preprocessing.size, manifest.tokenizer.context_length, manifest.embedding_size)
    if reference is None:
        return "missing"
    sizes = (*reference.images.shape[1:3], reference.ids.shape[1], reference.image_embeddings.shape[1])
    if sizes != expected or reference.text_embeddings.shape[1] != sizes[-1]:
        return f"has images, ids and embeddings of sizes {sizes}; the bundle takes {expected}"
    if (manifest.text is None) != (not reference.texts):
        return f"has {len(reference.texts)} texts; the bundle has {'no' if manifest.text is None else 'a'} text tower"
    return reference


class _Trial(NamedTuple):
    """One tower's run; `answers` are the reference embeddings (N, D), or None; `rounding` is as in `Reference`."""

    what: str
    tower: Tower
    files: set[str]
    run: Callable[[], Embeddings]
    answers: Embeddings | None
    rounding: float = 1.0


def _trials(encoder: BundleEncoder, reference: Reference | None) -> list[_Trial]:
    image, text = encoder.manifest.image, encoder.manifest.text
    image_files = set(encoder.manifest.files_of(image))
    texts = {*encoder.manifest.files_of(text), TOKENIZER} if text else set()
    if reference is None:
        trials = [_Trial("image tower", image, image_files, lambda: _embed_noise(encoder), None)]
        if text:
            trials.append(_Trial("text tower", text, texts, lambda: encoder.encode_texts([TEXT]), None))
        return trials
    images = [Image.fromarray(array) for array in reference.images]

    def embed_texts() -> Embeddings:
        ids = encoder.tokenize(reference.texts)
        if not np.array_equal(ids, reference.ids):
            text = reference.texts[int((ids != reference.ids).any(axis=1).argmax())]
            raise ConfigError(
                f"The tokenizer turns {text[:40]!r} into other ids here than at the export",
                hint="export the bundle again",
            )
        return encoder.encode_ids(ids)

    trials = [
        _Trial(
            "image tower",
            image,
            image_files,
            lambda: encoder.encode_images(images),
            reference.image_embeddings,
            reference.image_rounding,
        )
    ]
    if text:
        answers, rounding = reference.text_embeddings, reference.text_rounding
        trials.append(_Trial("text tower", text, texts, embed_texts, answers, rounding))
    return trials


def _not_run(what: str, broken: set[str]) -> Check:
    return Check(what=what, passed=False, detail=f"not run because of {' and '.join(sorted(broken))}")


def _check_tower(encoder: BundleEncoder, trial: _Trial) -> Check:
    embeddings = _attempt(trial.run)
    if isinstance(embeddings, Exception):
        return _failed(trial.what, embeddings)
    placement = encoder.placement(trial.tower)
    problem = _norm_problem(embeddings)
    agreement = None
    if problem:
        detail = problem
    elif trial.answers is None:
        detail = f"returns shape {embeddings.shape}, norm 1"
    else:
        agreement = worst_agreement(trial.answers, embeddings)
        difference = float(np.abs(embeddings - trial.answers).max())
        detail, problem = _compare(trial, agreement, difference, placement)
    where = f"{placement.runtime} on {placement.device}"
    if reason := encoder.int8_fault(trial.tower):  # which some inputs alone show
        problem, detail = reason, f"{detail}; {reason}"
    if placement.fallback:
        problem, detail = placement.fallback, f"{placement.fallback}; {detail}"
    return Check(
        what=trial.what,
        passed=not problem,
        detail=f"{detail}; {where}",
        runtime=placement.runtime,
        device=placement.device,
        agreement=agreement,
        hint=placement.hint,
    )


def _with_hint(check: Check, *, hint: str) -> Check:
    """Return a check with a hint if it failed and has none."""
    return check if check.passed or check.hint else msgspec.structs.replace(check, hint=hint)


def _compare(trial: _Trial, agreement: float, difference: float, placement: Placement) -> tuple[str, str]:
    """Return what a comparison with the reference found, and the same again if it is a failure, else nothing."""
    assert trial.answers is not None
    precision, count = trial.tower.precision.split()[0], len(trial.answers)
    # Outside CPUs, float32 is computed in TF32 or float16.
    computed = "fp16" if precision == "fp32" and placement.device != "cpu" else precision
    lowest = MIN_AGREEMENT.get(computed, MIN_AGREEMENT["int8"])
    if computed == "int8":
        rounded = 1 - _ROUNDING_MARGIN * (1 - trial.rounding)
        lowest = min(lowest, max(_MIN_ROUNDED, round(rounded, 4)))
    detail = f"lowest centred cosine of {count} answers with the exporter's {agreement:.5f}, at least {lowest} expected"
    if computed == "fp32" and not difference <= MAX_DIFFERENCE:
        problem = f"an answer differs from the exporter's by {difference:.1g}, at most {MAX_DIFFERENCE:g} expected"
        return problem, problem
    if not agreement >= lowest:
        problem = f"wrong answers: {detail}"
        return problem, problem
    return detail, ""


def _read_manifest(folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except InputError:
        if not is_bundle(folder):
            raise
        # A file is missing, which the manifest lists: read it all the same, to report every missing file.
        return read_json(folder / MANIFEST, Manifest)


def _check_manifest(folder: Path, manifest: Manifest) -> Check:
    if not manifest.checksum:  # of a bundle from before manifests had one
        return Check(what=MANIFEST, passed=True, detail="not checked: it has no checksum")
    intact = manifest_is_intact(folder, manifest)
    detail = "intact" if intact else "changed since the export"
    return Check(what=MANIFEST, passed=intact, detail=detail, hint="" if intact else _COPY)


def _check_file(folder: Path, name: str, digest: str) -> Check:
    path = folder / name
    if not path.is_file():
        return Check(what=name, passed=False, detail="missing", hint=_COPY)
    if sha256_of(path) != digest:
        return Check(what=name, passed=False, detail="changed since the export: its SHA-256 differs", hint=_COPY)
    size = path.stat().st_size
    shown = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
    return Check(what=name, passed=True, detail=f"intact, {shown}")


def _check_pillow(manifest: Manifest, installed: str) -> list[Check]:
    """Return a note if the installed Pillow resizes differently from the one used for the export, else nothing."""
    exported = manifest.provenance.get("pillow", installed)
    if (_major(exported) < _PILLOW_RESIZE_CHANGE) == (_major(installed) < _PILLOW_RESIZE_CHANGE):
        return []
    detail = f"{installed} here, {exported} at the export: tall images differ by a few grey levels, embeddings slightly"
    return [Check(what="Pillow", passed=True, detail=detail)]


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _check_labels(broken: set[str], encoder: BundleEncoder) -> Check:
    if broken:
        return _not_run("labels", broken)
    embeddings = _attempt(lambda: _label_embeddings(encoder))
    if isinstance(embeddings, Exception):
        return _failed("labels", embeddings)
    problem = _norm_problem(embeddings)
    return Check(what="labels", passed=not problem, detail=problem or f"has shape {embeddings.shape}, norm 1")


def _attempt(run: Callable[[], Embeddings]) -> Embeddings | Exception:
    """Return the embeddings, or why there are none."""
    try:
        return run()
    except Exception as error:  # noqa: BLE001 — any failure of the runtime is the finding
        return error


def _failed(what: str, error: Exception) -> Check:
    if isinstance(error, UnreachableError):  # the machine's, which another device or bundle would not change
        return Check(what=what, passed=False, detail=str(error), hint=error.hint or _MACHINE)
    if isinstance(error, ClipRdEdgeError):
        return Check(what=what, passed=False, detail=str(error), hint=error.hint)
    return Check(what=what, passed=False, detail=f"{type(error).__name__}: {error}")


def _norm_problem(embeddings: Embeddings) -> str:
    """Return what is wrong with the norms of embeddings, or an empty string; the encoder has checked the shape."""
    deviation = float(np.abs(np.linalg.norm(embeddings, axis=1) - 1).max())
    if not deviation <= _NORM_TOLERANCE:  # also fails for NaN
        return f"returns embeddings with a norm that differs from 1 by {deviation:.2g}"
    return ""


def _embed_noise(encoder: BundleEncoder) -> Embeddings:
    # Noise rather than zeros, which a tower without biases embeds as zeros.
    size = (1, 3, *encoder.manifest.preprocessing.size)
    return encoder.encode_pixels(np.random.default_rng(0).standard_normal(size).astype(np.float32))


def _label_embeddings(encoder: BundleEncoder) -> Embeddings:
    bank = encoder.label_bank
    assert bank is not None  # its file is there
    return bank.embeddings
