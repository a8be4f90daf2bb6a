"""Fill a teacher's store without training: on this machine, on those of a torchrun job, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from clip_rd_edge.data.pairs import Pairs
from clip_rd_edge.data.unpaired import require_images
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.inputs import training_pairs
from clip_rd_edge.distillation.processes import join_processes
from clip_rd_edge.distillation.step import AUTOCAST
from clip_rd_edge.distillation.student import crops_of, require_named_student
from clip_rd_edge.distillation.teachers.embedding_store import CacheManifest, cache_folders
from clip_rd_edge.distillation.teachers.store_build import (
    BATCH_SIZE,
    Shard,
    ShardMaker,
    ShardTask,
    build_cache,
    shard_maker,
)
from clip_rd_edge.distillation.teachers.teacher import (
    Teacher,
    caption_batch_size,
    load_models_to_embed_with,
    teacher_weights,
)
from clip_rd_edge.errors import InputError
from clip_rd_edge.models.clip import ClipModel, default_device, float32_on_cpu
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.utils.cluster import map_on_cluster
from clip_rd_edge.utils.reporting import SILENT, Reporter


@float32_on_cpu()
def embed_teacher(config: RunConfig, folder: Path, *, cluster: str | None = None, reporter: Reporter = SILENT) -> None:
    """Compute what is missing in the store `folder`, for runs with this configuration's teachers, pairs and crops.

    Args:
        config: its `views` are those of the store, its `teacher_precision` is not `auto`.
        cluster: address of a Ray cluster, whose workers compute the shards; this process writes them.
        reporter: receives the number of completed shards.
    """
    with join_processes() as processes:
        shown = reporter if processes.is_main else SILENT
        with processes.main_first():
            require_named_student(config)
            pairs = training_pairs(config, reporter=shown)
            require_images(pairs)
        with processes.together():
            teachers = load_models_to_embed_with(config)
            folders = cache_folders(folder, teachers)
        for number, (clip, its_folder) in enumerate(zip(teachers, folders, strict=True)):
            with processes.together():
                maker = _maker(config, clip, pairs)
            compute = partial(_on_cluster, cluster, config, number, maker.manifest) if cluster else None
            build_cache(its_folder, maker, processes, compute=compute, reporter=shown)
            clip.model.to("cpu")


def _maker(config: RunConfig, clip: ClipModel, pairs: Pairs) -> ShardMaker:
    device = default_device()
    autocast, captions = AUTOCAST[config.teacher_precision], caption_batch_size(BATCH_SIZE, device)
    teacher = Teacher(clip, device, autocast=autocast, caption_batch=captions)
    return shard_maker(config, teacher, pairs, crops_of(config))


def _on_cluster(
    address: str, config: RunConfig, number: int, manifest: CacheManifest, tasks: Iterable[ShardTask]
) -> Iterator[tuple[ShardTask, Shard]]:
    tasks = list(tasks)
    yield from zip(tasks, map_on_cluster(address, partial(_make_worker, config, number, manifest), tasks), strict=True)


def _make_worker(config: RunConfig, number: int, manifest: CacheManifest) -> ShardMaker:
    """Return what computes shards of a teacher in a worker, whose data and teacher must be those of the store."""
    name = config.teachers[number]
    clip = load_clip(name, pretrained=teacher_weights(config, name))
    maker = _maker(config, clip, training_pairs(config))
    for field in ("teacher_sha256", "pairs_sha256"):
        if getattr(maker.manifest, field) != getattr(manifest, field):
            what = "teacher" if field == "teacher_sha256" else "data"
            raise InputError(f"The {what} here is not that of the store.", hint="give all machines the same files")
    return maker
