"""A tokenizer.json with fewer tokens: which of them texts need, and the file without the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_rd_edge.errors import ConfigError

Content = dict[str, Any]
# By kind of model: what marks a piece within a word, or at its beginning.
_MARKS = {"WordPiece": "##", "Unigram": "▁", "BPE": ""}
_BYTE = "<0x{:02X}>"  # a piece of a character that no other piece has


def pieces_of(content: Content, name: str) -> list[str]:
    """Return the tokens by id: those of the model, then what was added to it.

    Args:
        content: of a tokenizer.json.
        name: of the model, for errors.
    """
    kind, vocabulary = content["model"]["type"], content["model"].get("vocab", {})
    if kind not in _MARKS:
        raise ConfigError(
            f"The tokenizer of {name} is of the kind {kind}; expected one of {', '.join(_MARKS)}.",
            hint="omit {vocabulary}",
        )
    if kind == "Unigram":
        pieces = [piece for piece, _ in vocabulary]
    else:
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        if any(vocabulary[piece] != number for number, piece in enumerate(pieces)):
            raise ConfigError(f"The tokenizer of {name} has ids without a token.", hint="omit {vocabulary}")
    return [*pieces, *(token["content"] for token in content["added_tokens"] if token["id"] >= len(pieces))]


def needed_tokens(content: Content, pieces: Sequence[str], used: npt.NDArray[np.int64], special: set[int]) -> set[int]:
    """Return the ids without which a text would have no tokens: special ones, and single characters of the texts.

    Of BPE, these are all tokens that are not merged from others: 512 of CLIP's, which spell any text.

    Args:
        pieces: of `pieces_of`.
        used: how often the texts have each token.
        special: ids that stay in any case.
    """
    model = content["model"]
    if model["type"] == "BPE":
        return special | (set(range(len(pieces))) - _parts(content).keys())
    bare = [piece.removeprefix(_MARKS[model["type"]]) for piece in pieces]
    characters = {character for number in np.flatnonzero(used) for character in bare[number]}
    bytes_of_others = set(map(_BYTE.format, range(256))) if model.get("byte_fallback") else set()
    return special | {
        number
        for number, piece in enumerate(bare)
        if (len(piece) <= 1 and (piece in characters or piece.isascii())) or piece in bytes_of_others
    }


def most_used_tokens(content: Content, used: npt.NDArray[np.int64], needed: set[int], size: int) -> list[int]:
    """Return the ids of the tokens that stay, in their order: those needed, then those that the texts have most.

    A token of BPE stays with the tokens that it is merged from, as long as all of them fit.
    """
    parts = _parts(content) if content["model"]["type"] == "BPE" else {}
    kept = set(needed)
    for number in sorted(range(len(used)), key=lambda number: (-used[number], number)):
        if len(kept) == size:
            break
        wanted = _with_parts(number, parts) - kept
        if len(kept) + len(wanted) <= size:
            kept |= wanted
    return sorted(kept)


def _parts(content: Content) -> dict[int, tuple[int, int]]:
    """Return the two tokens that each token of BPE is merged from."""
    vocabulary, parts = content["model"]["vocab"], dict[int, tuple[int, int]]()
    for first, second, merged in _merges(content["model"]):
        parts.setdefault(vocabulary[merged], (vocabulary[first], vocabulary[second]))
    return parts


def _merges(model: Content) -> list[tuple[str, str, str]]:
    """Return the two parts of each merge of BPE, and what they are merged to."""
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second, first + second.removeprefix(prefix)) for first, second in pairs]


def _with_parts(number: int, parts: dict[int, tuple[int, int]]) -> set[int]:
    """Return a token, and all that it is merged from."""
    found, open_ends = set[int](), [number]
    while open_ends:
        if (number := open_ends.pop()) not in found:
            found.add(number)
            open_ends += parts.get(number, ())
    return found


def with_tokens(content: Content, kept: Sequence[int]) -> Content:
    """Return a tokenizer.json with these tokens alone, numbered anew in their order."""
    new = {old: number for number, old in enumerate(kept)}
    model = content["model"]
    if model["type"] == "Unigram":
        vocabulary: Any = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
    else:
        vocabulary = {piece: new[old] for piece, old in model["vocab"].items() if old in new}
    content = {**content, "model": {**model, "vocab": vocabulary}}
    if model["type"] == "BPE":
        content["model"]["merges"] = [merge[:2] for merge in _merges(model) if vocabulary.keys() >= set(merge)]
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
