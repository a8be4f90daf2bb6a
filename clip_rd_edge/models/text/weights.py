"""The weights that a student's text tower starts from: layers of another tower, or what its teachers say of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.models.classifiers import unreadable_weights
from clip_rd_edge.models.clip import ClipModel, TextTower, default_device, evaluation_mode
from clip_rd_edge.models.students import TEACHER
from clip_rd_edge.models.text_towers import CaptionTower, embed_with_progress
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.reporting import SILENT, Reporter

TOKENS = "tokens"  # as the source of the token embeddings alone
_BLOCKS = "transformer.resblocks."
# These may stay random if shapes differ: a projection depends on the embedding size it was trained for.
_PROJECTIONS = {"text_projection", "text_projection.weight", "text_projection.bias"}


def init_text_tower(student: ClipModel, source: str, teacher: ClipModel | None) -> str:
    """Initialise the student's text tower with evenly spaced layers of another text tower.

    Args:
        source: `teacher`, or an open_clip checkpoint file.

    Returns:
        A sentence that describes what was done.
    """
    if source == TEACHER and teacher is None:
        raise InputError(
            "{pretrained_text} teacher needs a teacher.", hint="name a teacher with {teacher}, or pass a file"
        )
    state = _text_state(teacher.model.state_dict() if teacher and source == TEACHER else _read_checkpoint(source))
    text = student.model.get_submodule("text")
    layers, source_layers = _layer_count(text.state_dict()), _layer_count(state)
    if not source_layers:
        raise ConfigError(f"The text weights of {source} are not those of an open_clip text transformer.")
    if layers > source_layers:
        raise ConfigError(
            f"The student's text tower has {layers} layers, but the weights of {source} have only {source_layers}.",
            hint=f"{{text}} WIDTHx{source_layers}, or fewer layers",
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

    if not is_file(source):
        raise InputError(
            f"The text weights file {source} does not exist.",
            hint="pass the path of an open_clip checkpoint, or: teacher",
        )
    try:
        state: Mapping[str, Tensor] = open_clip.factory.load_state_dict(source)
    except Exception as error:  # a damaged file may raise any type
        raise unreadable_weights(source, error) from error
    return state


def _text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the text tower's weights of a CLIP model: under `text.`, or at the top level in older models."""
    prefixed = {k.removeprefix("text."): v for k, v in state.items() if k.startswith("text.")}
    return prefixed or {k: v for k, v in state.items() if not k.startswith("visual.")}


def _layer_count(state: Mapping[str, Tensor]) -> int:
    return len({k.removeprefix(_BLOCKS).split(".")[0] for k in state if k.startswith(_BLOCKS)})


def _select_layers(state: Mapping[str, Tensor], layers: list[int]) -> dict[str, Tensor]:
    """Return the weights with only these layers, renumbered."""
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
    """Initialise the embedding of each token of the student with what its teachers say of the token's text.

    The teachers' embeddings of all tokens are reduced to as many principal components as the student's text tower is
    wide, and scaled to the spread of the random numbers that they replace. Words that are in no caption of the training
    data then have a meaning from the start. Model2Vec (Tulkens and van Dongen 2024) makes whole models of such rows.
    Tokens without a text of their own, such as parts of characters, stay random, and so do the last columns where the
    tower is wider than the teachers' embeddings.

    Args:
        student: with a text tower and tokenizer of CLIP's kind.
        teachers: their embeddings count side by side.

    Returns:
        A sentence that describes what was done.
    """
    if not teachers:
        raise InputError(
            f"{{pretrained_text}} {TOKENS} needs a teacher.", hint="name a teacher with {teacher}, or another start"
        )
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
    """Return the teacher's embeddings of the texts, on the CPU."""
    teacher.model.to(default_device())
    tower = CaptionTower(TextTower(teacher.model), teacher.model, choices=range(2, 17))

    def embed(part: list[str]) -> Tensor:
        rows: Tensor = tower(teacher.tokenizer(part))
        return rows.cpu()

    with evaluation_mode(teacher.model):
        return embed_with_progress(texts, embed, stage=f"embedding tokens with {teacher.name}", reporter=reporter)
