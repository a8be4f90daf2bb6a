"""The format of the file; tests/bundle/test_tokenizer.py tests that its ids equal open_clip's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from text_towers import bert_clip
from tokenizers import Tokenizer, models

from clip_rd_edge.bundle.tokenizer import Tokenizer as BundleTokenizer
from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.parity import HARD_TEXTS
from clip_rd_edge.models import tokenizers as exporter


def _hugging_face(model: Any) -> Any:
    inner = SimpleNamespace(
        backend_tokenizer=Tokenizer(model),
        padding_side="right",
        truncation_side="right",
        pad_token_id=0,
        name_or_path="x",
    )
    return SimpleNamespace(
        tokenizer=inner, tokenizer_mode=None, strip_sep_token=False, context_length=8, clean_fn=exporter
    )


@pytest.mark.parametrize(
    ("model", "merges"),
    [
        (models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), ["a b"]),
        (models.BPE({"a ": 0, "b": 1, "a b": 2}, [("a ", "b")]), [["a ", "b"]]),
        (models.Unigram([("a", 0.0), ("b", -1.0)]), None),
    ],
)
def test_merges_are_strings_unless_a_piece_has_a_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Any, merges: Any
) -> None:
    monkeypatch.setattr(exporter, "_cleaning_name", lambda _: "lower")
    monkeypatch.setattr("open_clip.tokenizer.HFTokenizer", SimpleNamespace)
    exporter.export_tokenizer(_hugging_face(model), tmp_path)
    path = tmp_path / "tokenizer.json"
    assert json.loads(path.read_text())["model"].get("merges") == merges
    assert Tokenizer.from_file(str(path)).to_str() == Tokenizer(model).to_str()


def test_a_tokenizer_that_keeps_the_end_of_a_long_text_is_refused(tmp_path: Path) -> None:
    words = bert_clip(tmp_path / "bert").tokenizer
    words.tokenizer.truncation_side = "left"
    with pytest.raises(ClipRdEdgeError):
        exporter.export_tokenizer(words, tmp_path)


def test_the_texts_that_tokenizers_are_compared_on_tell_at_which_end_they_truncate(tmp_path: Path) -> None:
    words = bert_clip(tmp_path / "bert", more=[*"0123456789", *(f"##{digit}" for digit in range(10))]).tokenizer
    spec = exporter.export_tokenizer(words, tmp_path)
    ids = BundleTokenizer(tmp_path / "tokenizer.json", spec)(HARD_TEXTS)
    assert (ids == words(list(HARD_TEXTS)).numpy()).all()
    words.tokenizer.truncation_side = "left"
    assert (ids != words(list(HARD_TEXTS)).numpy())[-1].any()
