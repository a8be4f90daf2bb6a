"""From what a user types for a model to an encoder: a bundle's folder, or anything that open_clip loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clip_rd_edge.contract.bundle import is_bundle
from clip_rd_edge.contract.checkpoint import model_folder
from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.errors import UsageError

if TYPE_CHECKING:
    from clip_rd_edge.benchmark.suite import RowRuntime


def open_encoder(
    spec: str, *, pretrained: str | None = None, threads: int | None = None, runtime: RowRuntime | None = None
) -> TowerEncoder:
    """Open a bundle without torch, or a model with it.

    Args:
        spec: a bundle's folder, a run's folder (its student is meant), or what `models.load.load_clip` takes.
        threads: threads to run on; None takes every core.
        runtime: what runs it; None takes eager torch, or what the bundle was exported for.

    Raises:
        UsageError: a bundle is to run in torch, or a model in a runtime for bundles.
    """
    path = Path(spec.removeprefix("local-dir:"))
    if is_bundle(path):
        if runtime == "torch" or runtime == "torch-compile":
            raise UsageError(f"{spec} is a bundle, which torch does not run.", hint="name the model it was made from")
        from clip_rd_edge.runtime.load import load

        return load(path, threads=threads, runtime=runtime)
    if runtime not in (None, "torch", "torch-compile"):
        raise UsageError(f"{spec} is no bundle: {runtime} cannot run it.", hint="clip-rd-edge export makes one")
    import torch

    from clip_rd_edge.models.encoder import CompiledEncoder, TorchEncoder
    from clip_rd_edge.models.load import load_clip

    if threads is not None:
        torch.set_num_threads(threads)
    kind = CompiledEncoder if runtime == "torch-compile" else TorchEncoder
    return kind(load_clip(spec, pretrained=pretrained), folder=model_folder(spec))


def first_answer(spec: str, runtime: RowRuntime | None, threads: int) -> list[str]:
    """The command of a process that answers once, for `benchmarking.cold`; a picture's path is to be its last word."""
    return [sys.executable, "-m", "clip_rd_edge.cli._first_answer", spec, runtime or "", str(threads)]
