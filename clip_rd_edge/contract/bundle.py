"""The bundle: one self-sufficient folder that a device runs.

manifest.json    what follows, and the SHA-256 of every other file
image.onnx       pixel_values (N, 3, H, W) float32 -> image_embedding (N, D), L2-normalised;
                 or picture (1, height, width, 3) uint8 of any size, where preprocessing is in the graph
text.onnx        input_ids (N, T) int64 -> text_embedding (N, D), L2-normalised
image.engine, text.engine   for TensorRT targets, beside the ONNX that they were built from
tokenizer.json   read by the `tokenizers` library
labels.npz       optional: embeddings of fixed labels, which then need no text tower
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.contract.tokenizer import TokenizerSpec
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.io import read_versioned_json, sha256_of, size_bytes, to_json, write_bytes

FORMAT_VERSION = 1
MANIFEST, IMAGE_MODEL, TEXT_MODEL = "manifest.json", "image.onnx", "text.onnx"
TOKENIZER = "tokenizer.json"
ENGINE_SUFFIX = ".engine"  # of a TensorRT engine; for the rest it is called as its ONNX


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What the exporter measured of one tower, against the float32 one it came from.

    Attributes:
        latency_ms_p50, latency_ms_p95: batch 1, on `machine` with `threads`.
        speedup: float32 ONNX's p50 divided by this one's, both timed in turn in one run.
        max_difference: greatest absolute difference of an embedding entry.
        cosine: mean cosine to the float32 embeddings.
        centred_cosine: the same after each side's mean embedding is taken away, which raw cosine hides.
    """

    latency_ms_p50: float
    latency_ms_p95: float
    speedup: float
    max_difference: float
    cosine: float
    centred_cosine: float
    samples: int
    threads: int
    machine: str


class Tower(msgspec.Struct, frozen=True, kw_only=True):
    """One model file of a bundle.

    Attributes:
        precision: what it is in: `fp32`, or how it was quantised, such as `int8 static (U8 activations, S8 weights)`.
        note: why it is in another precision than the bundle asked for, or empty.
        preprocesses: the graph preprocesses: it takes one picture at a time, (1, H, W, 3) uint8 RGB of any size.
        one_at_a_time: it is run one input at a time. Dynamic INT8 scales activations by the whole batch, so that an
            embedding would depend on what else was embedded with it, and is less accurate; nor is a batch faster in it.
        engine: the TensorRT engine that was built from `file`, or empty.
    """

    file: str
    input_name: str
    output_name: str
    precision: str
    note: str = ""
    preprocesses: bool = msgspec.field(default=False, name="takes_pictures")
    one_at_a_time: bool = False
    engine: str = ""
    measured: Measurement | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """manifest.json.

    Attributes:
        files: by the name of every other file its SHA-256.
        checksum: SHA-256 of this file, as it is with an empty one.
    """

    format_version: int
    name: str
    precision: str
    target: str
    embedding_size: int
    logit_scale: float
    preprocessing: Preprocessing
    tokenizer: TokenizerSpec
    image: Tower
    text: Tower
    templates: tuple[str, ...] = ("{}",)
    parameters: int = 0
    provenance: dict[str, str] = {}
    files: dict[str, str] = {}
    checksum: str = ""

    @property
    def towers(self) -> dict[str, Tower]:
        """Both towers by their names, `image` and `text`."""
        return {"image": self.image, "text": self.text}

    def with_towers(self, towers: Mapping[str, Tower], *, target: str | None = None) -> Manifest:
        """The manifest of a bundle with these towers, not yet written; its precision is both towers' where they differ.

        Args:
            target: what the towers are for; None leaves it.
        """
        precisions = dict.fromkeys(tower.precision.split()[0] for tower in towers.values())
        return msgspec.structs.replace(
            self,
            precision=" + ".join(precisions),
            target=self.target if target is None else target,
            image=towers["image"],
            text=towers["text"],
            files={},
        )


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `folder` and write its manifest, last, so that a bundle without one is an unfinished one."""
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
    """Whether manifest.json, which was read as `manifest`, is to the byte what was written."""
    content = (folder / MANIFEST).read_bytes()
    told = f'"checksum": "{manifest.checksum}"'.encode()
    return hashlib.sha256(content.replace(told, b'"checksum": ""')).hexdigest() == manifest.checksum


def is_bundle(folder: Path) -> bool:
    """Whether the folder has a bundle's manifest."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest and check that its files are there.

    Raises:
        InputError: no such folder, no manifest, or a file that the manifest names is missing.
        ConfigError: the manifest is damaged, or of a newer format.
    """
    if not is_bundle(folder):
        reason = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise InputError(f"{folder} is not a bundle: it {reason}.", hint="make one with clip-rd-edge export")
    manifest = read_versioned_json(folder / MANIFEST, Manifest, newest=FORMAT_VERSION)
    for name in manifest.files:
        if not (folder / name).is_file():
            raise InputError(f"The bundle {folder} is incomplete: {name} is missing.", hint="copy or export it again")
    return manifest


def damaged_files(folder: Path, manifest: Manifest) -> list[str]:
    """Names of files whose SHA-256 is not what the manifest says."""
    return [name for name, digest in manifest.files.items() if sha256_of(folder / name) != digest]


def bundle_size_bytes(folder: Path) -> int:
    """Size of a bundle on disk, in bytes."""
    return size_bytes(folder)
