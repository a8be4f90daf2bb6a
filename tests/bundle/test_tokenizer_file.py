"""What a tokenizer.json may hold: the stages of known tokenizers, within bounds, and nothing that is not needed."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.bundle.tokenizer import Tokenizer, TokenizerSpec
from clip_rd_edge.errors import ConfigError

GOOD = json.loads(Path("tests/corpus/good/bundle/tokenizer.json").read_text(encoding="utf-8"))
TEXTS = ["a photo of a red dog", "Ünïcode ﬁ½ " * 40, "a" * 2_000]
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
ALL = {"Sequence": {"id": "A", "type_id": 0}}
BOTH = [ALL, {"Sequence": {"id": "B", "type_id": 1}}]


def normalizers(*stages: Mapping[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": stages}}


def pre_tokenizers(*stages: Mapping[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": stages}}


def split(pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def replaces(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": content}


def template(*pieces: Mapping[str, Any], ids: int = 1) -> dict[str, Any]:
    special = {"id": "x", "ids": list(range(ids)), "tokens": ["x"] * ids}
    return {"type": "TemplateProcessing", "single": [*pieces, ALL], "pair": BOTH, "special_tokens": {"x": special}}


def model(**fields: Any) -> dict[str, Any]:
    return {"model": {**GOOD["model"], **fields}}


def unigram(*tokens: str) -> dict[str, Any]:
    return {"model": {"type": "Unigram", "unk_id": 0, "vocab": [[token, -1.0] for token in ("?", *tokens)]}}


def table(longest: int) -> dict[str, Any]:
    """A table of replacements with an empty index."""
    content = bytes(4) + b"ab\0" + b"x" * longest + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def tokenize(folder: Path, change: Mapping[str, Any]) -> Any:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**GOOD, **change}), encoding="utf-8")
    return Tokenizer(path, TokenizerSpec(context_length=16, end_id=1))(TEXTS)


EXCESSES: dict[str, dict[str, Any]] = {
    "each doubles a text": pre_tokenizers(*[BYTES] * 2),
    "nested": pre_tokenizers({"type": "Sequence", "pretokenizers": [BYTES]}, BYTES),
    "unknown normalizer": {"normalizer": {"type": "ByteLevel"}},
    "unknown pre-tokenizer": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "unknown model": model(type="Neural"),
    "many stages": pre_tokenizers({"type": "Sequence", "pretokenizers": [split({"String": "a"})] * 15}),
    "replacements of replacements": normalizers(*[replaces("a" * 9)] * 2),
    "long replacements in a table": {"normalizer": table(65)},
    "a table and a replacement": normalizers(replaces("aa"), table(33)),
    "long prefix": normalizers({"type": "Prepend", "prepend": "a" * 10_000}),
    "long pattern": pre_tokenizers(split({"Regex": "|".join(map(str, range(9_999)))})),
    "many pieces": {"post_processor": template(*[{"SpecialToken": {"id": "x", "type_id": 0}}] * 16)},
    "many ids": {"post_processor": template({"SpecialToken": {"id": "x", "type_id": 0}}, ids=17)},
    "templates in a row": {"post_processor": {"type": "Sequence", "processors": [template(), template()]}},
    "large part": {"normalizer": {"type": "NFC", "comment": ["a" * 8_000] * 300}},
    "many added tokens": {"added_tokens": [{"id": 10, "content": "a" * 1_000}] * 3_000},
    "prefix of all pieces": model(type="WordPiece", continuing_subword_prefix="#" * 65),
    "suffix of all words": model(type="BPE", end_of_word_suffix="#" * 65),
    "words of any length": model(type="WordPiece", max_input_chars_per_word=1_001),
    "long tokens": unigram("a" * 33),
}


@pytest.mark.parametrize("excess", EXCESSES)
def test_a_file_that_would_take_any_time_or_memory_is_refused(excess: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        tokenize(tmp_path, EXCESSES[excess])


def test_tokens_of_more_beginnings_than_memory_holds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_rd_edge.bundle.tokenizer._MAX_BRANCHES", 20)
    tokenize(tmp_path, unigram(*(f"abcdefgh{i}" for i in range(10))))  # 19, of 91 characters
    with pytest.raises(ConfigError, match="beginnings"):
        tokenize(tmp_path, unigram(*(f"{i}abc" for i in range(10))))


@pytest.mark.parametrize(
    "change",
    [
        normalizers({"type": "NFC"}, replaces("a"), replaces("a"), {"type": "Lowercase"}),
        {"post_processor": template({"SpecialToken": {"id": "x", "type_id": 0}})},
        unigram("▁a", "abc"),
    ],
)
def test_what_known_tokenizers_have_is_read(change: dict[str, Any], tmp_path: Path) -> None:
    assert tokenize(tmp_path, change).shape == (3, 16)


def test_what_does_not_encode_texts_is_not_read(tmp_path: Path) -> None:
    expected = tokenize(tmp_path, {})
    unused = {
        "decoder": {"type": "Sequence", "decoders": [{"type": "Unknown"}] * 100_000},
        "padding": {"strategy": {"Fixed": 10**9}},
        "truncation": {"max_length": -1},
    }
    assert np.array_equal(tokenize(tmp_path, unused), expected)


def test_of_two_keys_of_one_name_the_one_that_was_looked_at_is_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    text = json.dumps({**GOOD, **pre_tokenizers({"type": "Whitespace"})})
    bad = json.dumps([BYTES] * 40)
    path.write_text(text.replace('"pretokenizers":', f'"pretokenizers": {bad}, "pretokenizers":'), encoding="utf-8")
    assert Tokenizer(path, TokenizerSpec(context_length=16, end_id=1))(TEXTS).shape == (3, 16)
