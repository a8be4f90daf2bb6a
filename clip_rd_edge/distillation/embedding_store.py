"""The teacher's embeddings, computed once and read back: (seed, view, index) determines the view of a pair.

    manifest.json          what the embeddings depend on, and how they are sharded
    view-V/shard-S.npz     `image` and `text`, (n, D) float16, for the pairs S · SHARD_SIZE to S · SHARD_SIZE + n

With a cache, epoch e shows view e mod V: the same crops and captions return every V epochs, and the teacher is not even
loaded. A cache is rejected if anything differs that its embeddings depend on. Shards are written atomically, so several
processes or machines can build one cache together, and an interrupted build continues where it stopped.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.contract.preprocess import Preprocessing
from clip_rd_edge.data.pairs import Pairs
from clip_rd_edge.distillation.distributed import Processes
from clip_rd_edge.distillation.loader import HalfArray, View, ViewDataset, step_loader
from clip_rd_edge.distillation.teacher import Teacher
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.utils.io import read_json, to_json, write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter

MANIFEST = "manifest.json"
SHARD_SIZE = 4096  # pairs per shard: 4 MiB per tower at D = 512


class CacheManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the embeddings of a cache depend on.

    Attributes:
        teacher_sha256: of all of the teacher's weights, in the order of their names.
        pairs_sha256: of what identifies the pairs; see `data.pairs.Pairs.identity`.
        views: number of distinct views (crop and caption) of each pair.
        precision: precision that the teacher computed in.
    """

    teacher: str
    teacher_sha256: str
    logit_scale: float
    embedding_size: int
    preprocessing: Preprocessing
    crop_scale: tuple[float, float]
    seed: int
    views: int
    data: str
    pairs: int
    pairs_sha256: str
    precision: str


class TeacherCache:
    """Reads a complete cache. Shards are loaded on first use.

    Args:
        folder: a cache without missing shards.
    """

    def __init__(self, folder: Path, manifest: CacheManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._shards: dict[tuple[int, int], tuple[HalfArray, HalfArray]] = {}

    def lookup(self, epoch: int, index: int) -> tuple[HalfArray, HalfArray]:
        """Return the teacher's image and text embedding of a pair in an epoch, (D,) each."""
        key = (epoch % self.manifest.views, index // SHARD_SIZE)
        if key not in self._shards:
            with np.load(shard_path(self.folder, *key)) as arrays:
                self._shards[key] = (arrays["image"], arrays["text"])
        image, text = self._shards[key]
        return image[index % SHARD_SIZE], text[index % SHARD_SIZE]


def pairs_sha256(pairs: Pairs) -> str:
    """SHA-256 of what identifies the pairs. It reads no sample, so a run over millions of pairs starts at once."""
    digest = hashlib.sha256(f"{pairs.name}\n{len(pairs)}\n".encode())
    for part in pairs.identity():
        digest.update(part + b"\x1e")
    return digest.hexdigest()


def shard_count(pairs: int) -> int:
    """Return the number of shards per view."""
    return -(-pairs // SHARD_SIZE)


def shard_path(folder: Path, view: int, shard: int) -> Path:
    """Return the path of a shard."""
    return folder / f"view-{view:03d}" / f"shard-{shard:05d}.npz"


def missing_shards(folder: Path, manifest: CacheManifest) -> list[tuple[int, int]]:
    """Return (view, shard) of each shard that has not been computed."""
    shards = [(view, shard) for view in range(manifest.views) for shard in range(shard_count(manifest.pairs))]
    return [key for key in shards if not shard_path(folder, *key).is_file()]


def claim_folder(folder: Path, manifest: CacheManifest) -> None:
    """Write the manifest into a new cache `folder`, or check that an existing cache has the same one.

    Raises:
        UsageError: the folder is a cache with another manifest (the first difference is named), or not a cache.
    """
    path = folder / MANIFEST
    if path.is_file():
        existing = read_json(path, CacheManifest)
        for name in CacheManifest.__struct_fields__:
            actual, expected = getattr(existing, name), getattr(manifest, name)
            if actual != expected:
                raise UsageError(
                    f"The teacher cache {folder} was made with another {name}: {actual}, but this run has {expected}.",
                    hint="choose another --teacher-cache, or use the options that it was made with",
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is neither empty nor a teacher cache.", hint="choose another --teacher-cache")
    else:
        write_bytes(path, to_json(manifest))


def write_shard(path: Path, image: npt.NDArray[np.floating], text: npt.NDArray[np.floating]) -> None:
    """Write a shard as float16, atomically."""
    import io

    buffer = io.BytesIO()
    np.savez(buffer, image=image.astype(np.float16), text=text.astype(np.float16))
    write_bytes(path, buffer.getvalue())


def open_cache(folder: Path) -> TeacherCache:
    """Open a complete cache.

    Raises:
        ConfigError: the manifest cannot be read, or shards are missing.
    """
    manifest = read_json(folder / MANIFEST, CacheManifest)
    if missing := missing_shards(folder, manifest):
        raise ConfigError(f"The teacher cache {folder} lacks {len(missing)} shards.", hint="finish building it first")
    return TeacherCache(folder, manifest)


BATCH_SIZE = 64
CACHING_STAGE = "caching the teacher's embeddings (shards)"  # name of the stage in progress reports


def make_manifest(
    teacher: ClipModel, pairs: Pairs, *, crop_scale: tuple[float, float], seed: int, views: int, precision: str
) -> CacheManifest:
    """Return the manifest of a cache of this teacher over these pairs."""
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
        pairs_sha256=pairs_sha256(pairs),
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
    reporter: Reporter = SILENT,
) -> None:
    """Compute the missing shards in `folder`; each process computes its share of them.

    Args:
        workers: loader processes; see `step_loader`.
        max_bad: max fraction of the samples that may be unreadable.
        reporter: receives the number of completed shards.

    Raises:
        UsageError: `folder` is a cache with another manifest, or not a cache.
    """
    if processes.is_main:
        claim_folder(folder, manifest)
    processes.barrier()
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
    shards = missing[processes.rank :: processes.world_size]
    processes.barrier()  # before the first shard is written, so that all processes list the same missing shards
    for done, (view, shard) in enumerate(shards):
        reporter.update(CACHING_STAGE, done, len(shards))
        path = shard_path(folder, view, shard)
        if path.is_file():
            continue  # another machine computed it first
        indices = range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, len(pairs)))
        views: list[View] = [(view, index) for index in indices]
        batches = [views[part] for part in in_batches(len(views), BATCH_SIZE)]
        images, texts = [], []
        for batch in step_loader(dataset, batches, workers=workers):
            images.append(teacher.embed_images(batch.student_pixels).float().cpu())
            texts.append(teacher.embed_captions(batch.captions).cpu())
        write_shard(path, torch.cat(images).numpy(), torch.cat(texts).numpy())
    reporter.update(CACHING_STAGE, len(shards), len(shards))
    processes.barrier()


def weights_sha256(clip: ClipModel) -> str:
    """SHA-256 of all weights in the order of their names, independent of the file they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
