"""Tokenisation without torch, using the `tokenizers` library; token ids are identical to open_clip's."""

from __future__ import annotations

import base64
import contextlib
import html
import itertools
import operator
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.files import machine_failure, read_limited
from clip_rd_edge.utils.process import NativeCall
from clip_rd_edge.utils.structs import CheckedStruct

TokenIds = npt.NDArray[np.int64]
MAX_CONTEXT = 8192  # token ids per text: 33 times the longest context in open_clip
_MAX_FILE_BYTES = 128_000_000  # of tokenizer.json; Gemma's, with 256,000 words, has 34 MB
# Whoever made a bundle wrote its tokenizer.json, in which 40 stages may each double a text. These are the stages of
# CLIP's, SigLIP's and BERT's tokenizers, and of those of open_clip's other text towers.
_STAGES = {
    "normalizer": {
        *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace"),
        *("Sequence", "Strip", "StripAccents"),
    },
    "pre_tokenizer": {
        *("BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Sequence", "Split", "Whitespace"),
        "WhitespaceSplit",
    },
    "post_processor": {"BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"},
}
_REPEATABLE = {"Replace", "Sequence", "Split"}  # the others occur once
_MAX_STAGES = _MAX_ENTRIES = 16  # of a part, and of a list in it
_MAX_TEXT = 8_192  # characters of a pattern; CLIP's has 418
_MAX_PART_BYTES = 1 << 21  # XLM-R's largest has 0.4 MB
_MAX_GROWTH = 64  # of a text by all replacements, in bytes per character; one of NFKC's has 33
_TABLE = (
    "precompiled_charsmap"  # of replacements: the size of its index in 4 bytes, the index, texts that NUL separates
)
# Unigram's model takes up to 650 bytes for each character with which no other token goes on in the same way.
_MAX_TOKEN, _MAX_BRANCHES = 32, 4_000_000
_UnigramVocabulary = list[tuple[Annotated[str, Meta(max_length=_MAX_TOKEN)], float]]
_Affix = Annotated[str, Meta(max_length=64)] | None
_TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class TokenizerSpec(CheckedStruct, frozen=True, kw_only=True):
    """Tokenizer settings that are not part of `tokenizer.json`.

    Attributes:
        context_length: T, the token ids per text; longer texts are truncated, shorter ones padded.
        clean: open_clip's name for the text cleaning: `whitespace` fixes broken Unicode, HTML entities and white space;
            `lower` also converts to lower case; `canonicalize` also removes punctuation.
        pad_id: the padding id.
        end_id: CLIP's end token, kept as the last id of a truncated text; None if the tokenizer itself truncates.
    """

    context_length: Annotated[int, Meta(ge=2, le=MAX_CONTEXT)]
    clean: Literal["lower", "whitespace", "canonicalize"] = "lower"
    pad_id: _TokenId = 0
    end_id: _TokenId | None = None


class _Model(msgspec.Struct):
    """What is bounded of tokenizer.json's model."""

    type: Literal["BPE", "Unigram", "WordLevel", "WordPiece"]
    vocab: msgspec.Raw
    continuing_subword_prefix: _Affix = None
    end_of_word_suffix: _Affix = None
    max_input_chars_per_word: Annotated[int, Meta(ge=0, le=1_000)] = 100


class _Parts(msgspec.Struct):
    """What of tokenizer.json encodes texts; `decoder`, `padding` and `truncation` are not used."""

    model: msgspec.Raw
    added_tokens: msgspec.Raw = msgspec.Raw(b"[]")
    normalizer: msgspec.Raw = msgspec.Raw(b"null")
    pre_tokenizer: msgspec.Raw = msgspec.Raw(b"null")
    post_processor: msgspec.Raw = msgspec.Raw(b"null")


