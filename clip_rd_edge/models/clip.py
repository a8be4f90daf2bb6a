"""A loaded CLIP model with its tokenizer and preprocessing, and its two towers as separate modules."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.encoder import Scoring
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.models.tokenizers import vocabulary_of
from clip_rd_edge.utils.process import SharedBlock


@dataclass(frozen=True)
class ClipModel:
    """An open_clip model, its tokenizer and its preprocessing.

    Attributes:
        model: an open_clip `CLIP`, `CustomTextCLIP` or `CoCa`.
        tokenizer: open_clip's tokenizer, from a list of texts to ids, (N, T) int64.
        templates: prompt templates that the model was trained with or should be used with.
        labels: names that its bundles start with, if no others are given; empty for none.
    """

    name: str
    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    preprocessing: Preprocessing
    model_cfg: dict[str, Any]
    templates: tuple[str, ...] = field(default=("{}",))
    labels: tuple[str, ...] = ()

    @property
    def embedding_size(self) -> int:
        """D, the size of an embedding."""
        return int(self.model_cfg["embed_dim"])

    @property
    def has_hugging_face_text(self) -> bool:
        """Whether the text tower is a model of transformers, which open_clip holds."""
        return "hf_model_name" in self.model_cfg.get("text_cfg", {})

    @property
    def context_length(self) -> int:
        """T, the number of token ids per text."""
        length = getattr(self.tokenizer, "context_length", None)
        return int(length or self.model_cfg["text_cfg"].get("context_length", 77))

    @property
    def logit_scale(self) -> float:
        """The factor that multiplies cosine similarities."""
        return self.scoring.scale

    @property
    def scoring(self) -> Scoring:
        """How cosine similarities become probabilities: by a sigmoid if the model has a bias, as SigLIP's have."""
        scale, bias = self.model.get_parameter("logit_scale"), getattr(self.model, "logit_bias", None)
        return Scoring(float(scale.detach().exp()), None if bias is None else float(bias.detach()))


# Ids of this text tell tokenizers apart. Part of `model_fingerprint`, which is kept in files: it must stay.
PROBE_TEXT = "A photo of two Cats, 42 dogs & a naïve zebra."
_LOCATIONS = ("hf_model_name", "hf_tokenizer_name")  # often the path of a folder
# What a text tower of transformers computes with beside its weights, in the configurations that open_clip can hold.
# Other entries shape the weights, concern training, or depend on the version of transformers that wrote or read them.
_HUGGING_FACE_FIELDS = (
    "num_attention_heads", "num_heads", "encoder_attention_heads", "hidden_act", "activation_function",
    "feed_forward_proj", "layer_norm_eps", "layer_norm_epsilon", "relative_attention_max_distance", "scale_embedding",
    "is_decoder", "pad_token_id",
)  # fmt: skip


