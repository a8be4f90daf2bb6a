"""The teacher of a run: its models, which embed batches as they come, or a store that they fill first."""

from __future__ import annotations

from pathlib import Path

import torch

from clip_rd_edge.distillation.batches.loader import ViewDataset
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.inputs import RunSetup, make_dataset
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.step import AUTOCAST, caption_batch
from clip_rd_edge.distillation.teachers.choosing import ChoosingTeacher, texts_to_choose_from
from clip_rd_edge.distillation.teachers.embedding_store import cache_folders, open_caches
from clip_rd_edge.distillation.teachers.store_build import build_cache, shard_maker
from clip_rd_edge.distillation.teachers.teacher import BatchTeacher, CachedTeacher, LiveTeacher, Teacher
from clip_rd_edge.utils.reporting import Reporter


def prepare_teacher(
    config: RunConfig, setup: RunSetup, processes: Processes, reporter: Reporter
) -> tuple[BatchTeacher | None, ViewDataset]:
    """Return the teacher, live or from a cache that is built first, and the data set that provides its inputs."""
    if setup.ensemble is None:
        return None, make_dataset(config, setup)
    if setup.stored is not None:
        return CachedTeacher(setup.ensemble, processes.device), make_dataset(config, setup)
    teachers = make_teachers(config, setup, processes.device, AUTOCAST[config.teacher_precision])
    live = LiveTeacher(teachers)
    teacher: BatchTeacher = live
    dataset = make_dataset(config, setup, with_teacher_pixels=config.teacher_cache is None)
    if config.teacher_cache is not None:
        with processes.together():
            folders = cache_folders(Path(config.teacher_cache), setup.teachers)
        for folder, one in zip(folders, teachers, strict=True):
            build_cache(folder, shard_maker(config, one, setup.pairs, dataset.crops), processes, reporter=reporter)
        dataset.cache = open_caches(folders)
        teacher = CachedTeacher(setup.ensemble, processes.device)
    with processes.together():
        texts = texts_to_choose_from(config, setup.pairs)
    if texts:
        reporter.say(f"the teacher chooses among {len(texts):,} texts for each image without a caption")
        teacher = ChoosingTeacher(teacher, texts, live.embed_captions, reporter=reporter)
    if config.teacher_cache is not None:
        for one in teachers:
            one.clip.model.to("cpu")
    return teacher, dataset


def make_teachers(
    config: RunConfig, setup: RunSetup, device: torch.device, autocast: torch.dtype | None
) -> list[Teacher]:
    """Return the teachers of a run, on a device and in a precision."""
    captions = caption_batch(config, device)
    return [Teacher(clip, device, autocast=autocast, caption_batch=captions) for clip in setup.teachers]
