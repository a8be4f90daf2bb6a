"""Trim a text tower: fewer layers, and the embeddings of those tokens alone that its texts need.

Most of a sentence encoder is its vocabulary: MiniLM-L6 has 11.7 of its 22.6 million parameters in the embeddings of
30,522 tokens, XLM-R 192 of 278 million in those of 250,002. Texts of one kind need a part of them, and a word without a
token of its own is spelled with shorter ones (Abdaoui et al. 2020, Load What You Need). Evenly spaced layers of the
tower are then a start that soon learns what all of them returned (Sanh et al. 2019, DistilBERT).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from clip_rd_edge.contract.encoder import in_batches
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.models.clip import ClipModel, parameter_count, text_module
from clip_rd_edge.models.text_weights import evenly_spaced
from clip_rd_edge.utils.reporting import SILENT, Reporter

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_BATCH = 1_024
# By kind of model: what marks a piece within a word, or at its beginning.
_MARKS = {"WordPiece": "##", "Unigram": "▁"}
_BYTE = "<0x{:02X}>"  # a piece of a character that no other piece has


@dataclass(frozen=True)
class TrimmedModel:
    """A model whose text tower is to be trained, and what was left of it, in one sentence."""

    clip: ClipModel
    description: str


def trim_text_tower(
    clip: ClipModel,
    *,
    layers: int | None = None,
    vocabulary: int | None = None,
    texts: Sequence[str] = (),
    reporter: Reporter = SILENT,
) -> TrimmedModel:
    """Return a copy of a model with a smaller text tower, whose embeddings are as wide; the image tower is shared.

    Args:
        layers: how many of the transformer's layers stay, evenly spaced, the first and the last among them; None for
            all.
        vocabulary: how many tokens stay: those that a text cannot do without, which are special or single characters
            that occur in `texts`, then those that `texts` have most, then those with the lowest ids. None for all.
        texts: such as the model will be given.

    Raises:
        UsageError: nothing is to be trimmed, or there are no texts to tell which tokens stay.
        ConfigError: the tower has no more than that, or a vocabulary that cannot be trimmed.
    """
    require_trim(layers, vocabulary, texts)
    before = _text_parameters(clip)
    visual = clip.model.get_submodule("visual")
    model = copy.deepcopy(clip.model, {id(visual): visual})
    clip = replace(clip, model=model, model_cfg=copy.deepcopy(clip.model_cfg))
    kept = []
    if vocabulary is not None:
        clip, which = _trim_vocabulary(clip, vocabulary, texts, reporter)
        kept.append(which)
    if layers is not None:
        kept.append(_trim_layers(clip, layers))
    _leave_out_dropout(clip)
    after = _text_parameters(clip)
    return TrimmedModel(
        clip, f"the text tower keeps {' and '.join(kept)}: {after / 1e6:.1f} of {before / 1e6:.1f} million parameters"
    )


def require_trim(layers: int | None, vocabulary: int | None, texts: Sequence[str]) -> None:
    """Refuse what `trim_text_tower` refuses whatever the model is.

    Raises:
        UsageError: nothing is to be trimmed, or there are no texts to tell which tokens stay.
    """
    if layers is None and vocabulary is None:
        raise UsageError("Nothing is to be trimmed.", hint="--text-layers, --vocabulary, or both")
    if vocabulary is not None and not texts:
        raise UsageError(
            "The vocabulary is to be trimmed, but there are no texts that tell which tokens are needed.",
            hint="--texts FILE, with texts such as the model will be given, one per line",
        )


def _text_parameters(clip: ClipModel) -> int:
    return parameter_count(clip.model) - parameter_count(clip.model.get_submodule("visual"))


def _transformer(clip: ClipModel) -> Any:
    return text_module(clip.model).get_submodule("transformer")


def _trim_layers(clip: ClipModel, count: int) -> str:
    import open_clip

    transformer = _transformer(clip)
    if clip.has_hugging_face_text:
        config = transformer.config
        name = open_clip.hf_configs.arch_dict[config.model_type]["config_names"]["layers"]
        lists = (module for module in transformer.modules() if isinstance(module, nn.ModuleList))
        blocks = next(module for module in lists if len(module) == getattr(config, name))
    else:
        blocks = transformer.resblocks
    total = len(blocks)
    if not 1 <= count < total:
        raise ConfigError(
            f"The text tower of {clip.name} has {total} layers, and {count} are to stay; expected 1 to {total - 1}."
        )
    chosen = evenly_spaced(count, total=total)
    for number in reversed(range(total)):
        if number not in chosen:
            del blocks[number]
    if clip.has_hugging_face_text:
        setattr(config, name, count)
    else:
        clip.model_cfg["text_cfg"]["layers"] = count
    return f"layer{'s' * (count > 1)} {', '.join(str(number + 1) for number in chosen)} of {total}"


def _trim_vocabulary(clip: ClipModel, size: int, texts: Sequence[str], reporter: Reporter) -> tuple[ClipModel, str]:
    content = _tokenizer_content(clip)
    pieces = _pieces(content, clip.name)
    tokenizer: Any = clip.tokenizer
    used = np.zeros(len(pieces), np.int64)
    for part in in_batches(len(texts), _BATCH):
        reporter.update("counting tokens", part.start, len(texts))
        used += np.bincount(tokenizer(list(texts[part])).numpy().ravel(), minlength=len(pieces))
    transformer = _transformer(clip)
    # The padding keeps its number, on which RoBERTa's positions depend.
    special = {token["id"] for token in content["added_tokens"]} | {*range((transformer.config.pad_token_id or 0) + 1)}
    needed = _needed(pieces, used, special, content["model"])
    if not len(needed) <= size < len(pieces):
        raise ConfigError(
            f"The vocabulary of {clip.name} has {len(pieces):,} tokens, and {size:,} are to stay; expected "
            f"{len(needed):,} to {len(pieces) - 1:,}.",
            hint=f"{len(needed):,} are special, or single characters that occur in the texts",
        )
    used[list(special)] = 0
    others = sorted(set(range(len(pieces))) - needed, key=lambda number: (-used[number], number))
    kept = sorted([*needed, *others[: size - len(needed)]])
    embedding = transformer.get_input_embeddings()
    with torch.no_grad():
        embedding.weight = nn.Parameter(embedding.weight[kept].clone())
    embedding.num_embeddings = transformer.config.vocab_size = size
    model: Any = clip.model
    model.vocab_size = model.text.vocab_size = size
    new = _tokenizer_of(clip, _with_pieces(content, kept))
    share = used[kept].sum() / max(used.sum(), 1)
    return replace(clip, tokenizer=new), f"{size:,} of {len(pieces):,} tokens ({share:.1%} of those in the texts)"


def _tokenizer_content(clip: ClipModel) -> dict[str, Any]:
    """Return the tokenizer.json of a tokenizer of Hugging Face."""
    if not clip.has_hugging_face_text:
        raise ConfigError(
            f"The vocabulary of {clip.name} is CLIP's own; expected a text tower of Hugging Face, with a tokenizer "
            "whose tokens can be left out.",
            hint="omit --vocabulary",
        )
    tokenizer: Any = clip.tokenizer
    backend = getattr(tokenizer.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"The tokenizer of {clip.name} has no {_TOKENIZER}, whose tokens could be left out.",
            hint="omit --vocabulary",
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def _pieces(content: dict[str, Any], name: str) -> list[str]:
    """Return the tokens by id: those of the model, then what was added to it."""
    kind, vocabulary = content["model"]["type"], content["model"]["vocab"]
    if kind == "WordPiece":
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    elif kind == "Unigram":
        pieces = [piece for piece, _ in vocabulary]
    else:
        raise ConfigError(
            f"The tokenizer of {name} is of the kind {kind}, whose tokens are built from each other; expected one of "
            f"{', '.join(_MARKS)}.",
            hint="omit --vocabulary",
        )
    return [*pieces, *(token["content"] for token in content["added_tokens"] if token["id"] >= len(pieces))]


def _needed(pieces: Sequence[str], used: np.ndarray[Any, Any], special: set[int], model: dict[str, Any]) -> set[int]:
    """Return the ids without which a text would have no tokens: special ones, and single characters of the texts."""
    bare = [piece.removeprefix(_MARKS[model["type"]]) for piece in pieces]
    characters = {character for number in np.flatnonzero(used) for character in bare[number]}
    bytes_of_others = set(map(_BYTE.format, range(256))) if model.get("byte_fallback") else set()
    return special | {
        number
        for number, piece in enumerate(bare)
        if (len(piece) <= 1 and (piece in characters or piece.isascii())) or piece in bytes_of_others
    }


def _with_pieces(content: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return a tokenizer.json with these tokens alone, numbered anew in their order."""
    new = {old: number for number, old in enumerate(kept)}
    model = content["model"]
    if model["type"] == "WordPiece":
        vocabulary: Any = {piece: new[old] for piece, old in model["vocab"].items() if old in new}
    else:
        vocabulary = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
    content = {**content, "model": {**model, "vocab": vocabulary}}
    if model.get("unk_id") is not None:
        content["model"]["unk_id"] = new[model["unk_id"]]
    content["added_tokens"] = [{**token, "id": new[token["id"]]} for token in content["added_tokens"]]
    content["post_processor"] = _renumbered(content.get("post_processor"), new)
    if content.get("padding"):
        content["padding"] = {**content["padding"], "pad_id": new[content["padding"]["pad_id"]]}
    return content


