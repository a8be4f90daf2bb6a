"""Convert a float32 bundle to TensorRT engines, or to files that build them on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from clip_rd_edge.bundle.manifest import ENGINE_SUFFIX, STAMP_SUFFIX, TOKENIZER, Manifest
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.conversion import start_conversion
from clip_rd_edge.exporting.formats.tensorrt.engine import MAX_BATCH, build_engine, mistyped_layers
from clip_rd_edge.exporting.formats.tensorrt.strongly_typed import TypedTower, typed_towers
from clip_rd_edge.exporting.options import ExportRequest
from clip_rd_edge.exporting.plan import BUILD_SHELL, RTX_TARGETS, SELF_BUILDING_TARGETS, require_target
from clip_rd_edge.utils.files import sha256_of, write_bytes, write_text
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.text import one_line, printable

# Returns the content of a tower's engine, given `image` or `text` and the tower's strongly typed ONNX.
EngineBuilder = Callable[[str, TypedTower], bytes]


def write_engines(
    source: Path,
    folder: Path,
    request: ExportRequest,
    *,
    calibration: CalibrationSet | None = None,
    reporter: Reporter = SILENT,
    build: EngineBuilder | None = None,
) -> Manifest:
    """Write strongly typed ONNX files and their engines into `folder`; return their manifest, not yet written.

    Some devices build their engines themselves: for them, the folder holds build files instead (`write_build_files`).
    Engines for an RTX card are built without a GPU, so their latency is not measured here; the types that their layers
    compute in are checked in the builder's log.

    Args:
        source: the float32 bundle.
        folder: where the files are written.
        request: precision and target of the engines.
        calibration: samples for INT8, or None for other precisions.
        reporter: shows progress.
        build: builds the engines for any target, instead of TensorRT for RTX.
    """
    target = require_target(request.target)
    manifest = start_conversion(source, folder, request, calibration=calibration)
    typed = typed_towers(source, manifest, request, calibration=calibration, reporter=reporter)
    if build is None and target in RTX_TARGETS:
        build = partial(_build_from_onnx, target=target)
    towers = {}
    for name, tower in manifest.towers.items():
        typed_tower = typed[name]
        write_bytes(folder / tower.file, typed_tower.content)
        engine = ""
        if build is not None:
            reporter.update(f"{name} tower: building the engine for {target}")
            engine = Path(tower.file).with_suffix(ENGINE_SUFFIX).name
            write_bytes(folder / engine, build(name, typed_tower))
        towers[name] = msgspec.structs.replace(
            tower, precision=typed_tower.precision, note=typed_tower.note, engine=engine, measured=None
        )
    converted = manifest.with_towers(
        towers, target=f"tensorrt-rtx {target}" if target in RTX_TARGETS else f"tensorrt {target}"
    )
    if build is None:
        write_build_files(folder, converted, title=SELF_BUILDING_TARGETS[target])
    return converted


def _build_from_onnx(name: str, typed: TypedTower, *, target: str) -> bytes:
    engine = build_engine(typed.content, target=target)
    mistyped = mistyped_layers(engine.log, typed.types)
    if mistyped:
        layer, types = next(iter(mistyped.items()))
        raise ClipRdEdgeError(
            f"The engine of the {name} tower computes {len(mistyped)} of {len(typed.types)} layers in another type "
            f"than its ONNX says: {layer} in {' and '.join(types) or 'an unknown type'}, not {typed.types[layer]}.",
            hint="please report it with the version of tensorrt-rtx-cu13-bindings; {precision} fp16 may work",
        )
    return engine.content


BUILD_PYTHON, CHECKSUMS = "build.py", "SHA256SUMS"

_SHELL = """#!/usr/bin/env bash
# Builds the engines of {name}. Run it on the device ({title}); it takes minutes.
set -euo pipefail
cd "$(dirname "$0")"
sha256sum --check --quiet {checksums}
TRTEXEC="${{TRTEXEC:-/usr/src/tensorrt/bin/trtexec}}"
if ! command -v "$TRTEXEC" > /dev/null; then
    echo "error: $TRTEXEC was not found" >&2
    echo "hint: sudo apt install tensorrt, or TRTEXEC=/path/to/trtexec ./{shell}, or python3 {python}" >&2
    exit 2