class Tokenizer:
    """Converts texts to token ids, shape (N, T) int64."""

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        import tokenizers  # late: not needed if labels come from the label bank

        with _reported(path), NativeCall():
            content = _bounded(read_limited(path, _MAX_FILE_BYTES))
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        self._path = path
        if spec.end_id is None:
            self._tokenizer.enable_truncation(max_length=spec.context_length)
        self.spec = spec

    def __call__(self, texts: Sequence[str]) -> TokenIds:
        cleaned = [clean_text(text, self.spec.clean) for text in texts]
        ids = np.full((len(cleaned), self.spec.context_length), self.spec.pad_id, dtype=np.int64)
        with _reported(self._path), NativeCall():
            encodings = self._tokenizer.encode_batch(cleaned)
        for row, encoding in zip(ids, encodings, strict=True):
            tokens = encoding.ids
            if len(tokens) > self.spec.context_length:
                tokens = [*tokens[: self.spec.context_length - 1], self.spec.end_id]
            row[: len(tokens)] = tokens
        return ids


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Report what the tokenizers library raises; a panic of its Rust code is a BaseException, but no reason to exit."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).rstrip(".")
        raise machine_failure(error) or ConfigError(  # the library starts a thread per core
            f"{path} could not be read as a tokenizer: {reason}.", hint="export the bundle again"
        ) from error


def _bounded(content: bytes) -> bytes:
    """Return what of tokenizer.json encodes texts; raise ValueError if it exceeds a bound."""
    parts = {"version": "1.0", **msgspec.structs.asdict(msgspec.json.decode(content, type=_Parts))}
    if fault := next(_faults(parts), ""):
        raise ValueError(fault)
    return msgspec.json.encode(parts)


def _faults(parts: dict[str, Any]) -> Iterator[str]:
    """Yield the bounds that are exceeded, and decode the parts: of two keys, other readers may take the first."""
    for name in ("added_tokens", *_STAGES):
        if (size := len(memoryview(parts[name]))) > _MAX_PART_BYTES:
            yield f"{name} has {size:,} bytes; expected at most {_MAX_PART_BYTES:,}"
        parts[name] = msgspec.json.decode(parts[name])
    for name, allowed in _STAGES.items():
        yield from _stage_faults(parts[name], allowed)
    model = msgspec.json.decode(parts["model"], type=_Model)
    if model.type == "Unigram":
        tokens = ["", *sorted(token for token, _ in msgspec.json.decode(model.vocab, type=_UnigramVocabulary))]
        if (branches := sum(map(len, tokens))) > _MAX_BRANCHES:  # else not counted: that takes a while
            alike = (itertools.takewhile(bool, map(operator.eq, a, b)) for a, b in itertools.pairwise(tokens))
            branches -= sum(map(len, map(list, alike)))
        if branches > _MAX_BRANCHES:
            yield f"its tokens have {branches:,} beginnings; expected at most {_MAX_BRANCHES:,}"


def _stage_faults(part: Any, allowed: set[str]) -> Iterator[str]:
    types, growth, waiting = Counter[str](), 1, [part]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict) and "type" in item:
            types[str(item["type"])] += 1
            growth *= max(1, len(item["content"]) if item["type"] == "Replace" else _longest(item.get(_TABLE, "")))
            item = {key: value for key, value in item.items() if key != _TABLE}
        if isinstance(item, dict | list):
            waiting += item.values() if isinstance(item, dict) else item
        if isinstance(item, dict | list | str) and len(item) > (_MAX_TEXT if isinstance(item, str) else _MAX_ENTRIES):
            yield f"{str(item)[:40]}… has the length {len(item):,}"
    if unknown := types.keys() - set(allowed):
        yield f"it has the stage {min(unknown)!r}; expected some of {', '.join(sorted(allowed))}"
    if sum(types.values()) > _MAX_STAGES or any(types[name] > 1 for name in types.keys() - _REPEATABLE):
        yield f"it has the stages {dict(types)}; expected at most {_MAX_STAGES}, and most of them once"
    if growth > _MAX_GROWTH:
        yield f"it makes a text up to {growth:,} times as long; expected at most {_MAX_GROWTH} times"


def _longest(table: str) -> int:
    """Return the length of the longest replacement in a table, in bytes."""
    content = base64.b64decode(table)
    return max(map(len, content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")))


def clean_text(text: str, mode: str) -> str:
    """Clean a text before tokenisation, as open_clip does (`open_clip.tokenizer.get_clean_fn`)."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # of others, nothing is broken or escaped
        import ftfy  # takes 30 ms, and most texts do without it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = text.strip()
    if mode == "canonicalize":
        text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    text = " ".join(text.split())
    return text if mode == "whitespace" else text.lower()
