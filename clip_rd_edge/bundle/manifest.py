"""The bundle: a self-contained folder that a device runs.

manifest.json    describes the bundle, with the SHA-256 of every other file
image.onnx       pixel_values (N, 3, H, W) float32 -> image_embedding (N, D), L2-normalised;
                 or image (1, height, width, 3) uint8 of any size, if the graph includes preprocessing
text.onnx        input_ids (N, T) int64 -> text_embedding (N, D), L2-normalised
image.tflite, text.tflite   LiteRT only, in place of the ONNX files: for one input at a time; the ids are int32
image.mlpackage/, text.mlpackage/   Core ML only, in place of the ONNX files: folders; one input at a time, int32 ids
image.pte, text.pte         ExecuTorch only, in place of the ONNX files: for one input at a time
image.onnx.data, …          the weights of a tower above 2 GB, which a protobuf file cannot hold
image.engine, text.engine   TensorRT targets only: engines, beside the ONNX files they were built from
image.engine.sha256, …      engines built on the device only: the SHA-256 of the ONNX file and of the engine
tokenizer.json   read by the `tokenizers` library
labels.npz       optional: embeddings of fixed labels, which then do not need the text tower
taught.npz       optional: the embeddings of the images that some of these labels were taught with
background.npz   embeddings of common nouns, with which a label is compared to answer "none of these"
known.npz        optional: embeddings of the images that answers were calibrated on

A bundle exported with `--no-text-tower` has no text.* and no tokenizer.json.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from clip_rd_edge.bundle.encoder import Calibration, LogitBias, LogitScale, Scoring
from clip_rd_edge.bundle.formats import EXTERNAL_DATA_SUFFIX, format_of
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.tokenizer import TokenizerSpec
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.utils.files import is_plain_name, read_limited, sha256_of, write_bytes
from clip_rd_edge.utils.paths import cache_home, exists, is_file, is_folder, is_left_by_system, near_files
from clip_rd_edge.utils.structs import (
    CheckedError,
    CheckedStruct,
    NonNegativeFloat,
    NonNegativeInt,
    read_versioned_json,
    to_json,
)

# Older readers refuse what they would answer wrongly: bundles without a text tower, and those with features.
FORMAT_VERSION, VERSION_WITHOUT_TEXT, VERSION_WITH_FEATURES = 1, 2, 3
MANIFEST, IMAGE_MODEL, TEXT_MODEL = "manifest.json", "image.onnx", "text.onnx"
TOKENIZER = "tokenizer.json"
# `x86-64`: any of them; `x86-64-vnni`: with AVX-VNNI, AVX512-VNNI or AMX; `aarch64`; `wasm32`: in a browser.
WASM = "wasm32"
INSTRUCTION_SETS = ("x86-64", "x86-64-vnni", "aarch64", WASM)
LABELS, TAUGHT = "labels.npz", "taught.npz"
BACKGROUND, KNOWN = "background.npz", "known.npz"
ENGINE_SUFFIX = ".engine"  # replaces .onnx in the name of a TensorRT engine
# Added to the name of an engine that the device built, which the manifest does not list: what sha256sum prints for its
# ONNX file and for itself.
STAMP_SUFFIX = ".sha256"

# Limits, so that a manifest cannot ask for any amount of memory: far above those of any model that open_clip has.
MAX_EMBEDDING_SIZE = 65_536
MAX_TEMPLATES = 1_000
MAX_MANIFEST_BYTES = 1 << 24
_HINT = "copy or export the bundle again; clip-rd-edge verify checks every file"


class Measurement(CheckedStruct, frozen=True, kw_only=True):
    """What the exporter measured for one tower, compared with the float32 tower it was converted from.

    Attributes:
        latency_ms_p50, latency_ms_p95: at batch size 1, on `machine` with `threads` threads.
        speedup: 10th percentile of the float32 ONNX model's latency divided by that of this one, timed in turn in the
            same run; on a busy machine, medians show the other programs.
        max_difference: max absolute difference of any embedding entry.
        cosine: mean cosine similarity to the float32 embeddings.
        centred_cosine: the same after subtracting each side's mean embedding, which dominates the raw cosine.
        samples: number of inputs compared.
    """

    latency_ms_p50: NonNegativeFloat
    latency_ms_p95: NonNegativeFloat
    speedup: NonNegativeFloat
    max_difference: NonNegativeFloat
    cosine: float
    centred_cosine: float
    samples: NonNegativeInt
    threads: NonNegativeInt
    machine: str


class Tower(CheckedStruct, frozen=True, kw_only=True):
    """One model file of a bundle.

    Attributes:
        precision: `fp32`, or how it was quantised, such as `int8 static (U8 activations, S8 weights)`.
        note: why its precision differs from the requested one, or empty.
        preprocesses: the graph includes preprocessing: it takes one (1, H, W, 3) uint8 RGB image of any size at a time.
        one_at_a_time: run it with one input at a time. Dynamic INT8 per tensor scales activations over the whole batch,
            so an embedding would depend on the other inputs of its batch and be less accurate; batches are not faster
            either. LiteRT's, ExecuTorch's and Core ML's files are for a batch of one.
        engine: the TensorRT engine built from `file`, or empty.
        instruction_sets: those on which a CPU computes its INT8 as the file says, of `INSTRUCTION_SETS`; empty for a
            tower without INT8 products, and for engines. x86 processors without VNNI add pairs of products in 16 bits:
            weights of 8 bits saturate there, and the embeddings are wrong.
        measured: what the exporter measured, or None.
    """

    file: str
    input_name: str
    output_name: str
    precision: str
    note: str = ""
    preprocesses: bool = msgspec.field(default=False, name="takes_pictures")
    one_at_a_time: bool = False
    engine: str = ""
    instruction_sets: tuple[str, ...] = ()
    measured: Measurement | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_plain(self.file, self.engine or self.file)


class Features(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a reader must take into account, or else refuse the bundle.

    Attributes:
        logit_bias: see `Scoring`.
        taught: the labels that images have taught, whose rows of labels.npz are used also beside other labels.
        calibration: of probabilities, and of the answer that nothing fits.
    """

    logit_bias: LogitBias | None = None
    taught: tuple[str, ...] = ()
    calibration: Calibration | None = None


