"""From what a user types for a model to an encoder: a bundle's folder, or anything that open_clip loads."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.contract.bundle import is_bundle
from clip_rd_edge.contract.checkpoint import model_folder
from clip_rd_edge.contract.encoder import TowerEncoder


def open_encoder(spec: str, *, pretrained: str | None = None, threads: int | None = None) -> TowerEncoder:
    """Open a bundle without torch, or a model with it.

    Args:
        spec: a bundle's folder, a run's folder (its student is meant), or what `models.load.load_clip` takes.
        threads: threads to run on; None takes every core.
    """
    path = Path(spec.removeprefix("local-dir:"))
    if is_bundle(path):
        from clip_rd_edge.runtime.loading import load

        return load(path, threads=threads)
    import torch

    from clip_rd_edge.models.encoder import TorchEncoder
    from clip_rd_edge.models.load import load_clip

    if threads is not None:
        torch.set_num_threads(threads)
    return TorchEncoder(load_clip(spec, pretrained=pretrained), folder=model_folder(spec))
