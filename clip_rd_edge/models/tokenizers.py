"""Export open_clip's tokenizers to a tokenizer.json for the `tokenizers` library, so that a device needs no torch."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.manifest import TOKENIZER
from clip_rd_edge.bundle.tokenizer import TokenizerSpec
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError
from clip_rd_edge.utils.files import write_text

# The pattern by which open_clip's SimpleTokenizer splits a cleaned text; its special tokens go in front. The original
# ignores case: U+0345, a mark whose upper case is a letter, then counts neither as a letter nor as another character,
# and is dropped. LETTERS and NUMBERS are those that the library's Unicode tables lack.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}LETTERS]+|[\p{N}NUMBERS]|[^\s\p{L}LETTERS\p{N}NUMBERS\x{0345}]+"
_END_OF_WORD = "</w>"


def export_tokenizer(tokenizer: Any, folder: Path) -> TokenizerSpec:
    """Write tokenizer.json from an open_clip `SimpleTokenizer` or `HFTokenizer`; return the settings it cannot hold.

    Ids are the same for every text. Letters and numbers that are too new for the library's Unicode tables are written
    into the file, as far as this Python's `regex`, which open_clip uses, has them.
    """
    import open_clip

    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return _export_clip_bpe(tokenizer, folder / TOKENIZER)
    if isinstance(tokenizer, open_clip.tokenizer.HFTokenizer):
        return _export_hugging_face(tokenizer, folder / TOKENIZER)
    raise ClipRdEdgeError(
        f"A tokenizer of type {type(tokenizer).__name__} cannot be exported; "
        "expected open_clip's SimpleTokenizer or HFTokenizer."
    )


def _export_clip_bpe(tokenizer: Any, path: Path) -> TokenizerSpec:
    specials = {name: token_id for name, token_id in tokenizer.encoder.items() if token_id in tokenizer.all_special_ids}
    vocabulary = {name: token_id for name, token_id in tokenizer.encoder.items() if name not in specials}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    free_ids = itertools.count(len(tokenizer.encoder))
    for name, token_id in specials.items():
        _add_special_token(name, token_id, vocabulary=vocabulary, merges=merges, free_ids=free_ids)
    fast = _bpe(vocabulary, merges, specials)
    start, end = _start_and_end(tokenizer)
    fast.post_processor = _between(start, end, specials)
    _write(fast, path)
    return TokenizerSpec(
        context_length=int(tokenizer.context_length), clean=_cleaning_name(tokenizer), end_id=specials[end]
    )


def vocabulary_of(tokenizer: Any) -> dict[str, int]:
    """Return the tokens with their ids, of an open_clip `SimpleTokenizer` or `HFTokenizer`; empty for other types."""
    vocabulary: dict[str, int] = getattr(tokenizer, "encoder", {})
    inner = getattr(tokenizer, "tokenizer", None)
    return vocabulary if inner is None else inner.get_vocab()


def write_clip_tokenizer(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write open_clip's `SimpleTokenizer` as a tokenizer of Hugging Face; return the options that `HFTokenizer` needs.

    Ids are the same for every text but one that has a special token within a word. Texts are padded with the end token
    instead of 0, as in OpenAI's own files, since "!" has the 0.
    """
    from transformers import PreTrainedTokenizerFast

    start, end = _start_and_end(tokenizer)
    vocabulary = {name: token_id for name, token_id in tokenizer.encoder.items() if name not in (start, end)}
    fast = _bpe(vocabulary, sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get), ())
    fast.add_special_tokens([start, end])
    fast.post_processor = _between(start, end, {name: fast.token_to_id(name) for name in (start, end)})
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=start, eos_token=end, pad_token=end).save_pretrained(
        folder
    )
    return {"clean": _cleaning_name(tokenizer)}


def _start_and_end(tokenizer: Any) -> tuple[str, str]:
    start, end = (tokenizer.decoder[token_id] for token_id in tokenizer.all_special_ids[:2])
    return start, end


