"""Verify that a bundle is intact, runs on this machine, and gives the exporter's answers here; without torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from PIL import Image

from clip_rd_edge.bundle.encoder import Embeddings, normalise
from clip_rd_edge.bundle.manifest import (
    LABELS,
    MANIFEST,
    TAUGHT,
    TOKENIZER,
    Manifest,
    Tower,
    manifest_is_intact,
    read_manifest,
)
from clip_rd_edge.bundle.reference import REFERENCE, Reference, read_reference, worst_agreement
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, UnreachableError
from clip_rd_edge.runtime.encoder import AUTO, BundleEncoder, Placement
from clip_rd_edge.runtime.load import load
from clip_rd_edge.utils.files import sha256_of, size_bytes
from clip_rd_edge.utils.process import end_calls

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
# What differs by less is right even where all answers are alike, as those of a hardly trained tower: less their mean,
# rounding alone is left of them, and its cosine says nothing.
_ROUNDING = 2e-6
_MIN_LIMIT_S = 300
_COPY = "copy or export the bundle again"
_MACHINE = "the machine failed, not the bundle: verify again once that is fixed"
_EXPORT, _MORE_TIME = "export the bundle again", "allow more with --time-limit"


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
    embeddings of the bundle's reference inputs agree with the reference. A bundle without reference embeddings is only
    run, which a check reports.

    Args:
        threads, device: as for `load`.
        time_limit_s: a tower that still runs after this many seconds is stopped, and fails. None: five minutes, and a
            second for each megabyte of the bundle, more than even a slow board with a slow card needs.
    """
    manifest = read_manifest(folder, is_whole=False)  # to report every missing file
    with _time_limit(_MIN_LIMIT_S + size_bytes(folder) / 1e6 if time_limit_s is None else time_limit_s) as limit:
        return list(_checks(folder, manifest, limit, threads=threads, device=device))


@contextmanager
def _time_limit(seconds: float) -> Iterator[threading.Event]:
    """Within the block, end what a runtime computes from the limit on, also what it begins after that."""
    limit, over = threading.Event(), threading.Event()

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


def _checks(
    folder: Path, manifest: Manifest, limit: threading.Event, *, threads: int | None, device: str
) -> Iterator[Check]:
    broken = set()
    for check in _check_files(folder, manifest):
        broken |= set() if check.passed else {check.what}
        yield check
    reference: Reference | None = None
    if REFERENCE in manifest.files and REFERENCE not in broken:
        try:
            reference = read_reference(folder)
        except ConfigError as error:
            yield Check(what=REFERENCE, passed=False, detail=str(error), hint=_EXPORT)
    encoder = load(folder, manifest=manifest, threads=threads, device=device, force=True)  # to see how wrong
    for trial in _trials(encoder, reference):
        if needed := trial.files & broken:
            yield Check(what=trial.what, passed=False, detail=f"not run because of {' and '.join(sorted(needed))}")
            continue
        check = _run(encoder, trial)  # its files are intact: copying them again would change nothing
        if limit.is_set():
            check = Check(what=trial.what, passed=False, detail="ended at the time limit", hint=_MORE_TIME)
        if not (check.passed or check.hint):
            other = _EXPORT if trial.tower is None else f"try another --device, or {_EXPORT}"
            check = msgspec.structs.replace(check, hint=other)
        yield check
    if REFERENCE not in manifest.files:
        yield Check(what="answers", passed=True, detail="not compared: the bundle has no reference embeddings")


def _check_files(folder: Path, manifest: Manifest) -> Iterator[Check]:
    intact = not manifest.checksum or manifest_is_intact(folder, manifest)
    detail = "intact" if intact else "changed since the export"
    yield Check(what=MANIFEST, passed=intact, detail=detail, hint="" if intact else _COPY)
    for name, digest in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            yield Check(what=name, passed=False, detail="missing", hint=_COPY)
        elif sha256_of(path) != digest:
            yield Check(what=name, passed=False, detail="changed since the export: its SHA-256 differs", hint=_COPY)
        else:
            size = path.stat().st_size
            shown = f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
            yield Check(what=name, passed=True, detail=f"intact, {shown}")


class _Trial(NamedTuple):
    """What is run; `answers` are the reference embeddings (N, D), or None; `rounding` is as in `Reference`."""

    what: str
    tower: Tower | None
    files: set[str]
    run: Callable[[], Embeddings]
    answers: Embeddings | None = None
    rounding: float = 1.0


