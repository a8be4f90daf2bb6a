"""From what a user types for a model to an encoder: a bundle's folder, or anything that open_clip loads."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.contract.bundle import is_bundle
from clip_rd_edge.contract.encoder import TowerEncoder


def open_encoder(spec: str, *, pretrained: str | None = None, threads: int | None = None) -> TowerEncoder:
    """Open a bundle without torch, or a model with it.

    Args:
        spec: a bundle's folder, a run's folder (its student is meant), or what `models.load.load_clip` takes.
        threads: threads to run on; None takes every core.
    """
    path = Path(spec.removeprefix("local-dir:"))
    if is_bundle(path):
        from clip_rd_edge.runtime.load import load

        return load(path, threads=threads)
    import torch

    from clip_rd_edge.models.encoder import TorchEncoder
    from clip_rd_edge.models.load import load_clip

    if threads is not None:
        torch.set_num_threads(threads)
    folder = model_folder(spec)
    clip = load_clip(str(folder) if folder else spec, pretrained=pretrained)
    return TorchEncoder(clip, folder=folder)


def model_folder(spec: str) -> Path | None:
    """The open_clip folder that is meant: given itself, or as `student/` in a run's folder; None for other specs."""
    path = Path(spec.removeprefix("local-dir:"))
    for candidate in (path, path / "student"):
        if (candidate / "open_clip_config.json").is_file():
            return candidate
    return None