class Manifest(CheckedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of manifest.json.

    Attributes:
        tokenizer: of the text tower, also if that was left out.
        features: left out of the file where there are none.
        text: None if the text tower was left out: the bundle then embeds only images, and may have a label bank.
        files: SHA-256 of every other file, by name.
        checksum: SHA-256 of this file with an empty `checksum`.
    """

    format_version: NonNegativeInt
    name: str
    precision: str
    target: str
    embedding_size: Annotated[int, Meta(ge=1, le=MAX_EMBEDDING_SIZE)]
    logit_scale: LogitScale
    preprocessing: Preprocessing
    tokenizer: TokenizerSpec
    image: Tower
    text: Tower | None
    templates: Annotated[tuple[str, ...], Meta(min_length=1, max_length=MAX_TEMPLATES)] = ("{}",)
    parameters: NonNegativeInt = 0
    features: Features | msgspec.UnsetType = msgspec.UNSET
    provenance: dict[str, str] = msgspec.field(default_factory=dict)
    files: dict[str, str] = msgspec.field(default_factory=dict)
    checksum: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_plain(*self.files)

    @property
    def towers(self) -> dict[str, Tower]:
        """The towers by name, `image` and, unless it was left out, `text`."""
        return {"image": self.image} if self.text is None else {"image": self.image, "text": self.text}

    @property
    def scoring(self) -> Scoring:
        """How cosine similarities become probabilities."""
        return Scoring(self.logit_scale, self.features.logit_bias if self.features else None)

    @property
    def taught(self) -> tuple[str, ...]:
        """See `Features`."""
        return self.features.taught if self.features else ()

    def with_scoring(self, scoring: Scoring) -> Manifest:
        """Return a manifest with this scoring, and in the version that it needs."""
        scaled = msgspec.structs.replace(self, logit_scale=scoring.scale)
        return scaled if scoring.bias is None else scaled.with_features(logit_bias=scoring.bias)

    def with_features(self, **features: object) -> Manifest:
        """Return a manifest with these fields of `Features`, beside those that it has, and in the version they need."""
        merged = msgspec.structs.replace(self.features or Features(), **features)
        if merged == Features():
            version = FORMAT_VERSION if self.text else VERSION_WITHOUT_TEXT
            return msgspec.structs.replace(self, features=msgspec.UNSET, format_version=version)
        return msgspec.structs.replace(self, features=merged, format_version=VERSION_WITH_FEATURES)

    def require_text(self) -> Tower:
        """Return the text tower."""
        if self.text is None:
            raise InputError(
                f"The bundle of {self.name} has no text tower: it was exported with --no-text-tower, and embeds images "
                "alone.",
                hint="export the model again without that option",
            )
        return self.text

    def files_of(self, tower: Tower) -> tuple[str, ...]:
        """The names of the files that a tower is loaded from, without an engine that the device built."""
        data = f"{tower.file}{EXTERNAL_DATA_SUFFIX}"
        inside = [name for name in self.files if name.startswith(f"{tower.file}/")]  # a Core ML package is a folder
        names = (*(inside or [tower.file]), data if data in self.files else "", tower.engine)
        return tuple(name for name in names if name)

    def with_towers(self, towers: Mapping[str, Tower], *, target: str | None = None) -> Manifest:
        """Return a manifest with these towers, their precisions and perhaps another target, and no file hashes."""
        precisions = dict.fromkeys(tower.precision.split()[0] for tower in towers.values())
        return msgspec.structs.replace(
            self,
            precision=" + ".join(precisions),
            target=self.target if target is None else target,
            image=towers["image"],
            text=towers.get("text"),
            files={},
        )

    def without_text(self) -> Manifest:
        """Return a manifest without the text tower and without file hashes."""
        alone = self.with_towers({"image": self.image})
        return msgspec.structs.replace(alone, format_version=max(self.format_version, VERSION_WITHOUT_TEXT))


def can_saturate(sets: Sequence[str]) -> bool:
    """Return whether INT8 that is right on these instruction sets is wrong on x86 processors without VNNI."""
    return bool(sets) and "x86-64" not in sets


def _require_plain(*names: str) -> None:
    for name in names:
        if not is_plain_name(name) or name == MANIFEST:
            raise CheckedError(f"The file name {name!r} does not name a file inside the bundle")


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `folder` and write the manifest last: a bundle without a manifest is incomplete."""
    files = {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    complete = msgspec.structs.replace(manifest, files=files, checksum="")
    complete = msgspec.structs.replace(complete, checksum=hashlib.sha256(to_json(complete)).hexdigest())
    write_bytes(folder / MANIFEST, to_json(complete))
    return complete


def manifest_is_intact(folder: Path, manifest: Manifest) -> bool:
    """Return whether manifest.json, from which `manifest` was read, matches its own checksum."""
    content = (folder / MANIFEST).read_bytes()
    field = f'"checksum": "{manifest.checksum}"'.encode()
    return hashlib.sha256(content.replace(field, b'"checksum": ""')).hexdigest() == manifest.checksum


def is_bundle(folder: Path) -> bool:
    """Return whether the folder has a bundle's manifest."""
    return is_file(folder / MANIFEST)


def listed_files(folder: Path) -> Collection[str] | None:
    """Return the names in a bundle's manifest, which is not checked; None for other folders.

    Web pages, teachers' stores and others have a manifest.json, too.
    """
    try:
        content = msgspec.json.decode(read_limited(folder / MANIFEST, MAX_MANIFEST_BYTES))
    except (InputError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    files = content.get("files") if isinstance(content, dict) else None
    is_ours = isinstance(files, dict) and {"format_version", "embedding_size", "preprocessing"} <= content.keys()
    return files if is_ours else None


def inner_bundles(folder: Path) -> str:
    """Return a hint that names the bundles inside a folder that is not one itself, such as a run's; else empty."""
    folders = (path.parent for pattern in ("*", "bundles/*") for path in folder.glob(f"{pattern}/{MANIFEST}"))
    inner = sorted(path for path in folders if listed_files(path) is not None)
    return f"there are bundles in it: {', '.join(map(str, inner))}" if inner else ""


def read_manifest(folder: Path, *, is_whole: bool = True) -> Manifest:
    """Read a bundle's manifest; check that its files exist, and that it has the checksums of towers and tokenizer.

    Args:
        is_whole: False reads it also if files are missing.
    """
    if not is_bundle(folder):
        reason = "has no manifest.json" if is_folder(folder) else "is a file" if exists(folder) else "does not exist"
        hint = inner_bundles(folder) or "create one with clip-rd-edge export"
        nearest = "" if exists(folder) else near_files(folder)
        raise InputError(f"{folder} is not a bundle: it {reason}.{nearest}", hint=hint)
    manifest = read_versioned_json(
        folder / MANIFEST, Manifest, newest=VERSION_WITH_FEATURES, max_bytes=MAX_MANIFEST_BYTES, hint=_HINT
    )
    needed = [name for tower in manifest.towers.values() for name in manifest.files_of(tower)]
    for name in (*needed, *([TOKENIZER] if manifest.text else [])):
        if name not in manifest.files:
            raise ConfigError(f"{folder / MANIFEST} has no checksum of {name}, which the bundle needs.", hint=_HINT)
    for name in manifest.files if is_whole else ():
        if not (folder / name).is_file():
            raise InputError(f"The bundle {folder} is incomplete: {name} is missing.", hint=_HINT)
    return manifest


def require_whole_towers(folder: Path, manifest: Manifest, *, purpose: str) -> None:
    """Raise UsageError if a tower's weights are in a file of their own: `purpose` needs them in the ONNX file."""
    for tower in manifest.towers.values():
        data = f"{tower.file}{EXTERNAL_DATA_SUFFIX}"
        if (folder / data).is_file():
            size_gb = (folder / data).stat().st_size / 1e9
            raise UsageError(
                f"{folder / tower.file} has {size_gb:.1f} GB of weights, and {purpose} takes towers of up to 2 GB.",
                hint="run the float32 bundle itself ({format} onnx {precision} fp32), or distil a smaller student",
            )


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return the names of files whose SHA-256 does not match the manifest."""
    return [name for name, digest in manifest.files.items() if sha256_of(folder / name) != digest]


_MAX_MARKS = 1_000  # files that are remembered
_ONNX = ".onnx"


def marks_folder() -> Path:
    """Return the folder with one empty file per file that is known to be intact; it may not exist yet."""
    return cache_home() / "intact"


def require_intact_manifest(folder: Path, manifest: Manifest) -> None:
    """Check a manifest against its own checksum."""
    if manifest.checksum and not manifest_is_intact(folder, manifest):
        raise ConfigError(f"{folder / MANIFEST} has changed since the export: its checksum differs.", hint=_HINT)


def require_intact_tower(folder: Path, manifest: Manifest, tower: Tower) -> None:
    """Check all files of a tower before a runtime opens them: it would read whatever they, or links, lead to."""
    for name in manifest.files_of(tower):
        require_intact(folder, manifest, name)
    weights, package = folder / f"{tower.file}{EXTERNAL_DATA_SUFFIX}", folder / tower.file
    beside = [path for path in (weights, *weights.parents) if folder in path.parents]
    unlisted = [path for path in (*beside, *package.rglob("*")) if not _is_plain(path, folder, manifest)]
    if format_of(manifest.target).is_onnx and package.suffix != _ONNX:  # a runtime takes it for another format
        unlisted.append(package)
    if unlisted:
        raise ConfigError(
            f"{unlisted[0]} is not for a runtime to read: expected a plain file that the manifest lists, and the name "
            "of its format.",
            hint="export the bundle again, or copy it with cp -rL if you trust it",
        )


def _is_plain(path: Path, folder: Path, manifest: Manifest) -> bool:
    """Return whether a path in a bundle is a file that the manifest lists, no file, or absent, and no link."""
    if path.is_symlink():
        return False
    is_listed = not manifest.files or path.relative_to(folder).as_posix() in manifest.files
    return is_listed or not path.is_file() or is_left_by_system(path)


def require_intact(folder: Path, manifest: Manifest, name: str) -> None:
    """Check a file of a bundle, unless it is remembered or the manifest does not have its checksum yet."""
    digest = manifest.files.get(name)
    path = folder / name
    if digest is None or not path.is_file():  # whoever reads a missing file reports it
        return
    if not _has_digest(path, digest):
        raise ConfigError(f"{path} has changed since the export: its SHA-256 differs from the manifest's.", hint=_HINT)


def require_current_engine(folder: Path, manifest: Manifest, tower: Tower, engine: str) -> None:
    """Check that an engine that the device built was built from the bundle's ONNX file.

    A newer bundle that is copied over an older one leaves the older one's engine beside the new ONNX file.
    """
    path, stamp = folder / engine, folder / f"{engine}{STAMP_SUFFIX}"
    if not path.is_file():
        return
    content = stamp.read_text(encoding="utf-8", errors="replace") if stamp.is_file() else ""
    lines = (line.split() for line in content.splitlines())
    digests = {fields[1].removeprefix("*"): fields[0] for fields in lines if len(fields) == 2}
    expected = manifest.files.get(tower.file) or sha256_of(folder / tower.file)
    if digests.get(tower.file) != expected or not _has_digest(path, digests.get(engine, "")):
        raise ConfigError(
            f"{path} may have been built from another {tower.file}: {stamp.name} does not have the checksums of both.",
            hint=f"build it again; if it was built from this one: "
            f"cd {folder} && sha256sum {tower.file} {engine} > {stamp.name}",
        )


def _has_digest(path: Path, digest: str) -> bool:
    """Return whether a file has a SHA-256, and is self-contained if it is ONNX; one that has and is, is remembered."""
    stat = path.stat()
    times = f"{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
    identity = f"{path.resolve()}\0{stat.st_size}\0{times}\0{stat.st_ino}\0{digest}"
    mark = marks_folder() / hashlib.sha256(os.fsencode(identity)).hexdigest()
    with suppress(OSError):  # a cache in a folder that this user may not enter
        if mark.exists():
            return True
    if sha256_of(path) != digest:
        return False
    if path.suffix == _ONNX:
        from clip_rd_edge.bundle.formats import require_self_contained  # late: most files are remembered

        require_self_contained(path)
    with suppress(OSError):  # a full or read-only cache only costs time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        _forget_oldest(mark.parent)
    return True


def _forget_oldest(folder: Path) -> None:
    marks = list(folder.iterdir())
    if len(marks) > _MAX_MARKS:
        for mark in sorted(marks, key=lambda mark: mark.stat().st_mtime_ns)[: len(marks) // 2]:
            mark.unlink(missing_ok=True)
