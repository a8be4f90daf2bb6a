"""Fill a teacher cache: shard by shard, by any number of processes, going on where an earlier build stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.data.pairs import Pairs
from clip_rd_edge.distill.cache import SHARD, CacheManifest, claim, fingerprint, missing_shards, shard_path, write_shard
from clip_rd_edge.distill.loader import View, ViewDataset, step_loader
from clip_rd_edge.distill.processes import Processes
from clip_rd_edge.distill.teacher import Teacher
from clip_rd_edge.models.clip import ClipModel

BATCH_SIZE = 64


def manifest_of(
    teacher: ClipModel, pairs: Pairs, *, crop_scale: tuple[float, float], seed: int, views: int, precision: str
) -> CacheManifest:
    """What a cache of this teacher over these pairs depends on."""
    return CacheManifest(
        teacher=teacher.name,
        teacher_sha256=weights_sha256(teacher),
        logit_scale=teacher.logit_scale,
        embedding_size=teacher.embedding_size,
        preprocessing=teacher.preprocessing,
        crop_scale=crop_scale,
        seed=seed,
        views=views,
        data=pairs.name,
        pairs=len(pairs),
        pairs_sha256=fingerprint(pairs),
        precision=precision,
    )


def build_cache(
    folder: Path,
    manifest: CacheManifest,
    teacher: Teacher,
    pairs: Pairs,
    processes: Processes,
    *,
    workers: int,
    max_bad: float,
    on_progress: Callable[[int, int], None],
) -> None:
    """Compute the shards that are missing in `folder`, this process its share of them.

    Args:
        on_progress: told of shards done and shards in all.

    Raises:
        UsageError: `folder` is a cache of something else.
    """
    if processes.first:
        claim(folder, manifest)
    processes.wait()
    dataset = ViewDataset(
        pairs,
        teacher.clip.preprocessing,
        None,
        crop_scale=manifest.crop_scale,
        seed=manifest.seed,
        views=manifest.views,
        max_bad=max_bad,
    )
    missing = missing_shards(folder, manifest)
    own = missing[processes.rank :: processes.count]
    processes.wait()  # before the first shard is written: all have to see the same ones missing
    for done, (view, shard) in enumerate(own):
        on_progress(done, len(own))
        path = shard_path(folder, view, shard)
        if path.is_file():
            continue  # another machine was faster
        indices = range(shard * SHARD, min((shard + 1) * SHARD, len(pairs)))
        views: list[View] = [(view, index) for index in indices]
        batches = [views[part] for part in in_batches(len(views), BATCH_SIZE)]
        images, texts = [], []
        for batch in step_loader(dataset, batches, workers=workers):
            images.append(teacher.embed_images(batch.student_pixels).float().cpu())
            texts.append(teacher.embed_captions(batch.captions).cpu())
        write_shard(path, torch.cat(images).numpy(), torch.cat(texts).numpy())
    on_progress(len(own), len(own))
    processes.wait()


def weights_sha256(clip: ClipModel) -> str:
    """SHA-256 of all weights in the order of their names, whatever they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
