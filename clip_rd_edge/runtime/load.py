"""Open a bundle as an encoder."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from clip_rd_edge.bundle.formats import FORMATS, RUNTIMES, encoder_of, format_of
from clip_rd_edge.bundle.manifest import (
    MANIFEST,
    Manifest,
    damaged_files,
    is_bundle,
    read_manifest,
    require_intact_manifest,
    require_intact_tower,
)
from clip_rd_edge.errors import UsageError
from clip_rd_edge.runtime.backends.onnxruntime import OPENVINO_PROCESSORS, PROVIDERS, import_onnxruntime
from clip_rd_edge.runtime.encoder import AUTO, BundleEncoder, RunOptions, require_threads


def load(
    bundle: str | os.PathLike[str],
    *,
    threads: int | None = None,
    runtime: str | None = None,
    device: str = AUTO,
    spin: bool = True,
    force: bool = False,
) -> BundleEncoder:
    """Open a bundle. Each tower is loaded when it is first used, and its checksum compared (see `bundle.manifest`).

    Args:
        bundle: the bundle's folder.
        threads: threads per tower; None leaves the choice to the runtime, which uses every core.
        runtime: the inference engine; None uses the one that the bundle was exported for. If its TensorRT engines
            cannot run here, the ONNX files that they were built from run on the CPU.
        device: one of `settings.deploying.Device`. `auto` chooses a GPU or OpenVINO if ONNX Runtime's package for it is
            installed, and the CPU otherwise, for INT8, and in OpenVINO itself. OpenVINO's devices run a bundle made for
            OpenVINO, or with `runtime="openvino"`, in OpenVINO itself, and others in ONNX Runtime, or in OpenVINO if
            only that is installed. `tensorrt` runs the engines of a bundle made for it, and others in ONNX Runtime.
            `describe().device` is the device chosen.
        spin: False for embedding many images in ONNX Runtime: see `backends.onnxruntime.open_session`.
        force: use a tower, with a warning, although this processor is known to compute its INT8 wrongly. Otherwise the
            first use raises UsageError.
    """
    folder = Path(bundle)
    if is_bundle(folder):
        folder = _without_links(folder)
    manifest = read_manifest(folder)
    require_intact_manifest(folder, manifest)
    if runtime is not None and runtime not in (*RUNTIMES, format_of(manifest.target).runtime):
        raise UsageError(f"Unknown runtime {runtime!r}; expected one of {', '.join(RUNTIMES)}.")
    return open_bundle(folder, manifest, threads=threads, runtime=runtime, device=device, spin=spin, force=force)


def copy_bundle(bundle: Path, manifest: Manifest, folder: Path) -> None:
    """Copy a bundle's manifest and the files that it lists, all as they were exported, into a new folder."""
    require_intact_manifest(bundle, manifest)
    if damaged := damaged_files(bundle, manifest):
        raise UsageError(f"The bundle {bundle} is damaged: {', '.join(damaged)}.", hint="copy or export it again")
    for tower in manifest.towers.values():
        require_intact_tower(bundle, manifest, tower)
    for name in (MANIFEST, *manifest.files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, folder / name)


def _without_links(folder: Path) -> Path:
    """Return the folder that a path leads to: what is read later is of the same bundle if a link is switched meanwhile.

    A path without links is returned as it was given, since messages name it.
    """
    real = folder.resolve()
    return folder if os.fspath(real) == os.path.abspath(folder) else real  # noqa: PTH100 — it removes `..`


def open_bundle(
    folder: Path,
    manifest: Manifest,
    *,
    threads: int | None = None,
    runtime: str | None = None,
    device: str = AUTO,
    spin: bool = True,
    force: bool = False,
) -> BundleEncoder:
    """Like `load`, for a bundle whose manifest has been read already."""
    require_threads(threads)
    engine = runtime or _runtime_for(device, manifest)
    _require_readable(manifest, engine)
    options = RunOptions(threads=threads, device=device, spin=spin, required=runtime is not None)
    encoder: BundleEncoder = encoder_of(engine)(folder, manifest, options)
    encoder.force = force
    return encoder


def _require_readable(manifest: Manifest, engine: str) -> None:
    """Raise UsageError if a runtime does not read the files of a bundle."""
    own = format_of(manifest.target)
    reads_onnx = any(info.runtime == engine and info.is_onnx for info in FORMATS.values())
    if engine != own.runtime and not (own.is_onnx and reads_onnx):
        raise UsageError(
            f"The runtime {engine} does not run this bundle, whose files are {'ONNX' if own.is_onnx else own.title}.",
            hint=f"omit the runtime: {own.runtime} runs it",
        )


def _runtime_for(device: str, manifest: Manifest) -> str:
    """Return the runtime that opens a bundle on a device."""
    info = format_of(manifest.target)
    own = info.runtime
    if device in (AUTO, own) or not info.is_onnx or (device == "cpu" and own != "tensorrt"):
        return own
    if device in OPENVINO_PROCESSORS and (own == "openvino" or _only_openvino_itself()):
        return "openvino"
    return FORMATS["onnx"].runtime  # the others are its devices, whatever the bundle was exported for


def _only_openvino_itself() -> bool:
    """Return whether the package openvino is installed, and ONNX Runtime has no provider for it."""
    available = import_onnxruntime().get_available_providers()
    return bool(find_spec("openvino")) and PROVIDERS["openvino"].name not in available
