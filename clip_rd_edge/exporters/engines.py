"""A bundle with TensorRT engines from a float32 one. Never imports torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from clip_rd_edge.contract.bundle import TOKENIZER, Manifest, Tower, read_manifest
from clip_rd_edge.contract.files import write_bytes
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporters.calibration import CalibrationSet
from clip_rd_edge.exporters.engine_layers import layers_not_in
from clip_rd_edge.exporters.source import require_fit, require_fp32
from clip_rd_edge.exporters.tensorrt import build_engine, require_rtx_target
from clip_rd_edge.exporters.typed import TypedPrecision, TypedTower, typed_towers

ENGINE_SUFFIX = ".engine"


def write_engines(
    source: Path,
    folder: Path,
    *,
    precision: TypedPrecision,
    target: str,
    calibration: CalibrationSet | None,
    progress: Callable[[str], None],
) -> Manifest:
    """Write strongly typed ONNX files and their engines into `folder`; return their manifest, not yet written.

    The engines are built without a GPU, so that their latency is not measured here; what their layers compute in is
    checked by the builder's own account.

    Raises:
        InputError: TensorRT for RTX builds nothing for `target`.
        UsageError: `source` is no float32 bundle, is damaged, or the calibration set was made for another model.
        MissingExtraError: TensorRT for RTX is not installed.
        ClipRdEdgeError: an engine cannot be built, or computes a layer in another type than the ONNX says.
    """
    require_rtx_target(target)
    manifest = read_manifest(source)
    require_fp32(source, manifest)
    if calibration is not None:
        require_fit(manifest, calibration)
    shutil.copy2(source / TOKENIZER, folder / TOKENIZER)
    typed = typed_towers(source, manifest, precision=precision, calibration=calibration, progress=progress)
    towers = {}
    for name, tower in (("image", manifest.image), ("text", manifest.text)):
        progress(f"{name} tower: building the engine for {target}")
        towers[name] = _written(typed[name], tower, folder, target)
    precisions = dict.fromkeys(tower.precision.split()[0] for tower in towers.values())
    return msgspec.structs.replace(
        manifest,
        precision=" + ".join(precisions),
        target=f"tensorrt-rtx {target}",
        image=towers["image"],
        text=towers["text"],
        files={},
    )


def _written(typed: TypedTower, tower: Tower, folder: Path, target: str) -> Tower:
    engine = build_engine(typed.content, target=target)
    wrong = layers_not_in(engine.log, typed.types)
    if wrong:
        name, types = next(iter(wrong.items()))
        raise ClipRdEdgeError(
            f"The engine of {tower.file} computes {len(wrong)} of {len(typed.types)} layers in another type than its "
            f"ONNX says: {name} in {' and '.join(types) or 'none that is told'} instead of {typed.types[name]}.",
            hint="report it, with the version of tensorrt-rtx-cu13-bindings; --precision fp16 may do",
        )
    path = Path(tower.file).with_suffix(ENGINE_SUFFIX).name
    write_bytes(folder / tower.file, typed.content)
    write_bytes(folder / path, engine.content)
    return msgspec.structs.replace(tower, precision=typed.precision, note=typed.note, engine=path, measured=None)