def _trials(encoder: BundleEncoder, reference: Reference | None) -> Iterator[_Trial]:
    manifest, text = encoder.manifest, encoder.manifest.text
    if reference is None:
        # Not zeros, which a tower without biases embeds as zeros.
        noise = np.random.default_rng(0).standard_normal((1, 3, *manifest.preprocessing.size)).astype(np.float32)
        of_image: tuple[Any, ...] = (partial(encoder.encode_pixels, noise),)
        of_text: tuple[Any, ...] = (partial(encoder.encode_texts, [TEXT]),)
    else:
        ref, images = reference, [Image.fromarray(array) for array in reference.images]
        of_image = partial(encoder.encode_images, images), ref.image_embeddings, ref.image_rounding
        of_text = partial(_embed_texts, encoder, ref), ref.text_embeddings, ref.text_rounding
    yield _Trial("image tower", manifest.image, set(manifest.files_of(manifest.image)), *of_image)
    if text:
        yield _Trial("text tower", text, {*manifest.files_of(text), TOKENIZER}, *of_text)
    if (encoder.folder / LABELS).is_file() or LABELS in manifest.files:
        yield _Trial("labels", None, {LABELS, *([TAUGHT] if manifest.taught else [])}, partial(_labels, encoder))


def _run(encoder: BundleEncoder, trial: _Trial) -> Check:
    answers = trial.answers
    try:
        embeddings = trial.run()
        deviation = float(np.abs(np.linalg.norm(embeddings, axis=1) - 1).max())
        agreement = None if answers is None else worst_agreement(answers, embeddings)
    except ClipRdEdgeError as error:
        # The machine's, which another device or bundle would not change.
        hint = error.hint or (_MACHINE if isinstance(error, UnreachableError) else "")
        return Check(what=trial.what, passed=False, detail=str(error), hint=hint)
    except Exception as error:  # noqa: BLE001 — any failure is the finding, and so are answers of another shape
        return Check(what=trial.what, passed=False, detail=f"{type(error).__name__}: {error}")
    problem, detail = "", f"returns shape {embeddings.shape}, norm 1"
    if not deviation <= _NORM_TOLERANCE:  # also fails for NaN
        problem = detail = f"returns embeddings with a norm that differs from 1 by {deviation:.2g}"
    if trial.tower is None:
        return Check(what=trial.what, passed=not problem, detail=detail)
    placement = encoder.placement(trial.tower)
    if not problem and answers is not None and agreement is not None:
        difference = float(np.abs(embeddings - answers).max())
        detail, problem = _compare(trial, trial.tower, agreement, difference, placement)
    if reason := encoder.int8_fault(trial.tower):  # which some inputs alone show
        problem, detail = reason, f"{detail}; {reason}"
    if placement.fallback:
        problem, detail = placement.fallback, f"{placement.fallback}; {detail}"
    return Check(
        what=trial.what,
        passed=not problem,
        detail=f"{detail}; {placement.runtime} on {placement.device}",
        runtime=placement.runtime,
        device=placement.device,
        agreement=agreement,
        hint=placement.hint,
    )


def _compare(trial: _Trial, tower: Tower, agreement: float, difference: float, placement: Placement) -> tuple[str, str]:
    """Return what a comparison with the reference found, and the same again if it is a failure, else nothing."""
    assert trial.answers is not None
    precision = tower.precision.split()[0]
    # Outside CPUs, float32 is computed in TF32 or float16.
    elsewhere = {"cpu": "fp32", "cpu-bf16": "bf16"}.get(placement.device, "fp16")
    computed = elsewhere if precision == "fp32" else precision
    lowest = MIN_AGREEMENT.get(computed, MIN_AGREEMENT["int8"])
    if computed == "int8":
        rounded = 1 - _ROUNDING_MARGIN * (1 - trial.rounding)
        lowest = min(lowest, max(_MIN_ROUNDED, round(rounded, 4)))
    detail = (
        f"lowest centred cosine of {len(trial.answers)} answers with the exporter's {agreement:.5f}, at least {lowest} "
        "expected"
    )
    problem = "" if agreement >= lowest else f"wrong answers: {detail}"
    if computed == "fp32" and not difference <= MAX_DIFFERENCE:
        problem = f"an answer differs from the exporter's by {difference:.1g}, at most {MAX_DIFFERENCE:g} expected"
    elif problem and computed == "fp32" and difference <= _ROUNDING:
        problem, detail = "", f"all answers are alike, and within {difference:.1g} of the exporter's"
    return problem or detail, problem


def _embed_texts(encoder: BundleEncoder, reference: Reference) -> Embeddings:
    ids = encoder.tokenize(reference.texts)
    if not np.array_equal(ids, reference.ids):
        text = reference.texts[int((ids != reference.ids).any(axis=1).argmax())]
        raise ConfigError(f"The tokenizer turns {text[:40]!r} into other ids here than at the export", hint=_EXPORT)
    return encoder.encode_ids(ids)


def _labels(encoder: BundleEncoder) -> Embeddings:
    """Return the embeddings of labels that have texts alone, and of what taught the others, which have any length."""
    bank, taught = encoder.label_bank, encoder.taught
    assert bank is not None  # its file is there
    rows = [row[: encoder.manifest.embedding_size] for row, name in zip(bank.embeddings, bank.names, strict=True)
            if name not in bank.taught]  # fmt: skip
    images = [] if taught is None else list(normalise(taught.images))
    return np.stack([*rows, *images])
