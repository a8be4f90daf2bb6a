"""The built-in teacher: EfficientNet-Lite0, for ImageNet, and the sentence encoder MiniLM-L6, joined by `stitch`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clip_rd_edge.models.classifiers import CLASSIFIERS, SENTENCE_ENCODERS
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.models.stitch import IMAGENET, read_class_names, stitch_models
from clip_rd_edge.runtime.labels import everyday_labels
from clip_rd_edge.utils.paths import Typed
from clip_rd_edge.utils.reporting import Reporter

CLASSIFIER, SENTENCE_ENCODER = "tf_efficientnet_lite0", "all-MiniLM-L6-v2"


def built_in_teacher(folder: Path, *, image_size: int, context_length: int, reporter: Reporter) -> Path:
    """Stitch the built-in teacher from packages with weights; an existing folder is left unchanged."""
    if not folder.is_dir():
        for package in (CLASSIFIERS[CLASSIFIER], SENTENCE_ENCODERS[SENTENCE_ENCODER]):
            package.verified()  # `stitch_models` would download what is not installed
        clip, provenance = stitch_models(
            CLASSIFIER,
            Typed(SENTENCE_ENCODER),
            read_class_names(IMAGENET),
            image_size=image_size,
            context_length=context_length,
            reporter=reporter,
        )
        save_clip(folder, replace(clip, labels=tuple(everyday_labels())), provenance=provenance)
    return folder
