"""A student's text tower that is the teacher's, or starts from layers of it: it must compute the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.clip import ClipModel, TextTower, quick_gelu_of, text_module
from clip_rd_edge.models.students import build_student
from clip_rd_edge.models.text_towers import text_layers

# What the student has of its own. Everything else in a text_cfg changes what the weights compute.
_OWN = ("context_length", "vocab_size", "width", "layers")
# Captions without, with few, and with many of the tokens that fit into the shortest context length, 4.
_CAPTIONS = ["", "red", "a cat"]
_MIN_COSINE = 0.9999  # between the features of a tower and those of its copy


def with_text_of(config: dict[str, Any], teacher: ClipModel) -> dict[str, Any]:
    """Return a student's configuration with the teacher's attention mask, pooling, activation, heads and so on.

    The towers are compared: with all of its layers, the student's must return the teacher's own features.

    Args:
        config: of `student_config`.
    """
    model_cfg, source = config["model_cfg"], teacher.model_cfg["text_cfg"]
    text_cfg = model_cfg["text_cfg"]
    refusal = _refusal(text_cfg, source, teacher)
    if refusal:
        raise ConfigError(
            f"The student's text tower cannot start from that of {teacher.name}: {refusal}.",
            hint="omit {pretrained_text}",
        )
    _check_context_length(text_cfg["context_length"], source, teacher.name)
    if text_cfg["width"] != source.get("width", 512):
        return config  # `init_text_tower` names both widths
    carried = {name: value for name, value in source.items() if name not in _OWN}
    model_cfg = _with_activation_of(teacher, {**model_cfg, "text_cfg": {**text_cfg, "heads": 8, **carried}})
    inherited = {**config, "model_cfg": model_cfg}
    _require_same_features(inherited, teacher)
    return inherited


def build_with_text_tower_of(teacher: ClipModel, config: dict[str, Any], *, name: str) -> ClipModel:
    """Build a student with the teacher's whole text tower and tokenizer, whatever kind they are, and a new image tower.

    Args:
        config: of `student_config`; its own text tower is replaced.
    """
    model_cfg = config["model_cfg"]
    if model_cfg["embed_dim"] != teacher.embedding_size:
        raise ConfigError(
            f"The student's embedding size is {model_cfg['embed_dim']}, but the text tower of {teacher.name} returns "
            f"{teacher.embedding_size}; expected the same.",
            hint="omit {embedding_size}, or choose another {text}",
        )
    source = teacher.model_cfg["text_cfg"]
    if source.get("proj_type") == "none":
        raise ConfigError(
            f"The text tower of {teacher.name} has no projection to the embedding's size, which a student trains.",
            hint="choose another {text}",
        )
    text: Any = copy.deepcopy(separate_text_tower(teacher))
    student = build_student({**config, "model_cfg": _with_activation_of(teacher, model_cfg)}, name=name)
    model: Any = student.model
    model.text, model.context_length, model.vocab_size = text.train(), text.context_length, text.vocab_size
    return replace(student, tokenizer=teacher.tokenizer, model_cfg={**student.model_cfg, "text_cfg": source})


def separate_text_tower(clip: ClipModel) -> nn.Module:
    """Return the text tower of a model as a module of its own: a copy, where its parts lie at the model's top level."""
    if hasattr(clip.model, "text_decoder"):
        raise ConfigError(
            f"The text tower of {clip.name} also returns token features, as in CoCa; expected one that returns "
            "embeddings alone.",
            hint="choose another {text}",
        )
    if hasattr(clip.model, "text"):
        return clip.model.get_submodule("text")
    text = build_text_tower(
        clip.model_cfg["text_cfg"], embedding_size=clip.embedding_size, quick_gelu=has_quick_gelu(clip.model)
    )
    state = clip.model.state_dict()
    text.load_state_dict({key: state[key] for key in text.state_dict()})
    return text


def build_text_tower(text_cfg: dict[str, Any], *, embedding_size: int, quick_gelu: bool = False) -> nn.Module:
    """Return a text tower, built by open_clip beside an image tower that is discarded."""
    import open_clip

    image_tower = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 8, "image_size": 8}
    text: nn.Module = open_clip.CustomTextCLIP(embedding_size, image_tower, text_cfg, quick_gelu=quick_gelu).text
    return text