fi
build() {{  # tower, input name, input shape without the batch
    "$TRTEXEC" --onnx="$1.onnx" --saveEngine="$1.engine.part" --stronglyTyped --skipInference \\
        --minShapes="$2:1x$3" --optShapes="$2:1x$3" --maxShapes="$2:{max_batch}x$3" \\
        --timingCacheFile=timing.cache --profilingVerbosity=detailed
    mv "$1.engine.part" "$1.engine"  # no engine is left half-written
    sha256sum "$1.onnx" "$1.engine" > "$1.engine{stamp}"  # only these two run together
}}
{calls}
"""

_PYTHON = '''#!/usr/bin/env python3
"""Builds this folder's engines on the device ({title}) with TensorRT's Python API: the same as {shell}."""
# The model is {name}.

import hashlib
import os
import sys
from pathlib import Path

import tensorrt as trt

HERE = Path(__file__).resolve().parent
TOWERS = {towers!r}  # tower, input name, input shape without the batch
MAX_BATCH = {max_batch}


def sha256_of(name):
    return hashlib.sha256((HERE / name).read_bytes()).hexdigest()


def check():
    for line in (HERE / "{checksums}").read_text().splitlines():
        digest, name = line.split("  ", 1)
        if sha256_of(name) != digest:
            sys.exit(f"error: {{name}} differs from the exported file\\nhint: copy the folder again")


def build(name, input_name, shape):
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse((HERE / f"{{name}}.onnx").read_bytes()):
        sys.exit(f"error: TensorRT {{trt.__version__}} cannot parse {{name}}.onnx: {{parser.get_error(0)}}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape(input_name, (1, *shape), (1, *shape), (MAX_BATCH, *shape))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit(f"error: TensorRT {{trt.__version__}} cannot build {{name}}.engine")
    part = HERE / f"{{name}}.engine.part"
    part.write_bytes(bytes(engine))
    os.replace(part, HERE / f"{{name}}.engine")
    files = (f"{{name}}.onnx", f"{{name}}.engine")
    stamp = "".join(f"{{sha256_of(file)}}  {{file}}\\n" for file in files)  # only these two run together
    (HERE / f"{{name}}.engine{stamp}").write_text(stamp)


check()
for tower in TOWERS:
    build(*tower)
'''


def write_build_files(folder: Path, manifest: Manifest, *, title: str) -> None:
    """Write the scripts that build the engines into a bundle's folder, which already holds the ONNX files.

    Args:
        folder: the bundle's.
        manifest: the bundle's, not yet written.
        title: name of the device, with the software that it needs.
    """
    shapes = {"image": (3, *manifest.preprocessing.size), "text": (manifest.tokenizer.context_length,)}
    towers = [(Path(tower.file).stem, tower.input_name, shapes[name]) for name, tower in manifest.towers.items()]
    calls = "\n".join(f"build {name} {input_name} {'x'.join(map(str, shape))}" for name, input_name, shape in towers)
    fields = {
        "name": printable(one_line(manifest.name)),  # in comments: it is a folder's name, which can be any text
        "title": title,
        "checksums": CHECKSUMS,
        "shell": BUILD_SHELL,
        "python": BUILD_PYTHON,
        "stamp": STAMP_SUFFIX,
    }
    write_text(folder / BUILD_SHELL, _SHELL.format(calls=calls, max_batch=MAX_BATCH, **fields))
    (folder / BUILD_SHELL).chmod(0o755)
    write_text(folder / BUILD_PYTHON, _PYTHON.format(towers=towers, max_batch=MAX_BATCH, **fields))
    files = [*(tower.file for tower in manifest.towers.values()), *([TOKENIZER] if manifest.text else [])]
    write_text(folder / CHECKSUMS, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in files))
