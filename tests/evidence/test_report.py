from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

import clip_rd_edge
from clip_rd_edge.errors import UsageError
from clip_rd_edge.evidence import report
from clip_rd_edge.evidence.report import markdown, read_evidence_file, write_evidence
from clip_rd_edge.evidence.suite import Evidence
from clip_rd_edge.utils.structs import to_yaml

from .conftest import Make

CORRECT = {("none", 0): 4, ("clip-rd", 0): 12, ("none", 1): 3}  # three of six runs are finished


def test_a_task_that_was_trained_on_is_named(make: Make) -> None:
    evidence = make(CORRECT)
    assert "trained and evaluated" not in markdown(evidence)
    suite = replace(evidence.suite, data="./pairs.csv", tasks=("squares", "pairs.csv"))
    assert "pairs.csv is both trained and evaluated on" in markdown(replace(evidence, suite=suite))


def test_a_machine_or_task_is_no_markup(make: Make) -> None:
    evidence = make(CORRECT)
    name = "<script>[x](http://x)\x1b[2J\n\n# b"
    environment = replace(evidence.runs[0].environment, machine=name)
    runs = tuple(replace(run, environment=environment) for run in evidence.runs)
    suite = replace(evidence.suite, data=name, tasks=(name,))
    text = markdown(replace(evidence, suite=suite, runs=runs))
    assert not any(part in text for part in ("<", "](", "\x1b", "\n# "))


def test_the_published_tables_match_the_published_results() -> None:
    """But for intervals and bold, which depend on random numbers that may differ between versions of numpy."""

    def without_intervals(text: str) -> str:
        return re.sub(r" \([^)|]*\)|\*\*", "", text)

    benchmarks = Path(__file__).parents[2] / "benchmarks"
    pages = sorted(benchmarks.glob("measurements/*.md"))
    page = without_intervals("".join(path.read_text(encoding="utf-8") for path in pages))
    names = {"bank", "bank-text", "bank-choice", "tokens", "trimmed", "equal-time", "method-evidence"}
    published = [source for source in sorted(benchmarks.glob("results/*/*.json")) if source.stem in names]
    assert {source.stem for source in published} == names
    for source in published:
        assert without_intervals(markdown(read_evidence_file(source))) in page


def test_evidence_is_read_as_it_was_written(make: Make, tmp_path: Path) -> None:
    path, evidence = tmp_path / "small.json", make(CORRECT)
    write_evidence(path, evidence)
    assert read_evidence_file(path) == evidence
    assert sum(line.startswith('{"student"') for line in path.read_text().splitlines()) == len(evidence.runs)


def test_a_secret_in_the_address_of_the_data_is_not_in_the_evidence(make: Make, tmp_path: Path) -> None:
    evidence = make(CORRECT)
    suite = replace(evidence.suite, data="https://me:SECRET@a.example/{0..9}.tar?sig=SECRET")
    write_evidence(tmp_path / "small.json", replace(evidence, suite=suite))
    assert "SECRET" not in (tmp_path / "small.json").read_text()
    assert read_evidence_file(tmp_path / "small.json").suite.data == "https://a.example/{0..9}.tar"


def test_one_command_updates_the_page_and_the_figures(
    make: Make, tmp_path: Path, command_line: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for figure in ("learning_curves", "geometry_curves"):  # the test that runs the suite draws them
        monkeypatch.setattr(report, figure, lambda *_, name=figure, **__: name.encode())
    page, source = tmp_path / "README.md", tmp_path / "small.json"
    page.write_text("# Before\n<!-- small: begin -->\nstale\n<!-- small: end -->\nafter\n")
    write_evidence(source, make(CORRECT))
    assert command_line("evidence", "report", source, "--into", page)[0] == 0
    text = page.read_text()
    assert text.startswith("# Before\n<!-- small: begin -->\n3 of 6 runs")
    assert text.endswith("<!-- small: end -->\nafter\n")
    assert "stale" not in text
    assert ", 1.5 minutes per run" in text  # and not 1.5 to 1.5
    assert (tmp_path / "small-curves.png").read_bytes() == b"learning_curves"
    assert (tmp_path / "small-geometry.png").read_bytes() == b"geometry_curves"

    page.write_text("no markers\n")
    code, _, error = command_line("evidence", "report", source, "--into", page)
    assert (code, page.read_text()) == (2, "no markers\n")
    assert "has no lines <!-- small: begin -->" in error


def test_a_report_replaces_an_earlier_one_and_no_file_of_the_users(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence, suite, folder = make(CORRECT), tmp_path / "suite.yaml", tmp_path / "out"
    suite.write_text(to_yaml(evidence.suite))
    runs = []

    def run(*_: object, **__: object) -> Evidence:
        runs.append(1)
        write_evidence(folder / "small.json", evidence)
        return evidence

    monkeypatch.setattr("clip_rd_edge.evidence.run.run_evidence", run)
    names = ("small.json", "small.md", "small-curves.png", "small-geometry.png")
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine")
        with pytest.raises(UsageError, match=f"{name} is not replaced"):
            clip_rd_edge.evidence_run(suite, folder)
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    assert not runs
    for _ in range(2):
        clip_rd_edge.evidence_run(suite, folder)
    assert {path.name for path in folder.iterdir()} == set(names)
