"""What a finished student carries with it: where it comes from, and how its pairs stand apart."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import msgspec
import numpy as np

from clip_rd_edge.contract.checkpoint import WEIGHTS_FILE, model_folder
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.data.pairs import BadSamples
from clip_rd_edge.distill.config import RunConfig
from clip_rd_edge.distill.ingredients import Ingredients
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.utils.io import sha256_of

PACKAGES = ("clip-rd-edge", "torch", "open_clip_torch", "timm", "numpy", "pillow")
_SAMPLES_OF_FIGURES = 512


def provenance(config: RunConfig, of: Ingredients, *, steps: int) -> dict[str, Any]:
    """Recipe, teacher, data, seed, versions: the content of distillation.json."""
    folder = model_folder(config.teacher) if of.teacher and config.teacher else None
    weights = folder / WEIGHTS_FILE if folder else None
    return {
        "recipe": config.recipe_name,
        "configuration": msgspec.to_builtins(config),
        "teacher": of.teacher.name if of.teacher else None,
        "teacher_sha256": sha256_of(weights) if weights and weights.is_file() else None,
        "data": config.data,
        "pairs": len(of.pairs),
        "steps": steps,
        "seed": config.seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {name: version(name) for name in PACKAGES},
    }


def similarities(config: RunConfig, of: Ingredients) -> dict[str, tuple[Embeddings, Embeddings]]:
    """Image and text embeddings of some pairs, (N, D) each, by student and teacher, for the histograms."""
    chosen = np.random.default_rng(0).permutation(len(of.pairs))[:_SAMPLES_OF_FIGURES]
    bad = BadSamples(of.pairs, max_share=config.max_bad)
    sound = [bad.take(int(i)) for i in chosen]
    images, captions = [pair.image for pair in sound], [pair.captions[0] for pair in sound]
    models = {"student": of.student, **({"teacher": of.teacher} if of.teacher else {})}
    encoders = {who: TorchEncoder(clip) for who, clip in models.items()}
    return {who: (e.encode_images(images), e.encode_texts(captions)) for who, e in encoders.items()}
