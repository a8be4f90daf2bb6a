"""A real pretrained teacher from PyPI packages only.

EfficientNet-Lite0 (ImageNet) and MiniLM-L6 (sentences) are combined into one open_clip model. Its two projections are
untrained; `distill --recipe clip` on the training pairs trains them and the image trunk.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from clip_rd_edge.models.classifier import load_classifier
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import preprocessing_of, save_clip
from clip_rd_edge.models.packaged import CLASSIFIERS, SENTENCE_ENCODERS

IMAGE_ARCHITECTURE = "tf_efficientnet_lite0"
EMBEDDING_SIZE = 256
CONTEXT_LENGTH = 16  # the longest name in the data set has 12 tokens, including the start and end tokens


def build_teacher(folder: Path, *, image_size: int, seed: int = 0) -> Path:
    """Write the untuned teacher as an open_clip local-dir; an existing folder is left unchanged.

    Args:
        image_size: edge of the input in pixels.
        seed: of the projections.

    Raises:
        MissingExtraError: a package with weights is not installed.
        InputError: the weights are not the published ones (by SHA-256), or do not fit the architecture.
    """
    import open_clip

    if folder.is_dir():
        return folder
    image_weights, text_weights = CLASSIFIERS[IMAGE_ARCHITECTURE], SENTENCE_ENCODERS["all-MiniLM-L6-v2"]
    text_archive = text_weights.verified()
    image_weights.verified()
    classifier = load_classifier(IMAGE_ARCHITECTURE)
    with TemporaryDirectory() as text_folder:
        with zipfile.ZipFile(text_archive) as archive:
            archive.extractall(text_folder)
        model_cfg: dict[str, Any] = {
            "embed_dim": EMBEDDING_SIZE,
            "vision_cfg": {
                "timm_model_name": IMAGE_ARCHITECTURE,
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": image_size,
            },
            "text_cfg": {
                "hf_model_name": text_folder,
                "hf_tokenizer_name": "all-MiniLM-L6-v2",
                "hf_proj_type": "linear",
                "hf_pooler_type": "mean_pooler",
                "context_length": CONTEXT_LENGTH,
            },
        }
        torch.manual_seed(seed)
        _silence_transformers()
        model = open_clip.CustomTextCLIP(**model_cfg)  # reads MiniLM's weights from text_folder
        # The network takes pixels in [-1, 1].
        open_clip.model.set_model_preprocess_cfg(
            model, {"size": image_size, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
        )
        model.visual.trunk.load_state_dict(
            {k: v for k, v in classifier.model.state_dict().items() if not k.startswith(f"{classifier.head_name}.")}
        )
        clip = ClipModel(
            name="EfficientNet-Lite0 + MiniLM-L6",
            model=model,
            tokenizer=open_clip.tokenizer.HFTokenizer(text_folder, context_length=CONTEXT_LENGTH),
            preprocessing=preprocessing_of(model),
            model_cfg=model_cfg,
        )
        provenance = {
            "image_weights": str(image_weights),
            "text_weights": str(text_weights),
        }
        save_clip(folder, clip, provenance=provenance)
    return folder


def _silence_transformers() -> None:
    """Silence the warning about the pooler, which this model does not use, and the progress bar."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
