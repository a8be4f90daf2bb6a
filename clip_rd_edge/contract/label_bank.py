"""The label bank of a bundle, labels.npz: `names` (C,) and prompt-averaged `embeddings` (C, D), float32 or float16.

In INT8, `levels` (C, D) int8 and `scales` (C, 1) float32 replace `embeddings`, which is their product. The different
keys make a reader without INT8 support refuse the file instead of misreading it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.bundle import LABELS
from clip_rd_edge.contract.encoder import Embeddings, require_labels
from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.utils.arrays import npz_bytes, read_npz
from clip_rd_edge.utils.files import write_bytes

MAX_BYTES = 1 << 28  # of an array of labels.npz: 65,536 labels of 1,024 float32 entries
LabelPrecision = Literal["fp32", "fp16", "int8"]


class LabelBank(msgspec.Struct, frozen=True):
    """Label names and their embeddings, (C,) and (C, D)."""

    names: tuple[str, ...]
    embeddings: Embeddings

    def find(self, labels: Sequence[str]) -> Embeddings | None:
        """Return the embeddings of labels in their order, or None if one is not in the bank."""
        rows = {name: row for row, name in enumerate(self.names)}
        if not all(label in rows for label in labels):
            return None
        return self.embeddings[[rows[label] for label in labels]]


def require_readable(names: Sequence[str], size: int, precision: LabelPrecision) -> None:
    """Refuse labels that cannot be stored, or whose bank `read_labels` would refuse, before they are embedded.

    Args:
        names: the labels.
        size: of their embeddings.
    """
    require_labels(names)
    rows = MAX_BYTES // (size * {"fp32": 4, "fp16": 2, "int8": 1}[precision])
    if len(names) > rows:
        raise InputError(
            f"There are {len(names):,} labels; a bundle holds at most {rows:,} with embeddings of {size} numbers.",
            hint="leave some out, or export without them and pass them when classifying",
        )
    longest = max(names, key=len, default="")
    if 4 * len(longest) * len(names) > MAX_BYTES:  # NumPy pads all of them to it, with four bytes per character
        raise InputError(
            f"One of {len(names):,} labels is too long for so many: {len(longest):,} characters, beginning with "
            f"{longest[:40]!r}.",
            hint="shorten it",
        )
    if cut := [name for name in names if name.endswith("\0")]:  # which NumPy drops
        raise InputError(f"The label {cut[0]!r} ends in a NUL character.", hint="write it anew, without it")


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
    write_bytes(folder / LABELS, npz_bytes(compressed=True, **arrays))


def read_labels(folder: Path) -> LabelBank | None:
    """Return the bundle's label bank, or None if it has none."""
    path = folder / LABELS
    if not path.is_file():
        return None
    arrays = read_npz(path, max_bytes=MAX_BYTES, hint="export the bundle again")
    names = arrays.get("names")
    embeddings = arrays.get("embeddings")
    if "levels" in arrays and "scales" in arrays:
        levels, scales = arrays["levels"], arrays["scales"]
        if levels.dtype != np.int8 or levels.ndim != 2 or scales.shape != (len(levels), 1):
            raise _damaged(path, f"levels have shape {levels.shape} and scales {scales.shape}")
        embeddings = levels * scales
    if names is None or embeddings is None:
        raise _damaged(path, f"it has the arrays {', '.join(arrays) or 'none'}")
    if names.dtype.kind != "U" or names.ndim != 1 or embeddings.dtype.kind != "f":
        raise _damaged(path, f"names have the type {names.dtype}, embeddings {embeddings.dtype}")
    if embeddings.ndim != 2 or len(names) != len(embeddings):
        raise ConfigError(f"{path} has {len(names)} names for embeddings of shape {embeddings.shape}.")
    if not len(names):
        raise _damaged(path, "it has no labels")
    if not np.isfinite(embeddings).all():
        raise _damaged(path, "an embedding has an entry that is not a finite number")
    return LabelBank(tuple(str(name) for name in names), embeddings.astype(np.float32))


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"The labels in {path} cannot be read: {reason}.", hint="export the bundle again")
