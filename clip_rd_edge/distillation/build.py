"""What a run is made of, loaded and checked before anything is written."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import msgspec
import numpy as np

from clip_rd_edge.contract.checkpoint import WEIGHTS_FILE, model_folder
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.data.pairs import BadSamples, Pairs, load_pairs, require_batch
from clip_rd_edge.distillation.checkpoint import seed_everything
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.distributed import Processes
from clip_rd_edge.distillation.loader import ViewDataset
from clip_rd_edge.distillation.quantized.tower import require_convolutions, require_fit
from clip_rd_edge.errors import UsageError
from clip_rd_edge.losses.objective import Objective
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.student import build_student, start_image_tower, start_text_tower, student_config
from clip_rd_edge.utils.io import sha256_of
from clip_rd_edge.utils.reporting import SILENT, Reporter


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
    reporter: Reporter = SILENT,
) -> Ingredients:
    """Load what a configuration names.

    Args:
        name: the student's.
        processes: that share a batch; the first looks shards through, and the others read what it wrote down.

    Raises:
        UsageError: a teacher is needed and none is named, the batch does not fit, or quantisation does not.
        InputError, ConfigError: data, teacher or student do not fit.
    """
    require_fit(config)
    with processes.first_goes_first():
        pairs = load_pairs(
            config.data,
            image_key=config.csv_img_key,
            caption_key=config.csv_caption_key,
            weights=config.train_data_upsampling_factors,
            json_key=config.json_caption_key,
            reporter=reporter,
        )
    if pairs.left_out:
        reporter.say(f"{len(pairs.left_out):,} samples are no pairs and left out, the first: {pairs.left_out[0]}")
    require_batch(pairs, config.recipe.batch_size, processes=processes.count)
    teacher = _load_teacher(config)
    seed_everything(config.seed)
    student = _make_student(config, teacher, name, reporter)
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


def _make_student(config: RunConfig, teacher: ClipModel | None, name: str, reporter: Reporter) -> ClipModel:
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
        reporter.say(start_image_tower(student, config.pretrained_image))
    if config.pretrained_text:
        reporter.say(start_text_tower(student, config.pretrained_text, teacher))
    return student


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