def model_fingerprint(clip: ClipModel) -> str:
    """Return a SHA-256 of all that a model computes with, independent of the files it was loaded from.

    That is its weights in the order of their names, its configuration (such as the activation function), that of a text
    tower of Hugging Face as far as it is not its type's default, and its tokenizer, by the ids of a text.
    """
    configuration = _without_locations(clip.model_cfg)
    if hugging_face := _hugging_face_settings(clip):
        configuration["hf_settings"] = hugging_face
    digest = hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode())
    digest.update(np.asarray(clip.tokenizer([PROBE_TEXT])).tobytes())
    for name, tensor in sorted(clip.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def form_fingerprint(clip: ClipModel) -> str:
    """Return a SHA-256 of what a model's weights belong to: its configuration, preprocessing and tokens.

    Another model of the same form can take its weights and computes the same with them.
    """
    vocabulary = sorted(vocabulary_of(clip.tokenizer).items())
    ids = np.asarray(clip.tokenizer([PROBE_TEXT])).tolist()
    form = [_without_locations(clip.model_cfg), msgspec.to_builtins(clip.preprocessing), vocabulary, ids]
    return hashlib.sha256(json.dumps(form, sort_keys=True, default=str).encode()).hexdigest()


def _hugging_face_settings(clip: ClipModel) -> dict[str, Any]:
    config = getattr(text_module(clip.model), "config", None) if clip.has_hugging_face_text else None
    if config is None:
        return {}
    default = type(config)()
    values = {name: getattr(config, name, None) for name in _HUGGING_FACE_FIELDS}
    return {name: value for name, value in values.items() if value != getattr(default, name, None)}


def _without_locations(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_locations(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _LOCATIONS
    }


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def text_module(model: nn.Module) -> nn.Module:
    """Return the module that holds the text transformer: older models have its parts at the top level."""
    text = getattr(model, "text", model)
    assert isinstance(text, nn.Module)
    return text


def quick_gelu_of(tower: nn.Module) -> bool | None:
    """Return open_clip's flag `quick_gelu` of a tower, as it was built; a model has one for both of its towers.

    None for a tower without such activations, or with its own, such as timm's and Hugging Face's.
    """
    kinds = {type(module).__name__ for name, module in tower.named_modules() if name.endswith("mlp.gelu")}
    return "QuickGELU" in kinds if kinds else None


class ImageTower(nn.Module):
    """Maps pixels (N, 3, H, W) to embeddings (N, D), L2-normalised in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.model.encode_image(pixel_values)  # type: ignore[operator]
        return nn.functional.normalize(features.float(), dim=-1)


# What timm's modules that merge their branches for inference are told by.
_MERGING = ("fuse", "reparameterize", "switch_to_deploy")


def inference_image_tower(model: nn.Module) -> ImageTower:
    """Return the image tower as it is deployed: the parallel branches of a trunk of timm are merged.

    RepVGG, MobileOne, RepViT, FastViT (MobileCLIP's) and others train several branches per layer that one convolution
    computes as well. The model stays as it is. Other towers are not copied.
    """
    visual = getattr(model, "visual", None)
    if visual is None or not any(hasattr(module, name) for module in visual.modules() for name in _MERGING):
        return ImageTower(model)
    from timm.utils import reparameterize_model

    shared = {id(part): part for part in model.children() if part is not visual}
    merged = copy.deepcopy(model, shared)
    try:
        merged.visual = reparameterize_model(merged.get_submodule("visual"), inplace=True)
    except Exception:  # noqa: BLE001 — timm's modules raise many types; the tower is right as it was trained, too
        return ImageTower(model)
    return ImageTower(merged)


def deployed_parameter_count(model: nn.Module, *, text_tower: bool) -> int:
    """Return the number of parameters of a model as it is deployed; without its text tower, those of `visual` alone."""
    deployed = inference_image_tower(model).model
    return parameter_count(deployed if text_tower else deployed.get_submodule("visual"))


class TextTower(nn.Module):
    """Maps token ids (N, T) to embeddings (N, D), L2-normalised in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        features = self.model.encode_text(input_ids)  # type: ignore[operator]
        return nn.functional.normalize(features.float(), dim=-1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the block, the model is in evaluation mode; afterwards each of its modules is in its own previous mode.

    `train(mode)` on the whole model would also put a frozen tower, which stays in evaluation mode, into training mode.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    if is_trained := any(modes.values()):  # not of a model that several threads use
        forget_attention_biases(model)
    try:
        yield
    finally:
        if is_trained:
            forget_attention_biases(model)
        for module, mode in modes.items():
            module.training = mode


def forget_attention_biases(model: nn.Module) -> None:
    """Have some of timm's trunks, such as LeViT, compute their attention biases anew.

    In evaluation mode they keep the first ones, whose parameters may have changed since, or that have no graph.
    """
    for module in model.modules():
        cache = getattr(module, "attention_bias_cache", None)
        if isinstance(cache, dict):
            cache.clear()


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model in place, in channels-last memory format, which makes convolutions faster on CPUs and GPUs."""
    moved: Any = model.to(device)  # only some versions of torch have types for the next call
    channels_last: nn.Module = moved.to(memory_format=torch.channels_last)
    return channels_last


def default_device() -> torch.device:
    """Return the first CUDA device, or else Apple's GPU, or else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


_CPU = torch.device("cpu")


@contextmanager
def float32_on_cpu() -> Iterator[None]:
    """Within the block, new tensors are in float32 and on the CPU unless their dtype or device is given.

    Models must be built, trained and exported so: libraries create weights and constants with torch's defaults. The
    default dtype is that of all threads, so one that a host program has set is suspended until the last thread has
    left.
    """
    with _FLOAT32, on_cpu():
        yield


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within the block, new tensors of this thread are on the CPU unless their device is given."""
    # It costs time in each operation, so it is entered only where it changes something.
    with nullcontext() if torch.get_default_device() == _CPU else _CPU:
        yield


@contextmanager
def _float32() -> Iterator[None]:
    previous = torch.get_default_dtype()
    if previous == torch.float32:  # and if another thread changes it meanwhile, that stays
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


_FLOAT32 = SharedBlock(_float32)
