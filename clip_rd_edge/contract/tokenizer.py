"""Captions to token ids without torch, by the `tokenizers` library, equal to open_clip's tokenizers."""

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
    """What `tokenizer.json` does not say.

    Attributes:
        context_length: ids a text, T; longer ones are cut, shorter ones padded.
        clean: open_clip's name for what is done to the text first: `whitespace` mends broken Unicode, HTML entities and
            white space; `lower` makes it lower case, too; `canonicalize` also drops punctuation.
        pad_id: what fills the rest.
        end_id: CLIP's end token, kept as the last id of a text that was cut; None where the tokenizer sees to that.
    """

    context_length: int
    clean: Literal["lower", "whitespace", "canonicalize"] = "lower"
    pad_id: int = 0
    end_id: int | None = None


class Tokenizer:
    """Texts to ids, shape (N, T) int64.

    Raises:
        ConfigError: `path` is missing or no tokenizer file.
    """

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        from tokenizers import Tokenizer as FastTokenizer  # only when a text is met: labels may come from the bank

        try:
            self._tokenizer: Any = FastTokenizer.from_file(str(path))
        except Exception as error:
            raise ConfigError(f"{path} cannot be read as a tokenizer: {error}.") from error
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


def clean_text(text: str, how: str) -> str:
    """What open_clip does to a caption before it cuts it into tokens (`open_clip.tokenizer.get_clean_fn`)."""
    import ftfy  # 30 ms: only where a text is met

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if how == "canonicalize":
        text = _without_punctuation(text)
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


def _without_punctuation(text: str) -> str:
    import string

    return text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
