from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.evidence.publish import read_evidence_file, write_evidence
from clip_rd_edge.evidence.tables import markdown

from .conftest import Make

RIGHT = {("none", 0): 4, ("clip-rd", 0): 12, ("none", 1): 3}  # five of six runs are yet to come, or have failed


def test_half_the_way_gives_a_table(make: Make) -> None:
    text = markdown(make(RIGHT))
    assert text.startswith("3 of 6 runs are done: 2 steps of 6 pairs")
    assert "| test_vit | `none` | 2 | 17.5 ± 3.5 | 17.5 ± 3.5 | 17.5 ± 3.5 |" in text
    assert "| test_vit | `clip-rd` | 1 | **+40.0 (+" in text
    assert "without-xrd" not in text
    assert "| 0.500 ± 0.000 | −0.125 ± 0.000 | 0.625 ± 0.000 |" in text


def test_the_file_gives_back_what_was_written(make: Make, tmp_path: Path) -> None:
    path, evidence = tmp_path / "small.json", make(RIGHT)
    write_evidence(path, evidence)
    assert read_evidence_file(path) == evidence
    assert sum(line.startswith('{"student"') for line in path.read_text().splitlines()) == len(evidence.runs)
    content = msgspec.json.decode(path.read_bytes())
    for damaged, message in (({"format_version": 9}, "format version 9"), ({"runs": []}, "has no runs")):
        path.write_bytes(msgspec.json.encode({**content, **damaged}))
        with pytest.raises(ConfigError, match=message):
            read_evidence_file(path)


def test_one_command_renews_page_and_figures(
    make: Make, tmp_path: Path, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    pytest.importorskip("matplotlib")
    page, source = tmp_path / "README.md", tmp_path / "small.json"
    page.write_text("# Before\n<!-- begin small (by a command) -->\nstale\n<!-- end small -->\nafter\n")
    write_evidence(source, make(RIGHT))
    assert command_line("evidence", "report", source, "--into", page)[0] == 0
    text = page.read_text()
    assert text.startswith("# Before\n<!-- begin small (by a command) -->\n3 of 6 runs")
    assert text.endswith("<!-- end small -->\nafter\n")
    assert "stale" not in text
    for name in ("small-curves.png", "small-geometry.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    page.write_text("no marks\n")
    code, _, error = command_line("evidence", "report", source, "--into", page)
    assert (code, page.read_text()) == (2, "no marks\n")
    assert "0 lines that begin and 0 that end 'small'" in error
