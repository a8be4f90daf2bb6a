"""The label bank of a bundle, labels.npz: `names` (C,) and prompt-averaged `embeddings` (C, D), float32 or float16.

In INT8, `levels` (C, D) int8 and `scales` (C, 1) float32 replace `embeddings`, which is their product. The different
keys make a reader without INT8 support refuse the file instead of misreading it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.io import write_bytes

LABELS = "labels.npz"
LabelPrecision = Literal["fp32", "fp16", "int8"]


class LabelBank(msgspec.Struct, frozen=True):
    """Label names and their embeddings, (C,) and (C, D)."""

    names: tuple[str, ...]
    embeddings: Embeddings


def write_labels(folder: Path, bank: LabelBank, *, precision: LabelPrecision = "fp32") -> None:
    """Write labels.npz. In `int8`, the largest entry of an embedding becomes level ±127, and its norm is preserved."""
    arrays: dict[str, npt.NDArray[np.generic]] = {"names": np.asarray(bank.names, dtype=np.str_)}
    if precision == "int8":
        max_abs = np.abs(bank.embeddings).max(axis=1, keepdims=True)
        levels = np.rint(bank.embeddings * (127 / np.where(max_abs > 0, max_abs, 1)))
        norms, level_norms = (np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank.embeddings, levels))
        arrays["levels"] = levels.astype(np.int8)
        arrays["scales"] = (norms / np.maximum(level_norms, 1)).astype(np.float32)
    else:
        arrays["embeddings"] = bank.embeddings.astype(np.float16 if precision == "fp16" else np.float32)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(folder / LABELS, buffer.getvalue())


def read_labels(folder: Path) -> LabelBank | None:
    """Return the bundle's label bank, or None if it has none.

    Raises:
        ConfigError: labels.npz is damaged.
    """
    path = folder / LABELS
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays["names"]
            embeddings = arrays["levels"] * arrays["scales"] if "levels" in arrays else arrays["embeddings"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ConfigError(f"{path} is not a label bank: {error}.", hint="export the bundle again") from error
    if embeddings.ndim != 2 or len(names) != len(embeddings):
        raise ConfigError(f"{path} has {len(names)} names for embeddings of shape {embeddings.shape}.")
    return LabelBank(tuple(str(name) for name in names), embeddings.astype(np.float32))
