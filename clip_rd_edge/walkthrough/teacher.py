"""A real pretrained teacher from PyPI packages only.

EfficientNet-Lite0 (ImageNet) and MiniLM-L6 (sentences), stitched by the names of ImageNet's classes: it recognises
photographs before any training. Fine-tuning on the training pairs teaches it emoji as well.
"""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.models.classifier import load_classifier
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.models.sentences import load_sentence_encoder
from clip_rd_edge.models.stitch import IMAGENET, read_class_names, stitch_clip

IMAGE_ARCHITECTURE = "tf_efficientnet_lite0"
TEXT_MODEL = "all-MiniLM-L6-v2"
EMBEDDING_SIZE = 384  # of the text model
IMAGE_SIZE = 112  # pixels: photographs need more than emoji, and each step costs more
CONTEXT_LENGTH = 16  # the longest name in the data set has 12 tokens, including the start and end tokens


def build_teacher(folder: Path, *, image_size: int = IMAGE_SIZE) -> Path:
    """Write the untuned teacher as an open_clip local-dir; an existing folder is left unchanged.

    Raises:
        MissingExtraError: a package with weights is not installed.
        InputError: the weights are not the published ones (by SHA-256), or do not fit the architecture.
    """
    if folder.is_dir():
        return folder
    classifier = load_classifier(IMAGE_ARCHITECTURE)
    sentences = load_sentence_encoder(TEXT_MODEL, context_length=CONTEXT_LENGTH)
    clip = stitch_clip(classifier, sentences, read_class_names(IMAGENET), image_size=image_size)
    provenance = {"image_weights": classifier.source, "text_weights": sentences.source}
    save_clip(folder, clip, provenance=provenance)
    return folder
