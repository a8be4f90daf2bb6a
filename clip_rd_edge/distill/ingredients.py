"""What a run is made of, loaded and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from clip_rd_edge.contract.checkpoint import model_folder
from clip_rd_edge.data.pairs import Pairs, load_pairs, require_batch
from clip_rd_edge.distill.config import RunConfig
from clip_rd_edge.distill.loader import ViewDataset
from clip_rd_edge.distill.processes import Processes
from clip_rd_edge.distill.quantized import require_convolutions, require_fit
from clip_rd_edge.distill.state import seed_everything
from clip_rd_edge.errors import UsageError
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.student import build_student, start_image_tower, start_text_tower, student_config


@dataclass(frozen=True)
class Ingredients:
    """Pairs, models and objective of a run; `teacher` is None where the objective needs none."""

    pairs: Pairs
    teacher: ClipModel | None
    student: ClipModel
    objective: Objective


def load_ingredients(
    config: RunConfig,
    *,
    name: str,
    processes: Processes,
    say: Callable[[str], None],
    on_index: Callable[[int, int], None] = lambda done, parts: None,
) -> Ingredients:
    """Load what a configuration names.

    Args:
        name: the student's.
        processes: that share a batch; the first looks shards through, and the others read what it wrote down.
        on_index: told of shards looked through and shards in all.

    Raises:
        UsageError: a teacher is needed and none is named, the batch does not fit, or quantisation does not.
        InputError, ConfigError: data, teacher or student do not fit.
    """
    require_fit(config)
    with processes.first_goes_first():
        pairs = load_pairs(
            config.data,
            image_key=config.image_key,
            caption_key=config.caption_key,
            weights=config.weights,
            json_key=config.json_key,
            on_progress=on_index,
        )
    if pairs.left_out:
        say(f"{len(pairs.left_out):,} samples are no pairs and left out, the first: {pairs.left_out[0]}")
    require_batch(pairs, config.recipe.batch_size, processes=processes.count)
    teacher = _load_teacher(config)
    seed_everything(config.seed)
    student = _make_student(config, teacher, name, say)
    if config.quantize:
        require_convolutions(student)
    objective = Objective(
        config.recipe.objective,
        scales=config.recipe.scales,
        scale_start=config.recipe.scale_start,
        widths=(student.embedding_size, teacher.embedding_size) if teacher else None,
    )
    return Ingredients(pairs, teacher, student, objective)


def make_dataset(config: RunConfig, of: Ingredients, *, with_teacher_pixels: bool = True) -> ViewDataset:
    """The views that a run trains on."""
    return ViewDataset(
        of.pairs,
        of.student.preprocessing,
        of.teacher.preprocessing if of.teacher and with_teacher_pixels else None,
        crop_scale=config.recipe.crop_scale,
        seed=config.seed,
        views=config.views,
        max_bad=config.max_bad,
    )


def _load_teacher(config: RunConfig) -> ClipModel | None:
    if not config.recipe.objective.need_teacher:
        return None
    if config.teacher is None:
        raise UsageError(
            f"The recipe {config.recipe_name} needs a teacher.",
            hint="--teacher local-dir:PATH, or a name with --teacher-pretrained; --recipe clip trains without one",
        )
    return load_clip(config.teacher, pretrained=config.teacher_pretrained)


def _make_student(config: RunConfig, teacher: ClipModel | None, name: str, say: Callable[[str], None]) -> ClipModel:
    if model_folder(config.student) is not None:
        if config.pretrained_image or config.pretrained_text:
            raise UsageError(
                f"{config.student} has weights already, and others were named to start from.",
                hint="leave --pretrained-image and --pretrained-text away",
            )
        return load_clip(config.student)
    described = student_config(
        config.student,
        embedding_size=config.embedding_size or (teacher.embedding_size if teacher else 512),
        image_size=config.image_size,
        text=config.text,
        context_length=config.context_length,
    )
    student = build_student(described, name=name)
    if config.pretrained_image:
        say(start_image_tower(student, config.pretrained_image))
    if config.pretrained_text:
        say(start_text_tower(student, config.pretrained_text, teacher))
    return student
