from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from clip_rd_edge.benchmarking import tables
from clip_rd_edge.benchmarking.metrics import RetrievalScore, ZeroShotScore
from clip_rd_edge.benchmarking.report import draw, figures_table, page, write_report
from clip_rd_edge.benchmarking.results import MissingTask, Results, SkippedRow, read_results
from clip_rd_edge.utils.text import each_text


@pytest.fixture(autouse=True)
def _quick_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture in no time; the plot has tests of its own."""
    if "real_plots" not in request.fixturenames:
        monkeypatch.setattr("clip_rd_edge.benchmarking.report.draw", lambda *_, **__: b"<svg></svg>")


@pytest.fixture
def real_plots() -> None:
    """Asked for by tests that look at the plot."""


class Tags(HTMLParser):
    """Checks that tags are closed, and collects the resources that the page loads."""

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
    """Return the results with an additional retrieval score in each row."""
    recall = {"at1": 0.123, "at5": 0.456, "at10": 0.789}
    content = {"kind": "retrieval", "task": "pairs", "images": 7, "captions": 11, "image_to_text": recall}
    score = msgspec.convert({**content, "text_to_image": {**recall, "at10": None}}, RetrievalScore)
    return replace(results, rows=tuple(replace(row, scores=(*row.scores, score)) for row in results.rows))


def expected_figures(results: Results) -> Iterator[str]:
    """Yield all figures that a report must show, as formatted."""
    for row in results.rows:
        yield from (row.label, tables.megabytes(row.description.size_bytes))
        yield tables.millions(row.description.parameters)
        for percentiles in (row.latency.image, row.latency.text, row.latency.end_to_end):
            assert percentiles is not None
            yield from (tables.three_digits(percentiles.p50), tables.three_digits(percentiles.p95))
        for score in row.scores:
            if isinstance(score, ZeroShotScore):
                yield from map(tables.percent, (score.top1, score.top5, score.mean_per_class))
                yield tables.interval(score.top1_interval)
            else:
                for recall in (score.image_to_text, score.text_to_image):
                    yield from map(tables.percent, (recall.at1, recall.at5, recall.at10))
    for comparison in results.comparisons:
        yield tables.signed_points(comparison.difference)
        yield tables.signed_interval(comparison.interval)
    yield from (results.environment.machine, results.environment.date)


def test_all_figures_of_the_results_are_in_the_report(with_retrieval: Results) -> None:
    skipped = (SkippedRow(label="INT4", model="int4", reason="There is no folder."),)
    html = page(replace(with_retrieval, skipped=skipped))
    for shown in (*expected_figures(with_retrieval), "INT4", "There is no folder."):
        assert shown in html, shown


def test_the_page_is_valid_and_loads_no_external_resources(results: Results) -> None:
    html = page(results)
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.seen >= {"table", "thead", "tbody", "figure", "dl", "details"}
    assert "script" not in tags.seen
    assert tags.sources
    assert all(source.startswith("data:image/") for source in tags.sources)
    assert not re.search(r"\$[a-z]", html)


@pytest.mark.parametrize(
    "name",
    ["<script>x</script><img src=http://x>", "![x](http://x/y.png)[x](javascript:x)![x][y]", "a\n\n# b\r- b\u2028b",
     "\x1b[2Ja|b\u202egnp.exe", '" onerror="x'],
)  # fmt: skip
def test_any_text_of_the_results_is_shown_and_never_obeyed(results: Results, name: str) -> None:
    skipped, missing = (SkippedRow(label="x", model="x", reason="x", hint="x"),), (MissingTask(name="x", reason="x"),)
    results = replace(results, skipped=skipped, missing=missing)
    text, clean = (figures_table(with_every_text(results, each)) for each in (name, "clean"))
    assert not set("<\x1b") & set(text)
    assert "](" not in text
    assert "][" not in text
    assert len(text.splitlines()) == len(clean.splitlines())
    html = page(with_every_text(results, name))
    assert not set("\x1b\u202e") & set(html)
    assert not any(word in html for word in ("<script", "<img src=http", '" onerror'))


FIXED = {"role", "runtime", "kind", "missing_tasks", "interpolation", "resize_mode", "measure", "questions", "images"}


def with_every_text(results: Results, name: str) -> Results:
    """Return the results with `name` after every text in them, such as of labels, tasks and machines."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: content if key in FIXED else change(content) for key, content in value.items()}
        if isinstance(value, list | tuple):
            return [change(content) for content in value]
        return each_text(value, lambda text: text + name)

    plain = msgspec.to_builtins(results, builtin_types=(bytes,))
    return msgspec.convert(change(plain), Results, builtin_types=(bytes,))


@pytest.mark.usefixtures("real_plots")
def test_write_report_writes_all_files(results: Results, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    write_report(results, folder)
    names = {"results.json", "report.html", "accuracy-latency.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert read_results(folder / "results.json") == results
    assert (folder / "accuracy-latency.png").read_bytes().startswith(b"\x89PNG")


def test_no_file_of_a_report_has_the_folder_of_this_package_or_a_secret(results: Results, tmp_path: Path) -> None:
    """Which hints name, such as pip install -e FOLDER[train], and paths within a clone."""
    clone = tmp_path / "clone"
    reason, hint = f"There is no model folder {clone}.", f"pip install -e '{clone}[train]'"
    tasks = (f"{clone}/photos", f"{clone}s", "https://a.example/{0..9}.tar?sig=SECRET")
    suite = replace(results.suite, root=str(clone), tasks=tasks)
    skipped = (SkippedRow(label="x", model=str(clone / "models" / "x"), reason=reason, hint=hint),)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clip_rd_edge.errors._origin", lambda: {"url": clone.as_uri(), "dir_info": {"editable": True}})
        write_report(replace(results, suite=suite, skipped=skipped), tmp_path / "report")
    for path in (tmp_path / "report").iterdir():
        for text in (f"{clone}/", f"{clone}[", "SECRET"):
            assert text.encode() not in path.read_bytes()
    read = read_results(tmp_path / "report")
    assert read.skipped[0].hint == "pip install 'clip-rd-edge[train]'"
    assert read.suite.tasks == ("clip-rd-edge/photos", f"{clone}s", "https://a.example/{0..9}.tar")
    assert read.samples == results.samples


def test_results_without_a_zero_shot_task_have_no_plot(results: Results) -> None:
    rows = tuple(replace(row, scores=()) for row in results.rows[:1])
    assert draw(replace(results, rows=rows), file_format="png") is None
