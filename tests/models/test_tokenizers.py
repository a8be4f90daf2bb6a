"""The format of the file; tests/bundle/test_tokenizer.py tests that its ids equal open_clip's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models

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
