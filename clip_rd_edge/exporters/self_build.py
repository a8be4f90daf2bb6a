"""What a device needs to build its engines: an engine fits only the GPU and the TensorRT that it was built with.

Beside the strongly typed ONNX files lie `build.sh` (trtexec), `build.py` (TensorRT's Python, where there is no
trtexec) and `SHA256SUMS`; none of them needs clip-rd-edge. Never imports torch.
"""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.contract.bundle import TOKENIZER, Manifest
from clip_rd_edge.utils.io import sha256_of, write_text

BUILD_SHELL, BUILD_PYTHON, CHECKSUMS = "build.sh", "build.py", "SHA256SUMS"
MAX_BATCH = 8

_SHELL = """#!/usr/bin/env bash
# Builds the engines of {name} on {title}. Run it there; it takes minutes.
set -euo pipefail
cd "$(dirname "$0")"
sha256sum --check --quiet {checksums}
TRTEXEC="${{TRTEXEC:-/usr/src/tensorrt/bin/trtexec}}"
if ! command -v "$TRTEXEC" > /dev/null; then
    echo "error: there is no $TRTEXEC" >&2
    echo "hint: sudo apt install tensorrt, or TRTEXEC=/path/to/trtexec ./{shell}, or python3 {python}" >&2
    exit 2
fi
build() {{  # tower, input, shape without the batch
    "$TRTEXEC" --onnx="$1.onnx" --saveEngine="$1.engine.part" --stronglyTyped --skipInference \\
        --minShapes="$2:1x$3" --optShapes="$2:1x$3" --maxShapes="$2:{max_batch}x$3" \\
        --timingCacheFile=timing.cache --profilingVerbosity=detailed
    mv "$1.engine.part" "$1.engine"  # an engine is there whole or not at all
}}
{calls}
"""

_PYTHON = '''#!/usr/bin/env python3
"""Builds the engines of {name} on {title} with TensorRT's Python: the same as {shell}."""

import hashlib
import os
import sys
from pathlib import Path

import tensorrt as trt

HERE = Path(__file__).resolve().parent
TOWERS = {towers!r}  # name, input, shape without the batch
MAX_BATCH = {max_batch}


def check():
    for line in (HERE / "{checksums}").read_text().splitlines():
        digest, name = line.split("  ", 1)
        if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != digest:
            sys.exit(f"error: {{name}} is not the file that was exported\\nhint: copy the folder again")


def build(name, given, shape):
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse((HERE / f"{{name}}.onnx").read_bytes()):
        sys.exit(f"error: TensorRT {{trt.__version__}} does not take {{name}}.onnx: {{parser.get_error(0)}}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    profile.set_shape(given, (1, *shape), (1, *shape), (MAX_BATCH, *shape))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        sys.exit(f"error: TensorRT {{trt.__version__}} cannot build {{name}}.engine")
    part = HERE / f"{{name}}.engine.part"
    part.write_bytes(bytes(engine))
    os.replace(part, HERE / f"{{name}}.engine")


check()
for tower in TOWERS:
    build(*tower)
'''


def write_build_files(folder: Path, manifest: Manifest, *, title: str) -> None:
    """Write what builds both engines into a bundle's folder, whose ONNX files are there already.

    Args:
        manifest: of the bundle, not yet written.
        title: of the device, with the software that it needs.
    """
    towers = [
        (Path(manifest.image.file).stem, manifest.image.input_name, (3, *manifest.preprocessing.size)),
        (Path(manifest.text.file).stem, manifest.text.input_name, (manifest.tokenizer.context_length,)),
    ]
    calls = "\n".join(f"build {name} {given} {'x'.join(map(str, shape))}" for name, given, shape in towers)
    names = {
        "name": manifest.name,
        "title": title,
        "checksums": CHECKSUMS,
        "shell": BUILD_SHELL,
        "python": BUILD_PYTHON,
    }
    write_text(folder / BUILD_SHELL, _SHELL.format(calls=calls, max_batch=MAX_BATCH, **names))
    (folder / BUILD_SHELL).chmod(0o755)
    write_text(folder / BUILD_PYTHON, _PYTHON.format(towers=towers, max_batch=MAX_BATCH, **names))
    files = (manifest.image.file, manifest.text.file, TOKENIZER)
    write_text(folder / CHECKSUMS, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in files))
