"""Shards in MobileCLIP's format, made by hand from its documentation."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support import write_tar

PAIRS, AUGMENTATIONS, SYNTHETIC, WIDTHS, SIZE = 12, 3, 2, (5, 4), 40


def units(rows: int, seed: int, widths: Sequence[int] = WIDTHS) -> np.ndarray:
    """Embeddings of teachers side by side, each a unit vector."""
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((rows, width)) for width in widths]
    return np.concatenate([p / np.linalg.norm(p, axis=1, keepdims=True) for p in parts], axis=1).astype(np.float32)


def augmentations(number: int) -> list[Any]:
    """Two crops with two operations each, and one without."""
    rng = np.random.default_rng(number)
    drawn: list[Any] = [
        [[int(rng.integers(8)), int(rng.integers(8)), 30 + k, 28], [[int(rng.integers(14)), 0.3], [5, -12.0]]]
        for k in range(AUGMENTATIONS - 1)
    ]
    return [*drawn, [[0, 0, 40, 40], None]]


def sample_files(number: int, kind: str, widths: Sequence[int]) -> dict[str, bytes]:
    image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (48, 44, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    parameters = augmentations(number)
    texts = units(1 + SYNTHETIC, 100 + number, widths)
    arrays = {"image_emb": units(AUGMENTATIONS, number, widths), "text_emb": texts}
    if kind == "second":  # as MobileCLIP2's generator writes it
        arrays |= {"text_emb": texts[:1], "syn_text_emb": texts[1:]}
    content = io.BytesIO()
    if kind == "torch":
        torch.save({name: torch.tensor(array).bfloat16() for name, array in arrays.items()}, content)
        embeddings = {"pth.gz": gzip.compress(content.getvalue())}
    else:
        np.savez(content, **arrays)
        embeddings = {"npz": content.getvalue()}
    described = parameters if kind == "second" else json.dumps(parameters)  # DataCompDR has a JSON text
    synthetic = {"syn_text": [f"synthetic {number} {k}" for k in range(SYNTHETIC)]}
    if kind == "second":
        synthetic["syn_text_other"] = ["without an embedding"]
    return {
        "png": buffer.getvalue(),
        "json": b"{}",
        **embeddings,
        "paug.json": json.dumps({"param_aug": described}).encode(),
        "syn.json": json.dumps(synthetic).encode(),
        "txt": f"own {number}".encode(),
        "url.txt": b"https://example.org",
    }


def write_shard(
    path: Path,
    kind: str = "first",
    change: Callable[[int, dict[str, bytes]], None] = lambda *_: None,
    widths: Sequence[int] = WIDTHS,
) -> str:
    """Write a shard of PAIRS samples, with changes to their files, and return its path."""
    members = {}
    for number in range(PAIRS):
        files = sample_files(number, kind, widths)
        change(number, files)
        members |= {f"{number:04d}.{suffix}": content for suffix, content in files.items()}
    return str(write_tar(path, members))


def describe_teachers(path: Path, widths: Sequence[int] = WIDTHS, **more: Any) -> Path:
    """Write the file that says whose embeddings these are."""
    described = [
        {"name": f"teacher-{k}", "embedding_size": width, "logit_scale": scale}
        for k, (width, scale) in enumerate(zip(widths, (70, 60), strict=True))
    ]
    path.write_text(json.dumps({"teachers": described, "image_size": SIZE, **more}))
    return path