def _renumbered(part: Any, new: dict[int, int]) -> Any:
    """Return a post-processor with other ids: in lists named `ids`, and in pairs of a token and its id."""
    if isinstance(part, dict):
        return {
            name: [new[number] for number in value] if name == "ids" else _renumbered(value, new)
            for name, value in part.items()
        }
    if isinstance(part, list):
        if [type(entry) for entry in part] == [str, int]:
            return [part[0], new[part[1]]]
        return [_renumbered(entry, new) for entry in part]
    return part


def _tokenizer_of(clip: ClipModel, content: dict[str, Any]) -> Any:
    """Return the tokenizer as open_clip loads it from a folder."""
    import open_clip

    text_cfg = clip.model_cfg["text_cfg"]
    with TemporaryDirectory() as folder:
        clip.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
        config = json.loads((Path(folder) / _TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        config.pop("added_tokens_decoder", None)  # has the numbers, as transformers 4 writes it
        for path in Path(folder).iterdir():  # they may hold the whole vocabulary
            path.unlink()
        (Path(folder) / _TOKENIZER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
        (Path(folder) / _TOKENIZER).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return open_clip.tokenizer.HFTokenizer(
            folder,
            context_length=clip.context_length,
            tokenizer_mode=text_cfg.get("tokenizer_mode"),
            **text_cfg.get("tokenizer_kwargs", {}),
        )


def _leave_out_dropout(clip: ClipModel) -> None:
    """Have the tower trained without dropout, which would only disturb what is to imitate another one."""
    if clip.has_hugging_face_text:
        config = _transformer(clip).config
        for name in [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]:
            setattr(config, name, 0.0)
