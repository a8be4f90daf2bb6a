"""Tokenisation without torch, using the `tokenizers` library; token ids are identical to open_clip's."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.utils.checked import CheckedStruct
from clip_rd_edge.utils.files import machine_failure
from clip_rd_edge.utils.printable import is_unicode

TokenIds = npt.NDArray[np.int64]
MAX_CONTEXT = 8192  # token ids per text: 33 times the longest context in open_clip
_MAX_FILE_BYTES = 128_000_000  # of tokenizer.json; Gemma's, with 256,000 words, has 34 MB
_MAX_GROWTH = 64  # of a text by the tokenizer's normalisation, in characters of output per character
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


class Tokenizer:
    """Converts texts to token ids, shape (N, T) int64.

    Raises:
        ConfigError: `path` does not exist or is not a tokenizer file.
    """

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        from tokenizers import (
            Tokenizer as FastTokenizer,
        )  # imported late: not needed if labels come from the label bank

        if not path.is_file() or path.stat().st_size > _MAX_FILE_BYTES:
            reason = f"it is larger than {_MAX_FILE_BYTES:,} bytes" if path.is_file() else "the file does not exist"
            raise ConfigError(f"{path} could not be read as a tokenizer: {reason}.")
        with _reported(path):
            self._tokenizer: Any = FastTokenizer.from_file(str(path))
        _require_bounded(self._tokenizer.normalizer, path)
        self._path = path
        self._tokenizer.no_padding()
        if spec.end_id is None:
            self._tokenizer.enable_truncation(max_length=spec.context_length)
        else:
            self._tokenizer.no_truncation()
        self.spec = spec

    def __call__(self, texts: Sequence[str]) -> TokenIds:
        cleaned = [clean_text(text, self.spec.clean) for text in texts]
        ids = np.full((len(cleaned), self.spec.context_length), self.spec.pad_id, dtype=np.int64)
        with _reported(self._path):
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
        if failure := machine_failure(error):  # it starts a thread per core
            raise failure from error
        raise ConfigError(
            f"{path} could not be read as a tokenizer: {error}.", hint="export the bundle again"
        ) from error


def _require_bounded(normalizer: Any, path: Path) -> None:
    """Refuse replacements that multiply a text: ten times "a" by "aaaaaaaaaa" would take 10 GB for one letter."""
    growth = 1.0
    steps = [msgspec.json.decode(normalizer.__getstate__())] if normalizer is not None else []
    while steps:
        step = steps.pop()
        steps += step.get("normalizers") or []
        if step["type"] == "Replace":
            growth *= max(1, len(step["content"]))
    if growth > _MAX_GROWTH:
        raise ConfigError(
            f"{path} makes a text up to {growth:,.0f} times as long; expected at most {_MAX_GROWTH} times.",
            hint="export the bundle again",
        )


def clean_text(text: str, mode: str) -> str:
    """Clean a text before tokenisation, as open_clip does (`open_clip.tokenizer.get_clean_fn`)."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # of others, nothing is broken or escaped
        if not is_unicode(text):
            raise InputError(f"The text {text!r} is no Unicode: it has a half of a surrogate pair.")
        import ftfy  # takes 30 ms, and most texts do without it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = text.strip()
    if mode == "canonicalize":
        text = _remove_punctuation(text)
    text = " ".join(text.split())
    return text if mode == "whitespace" else text.lower()


def _remove_punctuation(text: str) -> str:
    import string

    return text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
