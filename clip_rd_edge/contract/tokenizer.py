"""Tokenisation without torch, using the `tokenizers` library; token ids are identical to open_clip's."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.errors import ConfigError

TokenIds = npt.NDArray[np.int64]


class TokenizerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Tokenizer settings that are not part of `tokenizer.json`.

    Attributes:
        context_length: T, the token ids per text; longer texts are truncated, shorter ones padded.
        clean: open_clip's name for the text cleaning: `whitespace` fixes broken Unicode, HTML entities and white space;
            `lower` also converts to lower case; `canonicalize` also removes punctuation.
        pad_id: the padding id.
        end_id: CLIP's end token, kept as the last id of a truncated text; None if the tokenizer itself truncates.
    """

    context_length: int
    clean: Literal["lower", "whitespace", "canonicalize"] = "lower"
    pad_id: int = 0
    end_id: int | None = None


class Tokenizer:
    """Converts texts to token ids, shape (N, T) int64.

    Raises:
        ConfigError: `path` does not exist or is not a tokenizer file.
    """

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        from tokenizers import (
            Tokenizer as FastTokenizer,
        )  # imported late: not needed if labels come from the label bank

        try:
            self._tokenizer: Any = FastTokenizer.from_file(str(path))
        except Exception as error:
            raise ConfigError(f"{path} could not be read as a tokenizer: {error}.") from error
        self._tokenizer.no_padding()
        if spec.end_id is None:
            self._tokenizer.enable_truncation(max_length=spec.context_length)
        else:
            self._tokenizer.no_truncation()
        self.spec = spec

    def __call__(self, texts: Sequence[str]) -> TokenIds:
        cleaned = [clean_text(text, self.spec.clean) for text in texts]
        ids = np.full((len(cleaned), self.spec.context_length), self.spec.pad_id, dtype=np.int64)
        for row, encoding in zip(ids, self._tokenizer.encode_batch(cleaned), strict=True):
            tokens = encoding.ids
            if len(tokens) > self.spec.context_length:
                tokens = [*tokens[: self.spec.context_length - 1], self.spec.end_id]
            row[: len(tokens)] = tokens
        return ids


def clean_text(text: str, mode: str) -> str:
    """Clean a text before tokenisation, as open_clip does (`open_clip.tokenizer.get_clean_fn`)."""
    import ftfy  # takes 30 ms, and bundles may run without tokenising any text

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if mode == "canonicalize":
        text = _remove_punctuation(text)
    text = " ".join(text.split())
    return text if mode == "whitespace" else text.lower()


def _remove_punctuation(text: str) -> str:
    import string

    return text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
