"""A student whose image tower starts as the teacher's computes what the teacher's does, or is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.models.clip import ClipModel, ImageTower
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.students import build_student, copy_image_tower, with_image_of

VISION = {"layers": 4, "width": 64, "head_width": 64, "patch_size": 8, "image_size": 32}


def architecture(**more: Any) -> dict[str, Any]:
    text = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": text, "custom_text": True, **more}
    return {"model_cfg": config, "preprocess_cfg": {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}}


def model() -> ClipModel:
    """A model whose weights are large enough for its activation to matter, as those of trained ones are."""
    torch.manual_seed(0)
    clip = build_student(architecture(quick_gelu=True), name="quick")
    with torch.no_grad():
        for parameter in clip.model.get_submodule("visual").parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return clip


def embeddings(clip: ClipModel) -> torch.Tensor:
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded: torch.Tensor = ImageTower(clip.model.eval())(pixels)
    return embedded


def test_the_student_has_the_activation_of_the_teachers_image_tower(tmp_path: Path) -> None:
    teacher = model()
    student = build_student(with_image_of(architecture(), teacher), name="student")
    copy_image_tower(student, teacher)
    save_clip(tmp_path / "student", student, provenance={})
    for clip in (student, load_clip(str(tmp_path / "student"))):
        torch.testing.assert_close(embeddings(clip), embeddings(teacher))


def test_the_student_sees_images_as_the_teacher_does_but_for_their_size() -> None:
    teacher = model()
    changes = {"resize_mode": "longest", "fill_color": 114, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)}
    seen = msgspec.structs.replace(teacher.preprocessing, **changes)
    own = {**architecture(), "preprocess_cfg": {"size": [48, 48], "mean": [0.5] * 3, "std": [0.5] * 3}}
    config = with_image_of(own, replace(teacher, preprocessing=seen))
    actual = msgspec.convert(config["preprocess_cfg"], Preprocessing)
    assert actual == msgspec.structs.replace(seen, size=(48, 48))
