"""The teacher's embeddings, computed once and replayed: what a view of a pair is follows from (seed, view, index).

    manifest.json          what the embeddings depend on, and how they are cut
    view-V/shard-S.npz     `image` and `text`, (n, D) float16, of the pairs S · SHARD to S · SHARD + n

With a cache, epoch e shows view e mod V: the same crops and captions come again every V epochs, and the teacher is not
even loaded. A cache is refused when anything differs that its embeddings depend on. Shards are written whole or not at
all, so many processes or machines may build one together, and an interrupted build goes on where it stopped.
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
from clip_rd_edge.distillation.loader import Half, View, ViewDataset, step_loader
from clip_rd_edge.distillation.teacher import Teacher
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.utils.io import read_json, to_json, write_bytes
from clip_rd_edge.utils.reporting import SILENT, Reporter

MANIFEST = "manifest.json"
SHARD = 4096  # pairs a shard: 4 MiB at D = 512


class CacheManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the embeddings of a cache depend on.

    Attributes:
        teacher_sha256: of the teacher's weights, all of them in the order of their names.
        pairs_sha256: of what tells the pairs from others: see `data.pairs.Pairs.identity`.
        views: different crops and captions of each pair.
        precision: what the teacher computed in.
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
    """Reads a finished cache; its arrays are read from disk as they are needed.

    Args:
        folder: a cache whose shards are all there.
    """

    def __init__(self, folder: Path, manifest: CacheManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._shards: dict[tuple[int, int], tuple[Half, Half]] = {}

    def row(self, epoch: int, index: int) -> tuple[Half, Half]:
        """The teacher's picture and text embedding of a pair, (D,) each, as shown in an epoch."""
        key = (epoch % self.manifest.views, index // SHARD)
        if key not in self._shards:
            with np.load(shard_path(self.folder, *key)) as arrays:
                self._shards[key] = (arrays["image"], arrays["text"])
        image, text = self._shards[key]
        return image[index % SHARD], text[index % SHARD]


def fingerprint(pairs: Pairs) -> str:
    """SHA-256 of what pairs are. No sample is read for it: a run over millions begins at once."""
    digest = hashlib.sha256(f"{pairs.name}\n{len(pairs)}\n".encode())
    for part in pairs.identity():
        digest.update(part + b"\x1e")
    return digest.hexdigest()


def shard_count(pairs: int) -> int:
    """Shards of one view."""
    return -(-pairs // SHARD)


def shard_path(folder: Path, view: int, shard: int) -> Path:
    """Where a shard lies."""
    return folder / f"view-{view:03d}" / f"shard-{shard:05d}.npz"


def missing_shards(folder: Path, manifest: CacheManifest) -> list[tuple[int, int]]:
    """(view, shard) of what is still to be computed."""
    every = [(view, shard) for view in range(manifest.views) for shard in range(shard_count(manifest.pairs))]
    return [key for key in every if not shard_path(folder, *key).is_file()]


def claim(folder: Path, wanted: CacheManifest) -> None:
    """Make `folder` a cache of what is wanted, or check that it is one.

    Raises:
        UsageError: it is a cache of something else (the first difference is named), or a folder with other things.
    """
    path = folder / MANIFEST
    if path.is_file():
        there = read_json(path, CacheManifest)
        for name in CacheManifest.__struct_fields__:
            have, want = getattr(there, name), getattr(wanted, name)
            if have != want:
                raise UsageError(
                    f"The teacher cache {folder} was made with another {name}: {have}, but this run has {want}.",
                    hint="give another --teacher-cache, or the options that it was made with",
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty, and no teacher cache.", hint="give another --teacher-cache")
    else:
        write_bytes(path, to_json(wanted))


def write_shard(path: Path, image: npt.NDArray[np.floating], text: npt.NDArray[np.floating]) -> None:
    """Write a shard as float16, whole or not at all."""
    import io

    buffer = io.BytesIO()
    np.savez(buffer, image=image.astype(np.float16), text=text.astype(np.float16))
    write_bytes(path, buffer.getvalue())


def open_cache(folder: Path) -> TeacherCache:
    """Open a finished cache.

    Raises:
        ConfigError: shards are missing, or one cannot be read.
    """
    manifest = read_json(folder / MANIFEST, CacheManifest)
    if missing := missing_shards(folder, manifest):
        raise ConfigError(f"The teacher cache {folder} lacks {len(missing)} shards.", hint="build it to its end first")
    return TeacherCache(folder, manifest)


BATCH_SIZE = 64
STORING = "storing the teacher's embeddings, in shards"  # the stage that a reporter is told


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
    reporter: Reporter = SILENT,
) -> None:
    """Compute the shards that are missing in `folder`, this process its share of them.

    Args:
        reporter: told how many shards are done.

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
        reporter.update(STORING, done, len(own))
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
    reporter.update(STORING, len(own), len(own))
    processes.wait()


def weights_sha256(clip: ClipModel) -> str:
    """SHA-256 of all weights in the order of their names, whatever they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
