from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.evidence import report as publish
from clip_rd_edge.evidence.report import markdown, read_evidence_file, write_evidence

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
    make: Make,
    tmp_path: Path,
    command_line: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for figure in ("learning_curves", "geometry_curves"):  # drawn in earnest where the suite is run
        monkeypatch.setattr(publish, figure, lambda evidence, name=figure: name.encode())
    page, source = tmp_path / "README.md", tmp_path / "small.json"
    page.write_text("# Before\n<!-- small: begin -->\nstale\n<!-- small: end -->\nafter\n")
    write_evidence(source, make(RIGHT))
    assert command_line("evidence", "report", source, "--into", page)[0] == 0
    text = page.read_text()
    assert text.startswith("# Before\n<!-- small: begin -->\n3 of 6 runs")
    assert text.endswith("<!-- small: end -->\nafter\n")
    assert "stale" not in text
    assert (tmp_path / "small-curves.png").read_bytes() == b"learning_curves"
    assert (tmp_path / "small-geometry.png").read_bytes() == b"geometry_curves"

    page.write_text("no marks\n")
    code, _, error = command_line("evidence", "report", source, "--into", page)
    assert (code, page.read_text()) == (2, "no marks\n")
    assert "has no lines <!-- small: begin -->" in error


def test_the_published_tables_are_those_of_the_published_file() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    (source,) = benchmarks.glob("results/*/method-evidence.json")
    page = (benchmarks / "README.md").read_text(encoding="utf-8")
    assert _without_intervals(markdown(read_evidence_file(source))) in _without_intervals(page)


def _without_intervals(text: str) -> str:
    """They hang on numpy's random numbers, which another version may draw otherwise; and bold hangs on them."""
    return re.sub(r" \([^)|]*\)|\*\*", "", text)
