"""labels.npz of a bundle: `names` (C,) and their prompt-averaged `embeddings` (C, D); in float32 or in float16."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.contract.files import write_bytes
from clip_rd_edge.errors import ConfigError

LABELS = "labels.npz"


class LabelBank(msgspec.Struct, frozen=True):
    """Names and their embeddings, (C,) and (C, D)."""

    names: tuple[str, ...]
    embeddings: Embeddings


def write_labels(folder: Path, bank: LabelBank, *, half: bool = False) -> None:
    """Write labels.npz.

    Args:
        half: in float16: half the size, and an error far below what quantising the text tower costs. Otherwise in
            float32, so that probabilities are those of the text tower.
    """
    import io

    buffer = io.BytesIO()
    embeddings = bank.embeddings.astype(np.float16 if half else np.float32)
    np.savez_compressed(buffer, names=np.asarray(bank.names, dtype=np.str_), embeddings=embeddings)
    write_bytes(folder / LABELS, buffer.getvalue())


def read_labels(folder: Path) -> LabelBank | None:
    """The bundle's label bank, or None where it has none.

    Raises:
        ConfigError: labels.npz is damaged.
    """
    path = folder / LABELS
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names, embeddings = arrays["names"], arrays["embeddings"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ConfigError(f"{path} is not a label bank: {error}.", hint="export the bundle again") from error
    if embeddings.ndim != 2 or len(names) != len(embeddings):
        raise ConfigError(f"{path} has {len(names)} names for embeddings of shape {embeddings.shape}.")
    return LabelBank(tuple(str(name) for name in names), embeddings.astype(np.float32))
