"""Two records of what the package computes are compared line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.robustness import record


def compared(folder: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any], after: dict[str, Any]) -> int:
    for name, lines in (("before", before), ("after", after)):
        parts = sorted({line.split("/")[0] for line in lines})
        (folder / name).write_text(json.dumps({"machine": "this", "parts": parts, "lines": lines}))
    monkeypatch.setattr("sys.argv", ["record", "--compare", str(folder / "before"), str(folder / "after")])
    with pytest.raises(SystemExit) as end:
        record.main()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("after", "shown"),
    [
        ({"runs/a": "1", "bundles/b": {"image": {"file": "x"}, "text": None}}, "image: file: i -> x"),
        ({"runs/a": "1"}, ""),  # a record of one part
        ({"runs/a": "2", "runs/b": "3"}, "runs/b: None -> 3"),
    ],
)
def test_what_differs_is_named_and_ends_with_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: dict[str, Any],
    shown: str,
) -> None:
    before = {"runs/a": "1", "bundles/b": {"image": {"file": "i"}, "text": None}}
    assert compared(tmp_path, monkeypatch, before, before) == 0
    assert "DIFFERS" not in capsys.readouterr().out
    assert compared(tmp_path, monkeypatch, before, after) == bool(shown)
    assert shown in capsys.readouterr().out


def test_what_passes_is_no_part_of_a_manifest(tmp_path: Path) -> None:
    manifest = {"checksum": "1", "name": "a", "provenance": {"torch": "2.13.0+cpu", "model": "m"}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert record.content(tmp_path / "manifest.json") == {"name": "a", "provenance": {"model": "m"}}
