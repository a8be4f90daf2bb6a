"""Label banks, made by the bundle's own text tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_rd_edge.contract.bundle import Manifest
from clip_rd_edge.contract.encoder import label_embeddings
from clip_rd_edge.contract.label_bank import LabelBank, LabelPrecision, write_labels
from clip_rd_edge.runtime.loading import encoder_of


def write_label_bank(folder: Path, manifest: Manifest, labels: Sequence[str]) -> None:
    """Embed each label once by the bundle's own text tower and prompts, and write labels.npz; the manifest comes after.

    They are stored in the precision of the tower that made them: INT8 costs them less than it cost the tower.

    Raises:
        InputError: no labels, or an empty one.
    """
    names = tuple(dict.fromkeys(labels))
    embeddings = label_embeddings(encoder_of(folder, manifest, device="cpu"), names, manifest.templates)
    tower = manifest.text.precision
    precision: LabelPrecision = "fp32" if tower == "fp32" else "int8" if tower.startswith("int8") else "fp16"
    write_labels(folder, LabelBank(names, embeddings), precision=precision)
