"""The weights that a student's text tower starts from: another tower's layers, or its teachers' token embeddings."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.classifiers import mismatch, read_file_of_weights
from clip_rd_edge.models.clip import ClipModel, TextTower, default_device, evaluation_mode, quick_gelu_of, text_module
from clip_rd_edge.models.encoder import CaptionTower, embed_with_progress, text_layers
from clip_rd_edge.models.students import TEACHER, build_student, require_equal
from clip_rd_edge.utils.text import SILENT, Reporter

TOKENS = "tokens"  # as the source of the token embeddings alone
_BLOCKS = "transformer.resblocks."
# These may stay random if shapes differ: a projection depends on the embedding size it was trained for.
_PROJECTIONS = {"text_projection", "text_projection.weight", "text_projection.bias"}


def init_text_tower(student: ClipModel, source: str, teacher: ClipModel | None) -> str:
    """Initialise the student's text tower with evenly spaced layers of another text tower.

    Args:
        source: `teacher`, or an open_clip checkpoint file.
    """
    state = _text_state(teacher.model.state_dict() if teacher and source == TEACHER else _read_checkpoint(source))
    text = student.model.get_submodule("text")
    layers, source_layers = _layer_count(text.state_dict()), _layer_count(state)
    if layers > source_layers:
        raise ConfigError(
            f"The student's text tower has {layers} layers, but the weights of {source} have only {source_layers} of "
            "an open_clip text transformer.",
            hint=f"{{text}} WIDTHx{source_layers}, or fewer layers" if source_layers else "",
        )
    selected = evenly_spaced(layers, total=source_layers)
    text.load_state_dict(_matching_weights(text, _select_layers(state, selected), source), strict=False)
    names = "all" if layers == source_layers else f"layers {', '.join(str(i + 1) for i in selected)}"
    return f"the text tower is initialised from {names} of the {source_layers} layers of {source}"


def evenly_spaced(count: int, *, total: int) -> list[int]:
    """Return `count` evenly spaced indices below `total`, including the first and the last; [0] for a count of 1."""
    return [round(i * (total - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]


def _read_checkpoint(source: str) -> Mapping[str, Tensor]:
    import open_clip

    state: Mapping[str, Tensor] = read_file_of_weights(
        source,
        lambda: open_clip.factory.load_state_dict(source),
        hint="pass the path of an open_clip checkpoint, or: teacher",
    )
    return state


def _text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the text tower's weights of a CLIP model: under `text.`, or at the top level in older models."""
    prefixed = {k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")}
    return prefixed or {k: v for k, v in state.items() if not k.startswith("visual.")}


def _layer_count(state: Mapping[str, Tensor]) -> int:
    return len({k.removeprefix(_BLOCKS).split(".")[0] for k in state if k.startswith(_BLOCKS)})


def _select_layers(state: Mapping[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
    kept = {k: v for k, v in state.items() if not k.startswith(_BLOCKS)}
    for new, old in enumerate(layers):
        prefix = f"{_BLOCKS}{old}."
        kept |= {f"{_BLOCKS}{new}.{k.removeprefix(prefix)}": v for k, v in state.items() if k.startswith(prefix)}
    return kept


def _matching_weights(text: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the weights that the tower can load: only the positions it has, and a projection only of equal shape."""
    matching: dict[str, Tensor] = {}
    for name, parameter in text.named_parameters():
        weights = state.get(name, torch.empty(0))
        if name == "positional_embedding":
            weights = weights[: len(parameter)]
        if weights.shape == parameter.shape:
            matching[name] = weights
        elif name not in _PROJECTIONS:
            has_few_positions = name == "positional_embedding" and weights.shape[1:] == parameter.shape[1:]
            width = len(state.get("ln_final.weight", ()))
            raise ConfigError(
                f"The text weights of {source} do not match the student: {name} is {_shape(weights)} in the weights "
                f"and {_shape(parameter)} in the student.",
                hint=f"{{context_length}} {len(weights)} gives the student as many positions"
                if has_few_positions
                else f"{{text}} {width}xLAYERS gives the student the same width",
            )
    return matching


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape)) if tensor.numel() else "missing"


@torch.no_grad()
def init_token_embeddings(student: ClipModel, teachers: Sequence[ClipModel], reporter: Reporter = SILENT) -> str:
    """Initialise the embedding of each token of the student with its teachers' embeddings of the token's text.

    The teachers' embeddings of all tokens are reduced to as many principal components as the student's text tower is
    wide, and scaled to the spread of the random numbers that they replace. Words that are in no caption of the training
    data then have a meaning from the start. Model2Vec (Tulkens and van Dongen 2024) makes whole models of such rows.
    Tokens without a text of their own, such as parts of characters, stay random, and so do the last columns where the
    tower is wider than the teachers' embeddings.
    """
    texts = _token_texts(student.tokenizer)
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts.values()))}
    rows = torch.cat([_embedded(list(distinct), teacher, reporter) for teacher in teachers], dim=1).double()
    rows = rows[[distinct[text] for text in texts.values()]]
    rows -= rows.mean(dim=0)
    embedding = student.model.get_parameter("text.token_embedding.weight")
    width = min(embedding.shape[1], rows.shape[1])
    directions = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :width]  # of the largest variance first
    components = rows @ directions
    components *= embedding.double().std() / components.square().mean().sqrt()
    embedding[list(texts), :width] = components.to(embedding)
    names = ", ".join(teacher.name for teacher in teachers)
    return f"the embeddings of {len(texts):,} tokens are initialised from {names}"


def _token_texts(tokenizer: Any) -> dict[int, str]:
    """Return the texts of the tokens of open_clip's `SimpleTokenizer` that have one, by id."""
    texts = {}
    for number, token in tokenizer.decoder.items():
        spelling = token.removesuffix("</w>")
        if number in tokenizer.all_special_ids:
            continue
        try:
            text = bytes(tokenizer.byte_decoder[symbol] for symbol in spelling).decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts[number] = text
    return texts


def _embedded(texts: list[str], teacher: ClipModel, reporter: Reporter) -> Tensor:
    teacher.model.to(default_device())
    tower = CaptionTower(TextTower(teacher.model), teacher.model, choices=range(2, 17))

    def embed(part: list[str]) -> Tensor:
        rows: Tensor = tower(teacher.tokenizer(part))
        return rows.cpu()

    with evaluation_mode(teacher.model):
        return embed_with_progress(texts, embed, stage=f"embedding tokens with {teacher.name}", reporter=reporter)


# What the student has of its own. Everything else in a text_cfg changes what the weights compute.
_OWN = ("context_length", "vocab_size", "width", "layers")
# What towers of Hugging Face, of other tokenizers and of CoCa have, and CLIP's has not.
_OTHER_TOWERS = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "embed_cls", "output_tokens")
# Captions without, with few, and with many of the tokens that fit into the shortest context length, 4.
_CAPTIONS = ["", "red", "a cat"]


def with_text_of(config: dict[str, Any], teacher: ClipModel) -> dict[str, Any]:
    """Return a student's configuration with the teacher's attention mask, pooling, activation, heads and so on.

    The towers are compared: with all of its layers, the student's must return the teacher's own features.
    """
    model_cfg, source = config["model_cfg"], teacher.model_cfg["text_cfg"]
    text_cfg = model_cfg["text_cfg"]
    if others := [key for key in _OTHER_TOWERS if source.get(key)]:
        raise ConfigError(
            f"The student's text tower cannot start from that of {teacher.name}: its {others[0]} is "
            f"{source[others[0]]}, and the student's tower is CLIP's.",
            hint="omit {pretrained_text}",
        )
    if text_cfg["width"] != source.get("width", 512):
        return config  # `init_text_tower` names both widths
    carried = {name: value for name, value in source.items() if name not in _OWN}
    model_cfg = _with_activation_of(teacher, {**model_cfg, "text_cfg": {**text_cfg, "heads": 8, **carried}})
    inherited = {**config, "model_cfg": model_cfg}
    _require_same_features(inherited, teacher)
    return inherited


def build_with_text_tower_of(teacher: ClipModel, config: dict[str, Any], *, name: str) -> ClipModel:
    """Build a student with the teacher's whole text tower and tokenizer, of whatever kind, and a new image tower."""
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


def has_quick_gelu(model: nn.Module) -> bool:
    """Return whether a model's text tower has OpenAI's approximation of GELU; False for a tower of Hugging Face."""
    return bool(_quick_gelu_of_text(model))


def _quick_gelu_of_text(model: nn.Module) -> bool | None:
    return quick_gelu_of(text_module(model).get_submodule("transformer"))


def _with_activation_of(teacher: ClipModel, model_cfg: dict[str, Any]) -> dict[str, Any]:
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
    except RuntimeError as error:
        raise ConfigError(
            f"The weights of the text tower of {teacher.name} do not fit the student's: {mismatch(error)}",
            hint=f"{{context_length}} {teacher.context_length}, or omit {{pretrained_text}}",
        ) from error
    what = f"text tower with the weights of {teacher.name}"
    require_equal(_features(copy), _features(teacher), what=what, hint="omit {pretrained_text}")


def _features(clip: ClipModel) -> Tensor:
    model = clip.model.eval()
    device = next(model.parameters()).device
    embeddings: Tensor = TextTower(model)(clip.tokenizer(_CAPTIONS).to(device))
    return embeddings.cpu()
