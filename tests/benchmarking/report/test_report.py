from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from clip_rd_edge.benchmarking import formatting as formats
from clip_rd_edge.benchmarking.metrics import Interval, RetrievalScore, ZeroShotScore
from clip_rd_edge.benchmarking.report.findings import headline
from clip_rd_edge.benchmarking.report.html import page
from clip_rd_edge.benchmarking.report.text import (
    markdown,
    score_tables,
    terminal_table,
    write_between_marks,
    write_report,
)
from clip_rd_edge.benchmarking.results import Results, RowResult, SkippedRow, read_results
from clip_rd_edge.benchmarking.run import run_suite
from clip_rd_edge.benchmarking.suite import Suite
from clip_rd_edge.contract.task import RetrievalTask
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.io import shipped


def numbers_of(row: RowResult) -> list[str]:
    """Every number that a report must show of a row, as it must show it."""
    latency = row.latency
    found = [formats.megabytes(row.description.size_bytes), formats.millions(row.description.parameters)]
    for percentiles in (latency.image, latency.text, latency.end_to_end):
        found += [formats.milliseconds(percentiles.p50), formats.milliseconds(percentiles.p95)]
    for score in row.scores:
        if isinstance(score, ZeroShotScore):
            found += [formats.percent(value) for value in (score.top1, score.top5, score.mean_per_class)]
            found.append(formats.interval(score.top1_interval))
        else:
            for recall in (score.image_to_text, score.text_to_image):
                found += [formats.percent(value) for value in (recall.at1, recall.at5, recall.at10)]
    return found


