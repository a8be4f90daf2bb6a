"""A float16 bundle from a float32 one. Never imports torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import onnx

from clip_rd_edge.contract.bundle import TOKENIZER, Manifest, Tower
from clip_rd_edge.contract.tokenizer import Tokenizer
from clip_rd_edge.exporters.fp16 import overflowing, to_fp16
from clip_rd_edge.exporters.measure import Inputs, Timer, embed, latencies, measurement
from clip_rd_edge.exporters.parity import Agreement, agreement
from clip_rd_edge.exporters.probes import PROBES, hard_pixels
from clip_rd_edge.exporters.source import open_source
from clip_rd_edge.exporters.static import preprocessed
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.utils.io import write_bytes
from clip_rd_edge.utils.timing import time_in_turn

# Rounding alone costs less than this; what costs more has overflowed somewhere.
MIN_AGREEMENT = 0.999


@dataclass(frozen=True)
class HalfTower:
    """A tower in float16.

    Attributes:
        model: the file's content, or None where float32 is to be shipped.
        of: its agreement with float32 on hard inputs.
        kept: names of the nodes that stay in float32 because their values would overflow.
    """

    model: bytes | None
    of: Agreement
    kept: tuple[str, ...]


def probes_of(folder: Path, manifest: Manifest) -> dict[str, Inputs]:
    """Hard inputs of a bundle's image tower and text tower."""
    ids = Tokenizer(folder / TOKENIZER, manifest.tokenizer)(PROBES)
    return {"image": hard_pixels(manifest.preprocessing), "text": ids}


def half_tower(model: Path, probes: Inputs) -> HalfTower:
    """A float32 ONNX file in float16; float32 where that changes what it does on hard inputs.

    Args:
        model: the float32 file.
        probes: (N, 3, H, W) float32 or (N, T) int64, which reach the largest values that it will meet.
    """
    with tempfile.TemporaryDirectory() as scratch:
        prepared = onnx.load(preprocessed(model, Path(scratch)))
    keep = overflowing(prepared, probes)
    content = to_fp16(prepared, keep=keep).SerializeToString()
    reference = embed(open_session(str(model)), probes)
    found = agreement(reference, embed(open_session(content), probes))
    return HalfTower(content if found.centred_cosine >= MIN_AGREEMENT else None, found, tuple(keep))


def write_fp16(
    source: Path, folder: Path, *, threads: int, progress: Callable[[str], None], timer: Timer = time_in_turn
) -> Manifest:
    """Write the towers of the float32 bundle `source` in float16 into `folder`; return their manifest, not yet written.

    On a CPU float16 is for its size: ONNX Runtime computes it in float32, and the casts cost time. The tower's note
    says what it cost here.

    Raises:
        UsageError: `source` is no float32 bundle, or is damaged.
    """
    manifest = open_source(source, folder)
    probes = probes_of(source, manifest)
    towers = {}
    for name, tower in (("image", manifest.image), ("text", manifest.text)):
        progress(f"{name} tower: float16")
        towers[name] = write_half(source, folder, tower, probes[name], threads=threads, timer=timer)
    precisions = dict.fromkeys(tower.precision for tower in towers.values())
    return msgspec.structs.replace(
        manifest, precision=" + ".join(precisions), image=towers["image"], text=towers["text"], files={}
    )


def write_half(
    from_folder: Path, folder: Path, tower: Tower, probes: Inputs, *, threads: int, timer: Timer = time_in_turn
) -> Tower:
    """Write one tower of a float32 bundle in float16 into `folder`; returns it as the manifest has it."""
    source, target = from_folder / tower.file, folder / tower.file
    half = half_tower(source, probes)
    if half.model is None:
        shutil.copy2(source, target)
        return msgspec.structs.replace(tower, note=why_float32(half))
    write_bytes(target, half.model)
    sessions = {name: open_session(str(path), threads=threads) for name, path in (("fp32", source), ("fp16", target))}
    times = latencies(sessions, probes, timer=timer)
    measured = measurement(half.of, times["fp16"], reference=times["fp32"], threads=threads)
    note = ""
    if measured.speedup < 1:
        size = target.stat().st_size / source.stat().st_size
        note = (
            f"float16 at {size:.2f} of float32's size; on this CPU it takes {1 / measured.speedup:.2f} times as long, "
            "since ONNX Runtime computes it in float32: it is for its size and for GPUs."
        )
    return msgspec.structs.replace(tower, precision="fp16", note=note, measured=measured)


def why_float32(half: HalfTower) -> str:
    """Why a tower stays float32, in a sentence."""
    return (
        f"float32: in float16 its centred cosine with float32 is {half.of.centred_cosine:.4f} on pictures and texts of "
        f"extremes, below {MIN_AGREEMENT}."
    )