def _refusal(text_cfg: dict[str, Any], source: dict[str, Any], teacher: ClipModel) -> str:
    """Return why a student cannot have this text tower, or an empty string."""
    if "hf_model_name" in source:
        return f"it is {source['hf_model_name']} of Hugging Face, and the student's is a transformer of open_clip"
    if source.get("hf_tokenizer_name") or source.get("tokenizer_kwargs"):
        return f"it reads the tokens of {source.get('hf_tokenizer_name') or source['tokenizer_kwargs']}, not CLIP's"
    if source.get("vocab_size", text_cfg["vocab_size"]) != text_cfg["vocab_size"]:
        return f"it has a vocabulary of {source['vocab_size']:,} tokens, not CLIP's {text_cfg['vocab_size']:,}"
    if source.get("embed_cls") or source.get("output_tokens"):
        return "it has a class token or also returns token features, as in CoCa"
    if source.get("proj_type") == "none":
        return "it has no projection to the embedding's size"
    return ""


def _check_context_length(length: int, source: dict[str, Any], name: str) -> None:
    teachers = source.get("context_length", 77)
    # With a causal mask, the tokens after the end of a caption have no influence, so fewer positions are enough.
    padding_matters = source.get("no_causal_mask", False) or source.get("pool_type") == "last"
    if length > teachers or (padding_matters and length != teachers):
        expected = f"{teachers}" if padding_matters else f"at most {teachers}"
        raise ConfigError(
            f"The context length is {length}, but the text tower of {name} was trained with {teachers}; "
            f"expected {expected}.",
            hint=f"{{context_length}} {teachers}",
        )


def has_quick_gelu(model: nn.Module) -> bool:
    """Return whether a model's text tower has OpenAI's approximation of GELU; False for a tower of Hugging Face."""
    return bool(_quick_gelu_of_text(model))


def _quick_gelu_of_text(model: nn.Module) -> bool | None:
    return quick_gelu_of(text_module(model).get_submodule("transformer"))


def _with_activation_of(teacher: ClipModel, model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Return a student's configuration with the activation of the teacher's text tower."""
    flag, of_image = _quick_gelu_of_text(teacher.model), model_cfg.get("quick_gelu")
    if flag is not None and of_image is not None and flag != of_image:
        names = ("GELU", "QuickGELU")
        raise ConfigError(
            f"The student's image tower has {names[of_image]}, and the text tower of {teacher.name} {names[flag]}; "
            "expected one activation for both, as open_clip's models have it.",
            hint="take the text tower of another model, or start from another image tower",
        )
    return {**model_cfg, "quick_gelu": True} if flag else model_cfg


@torch.no_grad()
def _require_same_features(config: dict[str, Any], teacher: ClipModel) -> None:
    model_cfg = config["model_cfg"]
    full_cfg = {
        **model_cfg,
        "embed_dim": teacher.embedding_size,
        "text_cfg": {**model_cfg["text_cfg"], "layers": len(text_layers(teacher))},
    }
    with torch.random.fork_rng(devices=[]):  # the student's own initial weights are drawn after this
        copy = build_student({**config, "model_cfg": full_cfg}, name=teacher.name)
    text, state = copy.model.get_submodule("text"), text_module(teacher.model).state_dict()
    weights = {name: state[name] for name in text.state_dict() if name in state}
    positions = text.get_parameter("positional_embedding")
    weights["positional_embedding"] = weights["positional_embedding"][: len(positions)]
    try:
        text.load_state_dict(weights)
        features = [_features(clip) for clip in (copy, teacher)]
    except RuntimeError as error:
        raise ConfigError(
            f"The text tower of {teacher.name} cannot be rebuilt for the student: {str(error).splitlines()[0]}",
            hint="omit {pretrained_text}",
        ) from error
    require_equal(*features, what=f"text tower with the weights of {teacher.name}", hint="omit {pretrained_text}")


def require_equal(features: Tensor, expected: Tensor, *, what: str, hint: str) -> None:
    """Check that a student's tower with its teacher's weights returns its features; (N, D) each, L2-normalised.

    Args:
        what, hint: the tower, and what to do if it does not, for the error.
    """
    cosine = float((features * expected).sum(dim=1).min())
    if not cosine >= _MIN_COSINE:
        raise ConfigError(
            f"The student's {what} returns other features (cosine {cosine:.4f}, expected at least {_MIN_COSINE}).",
            hint=hint,
        )


def _features(clip: ClipModel) -> Tensor:
    model = clip.model.eval()
    device = next(model.parameters()).device
    embeddings: Tensor = TextTower(model)(clip.tokenizer(_CAPTIONS).to(device))
    return embeddings.cpu()