class Tags(HTMLParser):
    """Counts open tags, and keeps what the page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "img", "source", "link"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def with_retrieval(results: Results) -> Results:
    """The same with a retrieval score a row."""
    recall = {"at1": 0.123, "at5": 0.456, "at10": 0.789}
    score = msgspec.convert(
        {
            "kind": "retrieval",
            "task": "pairs",
            "pictures": 7,
            "captions": 11,
            "image_to_text": recall,
            "text_to_image": {**recall, "at10": None},
        },
        RetrievalScore,
    )
    rows = tuple(msgspec.structs.replace(row, scores=(*row.scores, score)) for row in results.rows)
    return msgspec.structs.replace(results, rows=rows)


def test_every_number_of_the_results_stands_in_both_reports(with_retrieval: Results) -> None:
    text, html = markdown(with_retrieval, plot=True), page(with_retrieval)
    for row in with_retrieval.rows:
        for number in [row.label, *numbers_of(row)]:
            assert number in text, (row.label, number)
            assert number in html, (row.label, number)
    for found in with_retrieval.comparisons:
        assert formats.signed_points(found.difference) in text
        assert formats.signed_interval(found.interval) in html
    for fact in (with_retrieval.environment.machine, with_retrieval.environment.date):
        assert fact in text
        assert fact in html


def test_a_changed_result_changes_table_and_headline(results: Results) -> None:
    student = results.rows[2]
    assert isinstance(student.scores[0], ZeroShotScore)
    better = msgspec.structs.replace(student.scores[0], top1=0.4321)
    rows = (*results.rows[:2], msgspec.structs.replace(student, scores=(better,)), *results.rows[3:])
    changed = markdown(msgspec.structs.replace(results, rows=rows), plot=True)
    assert "| 43.2 (43\u00a0%) |" in changed
    assert "keeps **43\u00a0%** of the teacher's top-1" in changed


def test_the_page_is_whole_and_loads_nothing(results: Results) -> None:
    html = page(results)
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.seen >= {"table", "thead", "tbody", "figure", "dl", "details"}
    assert "script" not in tags.seen
    assert tags.sources
    assert all(source.startswith("data:image/") for source in tags.sources)
    assert not re.search(r"\$[a-z]", html)


def test_names_are_escaped(suite: Suite, open_fake: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "models" / "task" / "red").rename(tmp_path / "models" / "task" / "<b>red|")
    found = run_suite(msgspec.structs.replace(suite, name="<i>mine</i>"), open_fake)
    html, text = page(found), markdown(found, plot=True)
    assert "<i>mine" not in html
    assert "<b>red" not in html
    rows = [line for line in text.splitlines() if line.startswith("| <b>red")]
    assert all(line.count("|") == 4 for line in rows)


def test_headline_tells_cost_and_gain(results: Results) -> None:
    first, second, third, fourth = headline(results)
    assert first.startswith(
        "The student keeps **67\u00a0%** of the teacher's top-1 on task (66.7 of 100.0 %) at **1/1.5**"
    )
    assert "INT8 costs **" in second
    assert "**1/1.3** of the size of FP32" in second
    assert "the teacher" in third
    assert fourth.startswith("Distilling brought **+")


def test_headline_says_slower_bigger_and_gained(results: Results) -> None:
    *_, fp32, int8 = results.rows
    slow = msgspec.structs.replace(int8.latency, image=msgspec.structs.replace(fp32.latency.image, p50=99.0))
    big = msgspec.structs.replace(int8.description, size_bytes=3 * fp32.description.size_bytes)
    changed = msgspec.structs.replace(int8, latency=slow, description=big)
    gained = tuple(
        msgspec.structs.replace(found, difference=0.021, interval=Interval(-0.01, 0.05))
        if (found.label, found.reference) == ("INT8", "FP32")
        else found
        for found in results.comparisons
    )
    sentence = headline(msgspec.structs.replace(results, rows=(*results.rows[:-1], changed), comparisons=gained))[1]
    assert "gains **2.1 points** of top-1 (95 % interval −1.0 to 5.0)" in sentence
    assert "**3.0×** of the size" in sentence
    assert "slower**" in sentence


def test_no_part_of_a_teacher_that_guesses(results: Results) -> None:
    teacher, *others = results.rows
    assert isinstance(teacher.scores[0], ZeroShotScore)
    guess = msgspec.structs.replace(teacher.scores[0], top1=0.2, top1_interval=Interval(0.1, 0.3))
    rows = (msgspec.structs.replace(teacher, scores=(guess,)), *others)
    guessing = msgspec.structs.replace(results, rows=rows)
    assert headline(guessing)[0].startswith("The student has **1/1.5** of the teacher's size")
    assert "Not clearly better than a guess on task: Teacher." in page(guessing)


def test_headline_says_equal(results: Results) -> None:
    teacher, _, student, *_ = results.rows
    twin = msgspec.structs.replace(student, latency=teacher.latency, description=teacher.description)
    (sentence,) = headline(msgspec.structs.replace(results, rows=(teacher, twin)))
    assert "at **100 %** of its size, and its image tower is **as fast**." in sentence


def test_a_suite_of_one_model_has_a_headline(results: Results) -> None:
    alone = msgspec.structs.replace(results, rows=results.rows[1:2], comparisons=())
    (sentence,) = headline(alone)
    assert sentence.startswith("Alone reaches **")
    assert "2.0 MB" in sentence
    assert "teacher" not in markdown(alone, plot=True).split("## Every other")[0].split("## What")[0]


def test_skipped_rows_stand_in_both_reports(results: Results) -> None:
    reason = "There is no model folder quickstart/bundles/int4."
    skipped = msgspec.structs.replace(results, skipped=(SkippedRow(label="INT4", model="int4", reason=reason),))
    for text in (markdown(skipped, plot=True), page(skipped)):
        assert "INT4" in text
        assert reason in text


def test_terminal_table(with_retrieval: Results) -> None:
    text = on_terminal(with_retrieval)
    for row in with_retrieval.rows:
        assert row.label in text
        assert formats.milliseconds(row.latency.end_to_end.p50) in text
    assert "67\u00a0%" in text


def test_tables_of_scores(with_retrieval: Results) -> None:
    console = Console(width=200, file=StringIO())
    for table in score_tables(with_retrieval.rows[0].scores):
        console.print(table)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "100.0 to 100.0" in written
    assert "12.3 / 45.6 / –" in written


def test_write_report_and_its_files(results: Results, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    write_report(results, folder)
    names = {"results.json", "report.md", "report.html", "accuracy-latency.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert read_results(folder / "results.json") == results
    assert (folder / "accuracy-latency.png").read_bytes().startswith(b"\x89PNG")
    assert "![" in (folder / "report.md").read_text()


def test_a_suite_of_retrieval_alone_has_no_plot_and_no_samples(
    suite: Suite,
    open_fake: Callable[[str], Any],
    colour_retrieval: RetrievalTask,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(Suite, "load_tasks", lambda self, fallback: [colour_retrieval])
    found = run_suite(suite, open_fake)
    write_report(found, tmp_path / "report")
    assert not (tmp_path / "report" / "accuracy-latency.png").exists()
    text = (tmp_path / "report" / "report.md").read_text()
    assert "![" not in text
    assert "The student has **1/1.5** of the teacher's size" in text
    assert "Image → text, R@1, %" in text
    assert "<figure" not in (tmp_path / "report" / "report.html").read_text()


def on_terminal(results: Results) -> str:
    console = Console(width=200, file=StringIO())
    console.print(terminal_table(results))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- it: begin -->\nold\n<!-- it: end -->\nafter\n")
    write_between_marks(page, "it", "| new |")
    assert page.read_text() == "before\n<!-- it: begin -->\n| new |\n<!-- it: end -->\nafter\n"
    with pytest.raises(InputError, match="no lines <!-- other: begin -->"):
        write_between_marks(page, "other", "| new |")


@pytest.mark.parametrize("name", ["towers", "peers"])
def test_the_page_of_benchmarks_has_the_marks(name: str) -> None:
    text = (shipped("benchmarks") / "README.md").read_text()
    assert text.index(f"<!-- {name}: begin -->") < text.index(f"<!-- {name}: end -->")
