"""From a model to a bundle: export, check, quantise where asked, measure, and write it whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from clip_rd_edge.contract.bundle import LabelBank, Manifest, write_labels, write_manifest
from clip_rd_edge.contract.files import new_folder, refuse_unless_free
from clip_rd_edge.contract.zero_shot import label_embeddings
from clip_rd_edge.exporters.calibration import CalibrationSet
from clip_rd_edge.exporters.fp32 import write_fp32
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.ort import OrtEncoder


def _quietly(_: str) -> None:
    """Progress that nobody watches."""


def export_bundle(
    clip: ClipModel,
    output: Path,
    *,
    precision: Literal["fp32", "int8"],
    calibration: CalibrationSet | None = None,
    labels: Sequence[str] | None = None,
    provenance: dict[str, str],
    overwrite: bool = False,
    threads: int = 1,
    progress: Callable[[str], None] = _quietly,
) -> Manifest:
    """Export a model as a bundle.

    Args:
        output: the bundle's folder.
        provenance: where the model comes from, for the manifest.
        labels: names for a label bank, so that a device with fixed labels needs no text tower.
        overwrite: replace what stands at `output`.
        threads: threads that latencies are measured with.
        progress: told in a few words what is being done.

    Raises:
        UsageError: `output` is in use.
        ClipRdEdgeError: a tower cannot be exported, or the file does not do what the model does.
    """
    refuse_unless_free(output, overwrite=overwrite)
    with new_folder(output) as folder:
        manifest = write_fp32(clip, folder, provenance=provenance, threads=threads, progress=progress)
        if labels is not None:
            write_label_bank(folder, manifest, labels)
        return write_manifest(folder, manifest)


def write_label_bank(folder: Path, manifest: Manifest, labels: Sequence[str]) -> None:
    """Embed each label once by the bundle's own text tower and prompts, and write labels.npz."""
    names = tuple(dict.fromkeys(labels))
    embeddings = label_embeddings(OrtEncoder(folder, manifest), names, manifest.templates)
    write_labels(folder, LabelBank(names, embeddings))