def _bpe(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], words: Iterable[str]) -> Any:
    """Return CLIP's BPE as a `tokenizers.Tokenizer`, which also takes each of `words` for a word."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    fast: Any = Tokenizer(models.BPE(vocabulary, list(merges), end_of_word_suffix=_END_OF_WORD))
    others = _WORDS.replace("LETTERS", _newer_than_the_library("L")).replace("NUMBERS", _newer_than_the_library("N"))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join([*words, others])), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return fast


def _between(start: str, end: str, ids: Mapping[str, int]) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )


@cache
def _newer_than_the_library(category: Literal["L", "N"]) -> str:
    """Return the ranges, for a character class, of letters or numbers that `regex` knows and `tokenizers` does not."""
    import regex  # comes with open_clip
    from tokenizers import Regex, pre_tokenizers

    everything = "".join(map(chr, itertools.chain(range(0xD800), range(0xE000, sys.maxunicode + 1))))
    characters = "".join(regex.findall(rf"\p{{{category}}}+", everything))
    split = pre_tokenizers.Split(Regex(rf"\p{{{category}}}+"), behavior="removed")
    codes = sorted(ord(character) for piece, _ in split.pre_tokenize_str(characters) for character in piece)
    # Consecutive codes have the same distance from their positions.
    groups = (list(group) for _, group in itertools.groupby(enumerate(codes), lambda item: item[1] - item[0]))
    return "".join(f"{chr(group[0][1])}-{chr(group[-1][1])}" for group in groups)


def _add_special_token(
    name: str, token_id: int, *, vocabulary: dict[str, int], merges: list[tuple[str, str]], free_ids: Iterator[int]
) -> None:
    """Add merges to the model that turn a special token's name, as a separate word of a text, into its single id.

    open_clip recognises the name only where its pattern splits it off as a word: in `!<end_of_text>`, the `<` belongs
    to `!<`. The library finds its added tokens anywhere, so they cannot be used here. The merges cannot affect another
    word, because no other word has a bracket and a letter in it; and they come after all others, so the pieces are
    known.
    """
    from tokenizers import models

    pieces = [token.value for token in models.BPE(vocabulary, merges, end_of_word_suffix=_END_OF_WORD).tokenize(name)]
    merged = pieces[0]
    for piece in pieces[1:]:
        merges.append((merged, piece))
        merged += piece
        # Partial names are intermediate steps that never remain in a tokenised text. Their ids follow those of the
        # tokens, because the library's warning about gaps lists every missing id.
        vocabulary[merged] = token_id if merged == name + _END_OF_WORD else next(free_ids)


def _export_hugging_face(tokenizer: Any, path: Path) -> TokenizerSpec:
    inner = tokenizer.tokenizer
    backend: Any = getattr(inner, "backend_tokenizer", None)
    for unsupported, reason in (
        (backend is None, "has no fast version"),
        (tokenizer.tokenizer_mode, f"has the mode {tokenizer.tokenizer_mode!r}"),
        (tokenizer.strip_sep_token, "strips its separator"),
        (inner.padding_side != "right", f"pads on the {inner.padding_side}"),
        (inner.truncation_side != "right", f"truncates on the {inner.truncation_side}"),
    ):
        if unsupported:
            raise ClipRdEdgeError(f"The tokenizer {inner.name_or_path!r} {reason}, which a bundle cannot express.")
    _write(backend, path)
    return TokenizerSpec(
        context_length=int(tokenizer.context_length), clean=_cleaning_name(tokenizer), pad_id=int(inner.pad_token_id)
    )


def _write(tokenizer: Any, path: Path) -> None:
    """Save a `tokenizers.Tokenizer` with its merges as `"a b"`: the file is a tenth smaller and opens faster."""
    content = json.loads(tokenizer.to_str())
    merges = content["model"].get("merges", [])
    if merges and not any(" " in piece for pair in merges for piece in pair):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
    write_text(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")))


def _cleaning_name(tokenizer: Any) -> Literal["lower", "whitespace", "canonicalize"]:
    from open_clip.tokenizer import get_clean_fn

    names: tuple[Literal["lower", "whitespace", "canonicalize"], ...] = ("lower", "whitespace", "canonicalize")
    return next(name for name in names if tokenizer.clean_fn is get_clean_fn(name))


Content = dict[str, Any]
# By kind of model: what marks a piece within a word, or at its beginning.
_MARKS = {"WordPiece": "##", "Unigram": "▁", "BPE": ""}
_BYTE = "<0x{:02X}>"  # a piece of a character that no other piece has


def pieces_of(content: Content, name: str) -> list[str]:
    """Return the tokens by id: those of the model, then what was added to it."""
    kind, vocabulary = content["model"]["type"], content["model"].get("vocab", {})
    if kind == "Unigram":
        numbered = list(enumerate(piece for piece, _ in vocabulary))
    else:
        numbered = sorted((number, piece) for piece, number in vocabulary.items())
    pieces = [piece for _, piece in numbered]
    if kind not in _MARKS or [number for number, _ in numbered] != list(range(len(pieces))):
        raise ConfigError(
            f"The tokenizer of {name} is of the kind {kind}; expected {', '.join(_MARKS)}, with a token for each id.",
            hint="omit {vocabulary}",
        )
    return [*pieces, *(token["content"] for token in content["added_tokens"] if token["id"] >= len(pieces))]


def needed_tokens(content: Content, pieces: Sequence[str], used: npt.NDArray[np.int64], special: set[int]) -> set[int]:
    """Return the ids without which a text would have no tokens: special ones, and single characters of the texts.

    With BPE, these are all tokens that are not merged from others: 512 of CLIP's, which spell any text.

    Args:
        pieces: of `pieces_of`.
        used: how often each token occurs in the texts.
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
    vocabulary, parts = content["model"]["vocab"], dict[int, tuple[int, int]]()
    for first, second, merged in _merges(content["model"]):
        parts.setdefault(vocabulary[merged], (vocabulary[first], vocabulary[second]))
    return parts


def _merges(model: Content) -> list[tuple[str, str, str]]:
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second, first + second.removeprefix(prefix)) for first, second in pairs]


def _with_parts(number: int, parts: dict[int, tuple[int, int]]) -> set[int]:
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
