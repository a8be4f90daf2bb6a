"""A bundle with TensorRT engines from a float32 one. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from clip_rd_edge.contract.bundle import ENGINE_SUFFIX, Manifest
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporters.calibration import CalibrationSet
from clip_rd_edge.exporters.choose import Budget
from clip_rd_edge.exporters.engine_layers import layers_not_in
from clip_rd_edge.exporters.self_build import write_build_files
from clip_rd_edge.exporters.source import open_source
from clip_rd_edge.exporters.tensorrt import RTX_TARGETS, SELF_BUILDING_TARGETS, build_engine, require_target
from clip_rd_edge.exporters.typed import TypedPrecision, TypedTower, typed_towers
from clip_rd_edge.utils.io import write_bytes

# The content of the engine of a tower, `image` or `text`, from the ONNX that goes beside it, or what that came from.
EngineBuilder = Callable[[str, TypedTower], bytes]


def write_engines(
    source: Path,
    folder: Path,
    *,
    precision: TypedPrecision,
    target: str,
    calibration: CalibrationSet | None,
    progress: Callable[[str], None],
    budget: Budget = Budget(),  # noqa: B008 — frozen
    build: EngineBuilder | None = None,
) -> Manifest:
    """Write strongly typed ONNX files and their engines into `folder`; return their manifest, not yet written.

    Some devices build their engines themselves: for them, the folder has what that takes (`self_build.py`) in their
    place. For an RTX card they are built without a GPU, so that their latency is not measured here; what their layers
    compute in is checked by the builder's own account.

    Args:
        build: builds every engine here, in place of TensorRT for RTX.

    Raises:
        InputError: there is no target of that name.
        UsageError: `source` is no float32 bundle, is damaged, or the calibration set was made for another model.
        MissingExtraError: TensorRT for RTX is not installed.
        ClipRdEdgeError: an engine cannot be built, or computes a layer in another type than the ONNX says.
    """
    require_target(target)
    manifest = open_source(source, folder, calibration=calibration)
    typed = typed_towers(
        source, manifest, precision=precision, calibration=calibration, budget=budget, progress=progress
    )
    if build is None and target in RTX_TARGETS:
        build = partial(_build_from_onnx, target=target)
    towers = {}
    for name, tower in (("image", manifest.image), ("text", manifest.text)):
        typed_tower = typed[name]
        write_bytes(folder / tower.file, typed_tower.content)
        engine = ""
        if build is not None:
            progress(f"{name} tower: building the engine for {target}")
            engine = Path(tower.file).with_suffix(ENGINE_SUFFIX).name
            write_bytes(folder / engine, build(name, typed_tower))
        towers[name] = msgspec.structs.replace(
            tower, precision=typed_tower.precision, note=typed_tower.note, engine=engine, measured=None
        )
    precisions = dict.fromkeys(tower.precision.split()[0] for tower in towers.values())
    made = msgspec.structs.replace(
        manifest,
        precision=" + ".join(precisions),
        target=f"tensorrt-rtx {target}" if target in RTX_TARGETS else f"tensorrt {target}",
        image=towers["image"],
        text=towers["text"],
        files={},
    )
    if build is None:
        write_build_files(folder, made, title=SELF_BUILDING_TARGETS[target])
    return made


def _build_from_onnx(name: str, typed: TypedTower, *, target: str) -> bytes:
    engine = build_engine(typed.content, target=target)
    wrong = layers_not_in(engine.log, typed.types)
    if wrong:
        layer, types = next(iter(wrong.items()))
        raise ClipRdEdgeError(
            f"The engine of the {name} tower computes {len(wrong)} of {len(typed.types)} layers in another type than "
            f"its ONNX says: {layer} in {' and '.join(types) or 'none that is told'} instead of {typed.types[layer]}.",
            hint="report it, with the version of tensorrt-rtx-cu13-bindings; --precision fp16 may do",
        )
    return engine.content
