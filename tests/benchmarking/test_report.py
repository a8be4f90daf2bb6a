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

from clip_rd_edge.benchmarking import tables as formatting
from clip_rd_edge.benchmarking.findings import headline
from clip_rd_edge.benchmarking.metrics import Interval, RetrievalScore, ZeroShotScore
from clip_rd_edge.benchmarking.report import (
    markdown,
    page,
    remarks,
    write_between_markers,
    write_report,
)
from clip_rd_edge.benchmarking.results import MissingTask, Results, RowResult, SkippedRow, read_results
from clip_rd_edge.benchmarking.run import run_suite
from clip_rd_edge.benchmarking.suite import Suite
from clip_rd_edge.benchmarking.tables import class_table, details, differences, score_tables, terminal_tables
from clip_rd_edge.data.tasks import RetrievalTask
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.paths import shipped_path
from clip_rd_edge.utils.text import each_text


def expected_figures(row: RowResult) -> list[str]:
    """Return all figures that a report must show of a row, as formatted."""
    latency = row.latency
    figures = [formatting.megabytes(row.description.size_bytes), formatting.millions(row.description.parameters)]
    for percentiles in (latency.image, latency.text, latency.end_to_end):
        figures += [formatting.three_digits(percentiles.p50), formatting.three_digits(percentiles.p95)]
    for score in row.scores:
        if isinstance(score, ZeroShotScore):
            figures += [formatting.percent(value) for value in (score.top1, score.top5, score.mean_per_class)]
            figures.append(formatting.interval(score.top1_interval))
        else:
            for recall in (score.image_to_text, score.text_to_image):
                figures += [formatting.percent(value) for value in (recall.at1, recall.at5, recall.at10)]
    return figures


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
    score = msgspec.convert(
        {
            "kind": "retrieval",
            "task": "pairs",
            "images": 7,
            "captions": 11,
            "image_to_text": recall,
            "text_to_image": {**recall, "at10": None},
        },
        RetrievalScore,
    )
    rows = tuple(msgspec.structs.replace(row, scores=(*row.scores, score)) for row in results.rows)
    return msgspec.structs.replace(results, rows=rows)


def test_energy_is_given_where_it_was_measured_and_the_report_says_why_not_elsewhere(results: Results) -> None:
    def with_energies(*energies: float | None, device: str) -> Results:
        first, second = (
            msgspec.structs.replace(row, energy_joules=joules)
            for row, joules in zip(results.rows, energies, strict=False)
        )
        second = msgspec.structs.replace(second, description=msgspec.structs.replace(second.description, device=device))
        return msgspec.structs.replace(results, rows=(first, second))

    mixed = with_energies(0.125, None, device="cuda")
    cells = {line.name: [cell.text for cell in line.cells] for section in details(mixed) for line in section.lines}
    assert cells["Energy per image, mJ"] == ["125", "–"]
    assert "Energy: of models on the CPU alone" in " ".join(remarks(mixed))
    assert "Energy: not available on this machine" in " ".join(remarks(with_energies(None, None, device="cuda")))
    assert "Energy" not in " ".join(remarks(with_energies(0.1, 0.2, device="cpu")))


def test_all_figures_of_the_results_are_in_both_reports(with_retrieval: Results) -> None:
    text, html = markdown(with_retrieval, plot=True), page(with_retrieval)
    for row in with_retrieval.rows:
        for figure in [row.label, *expected_figures(row)]:
            assert figure in text, (row.label, figure)
            assert figure in html, (row.label, figure)
    for comparison in with_retrieval.comparisons:
        assert formatting.signed_points(comparison.difference) in text
        assert formatting.signed_interval(comparison.interval) in html
    for fact in (with_retrieval.environment.machine, with_retrieval.environment.date):
        assert fact in text
        assert fact in html


def test_a_changed_result_changes_the_table_and_the_headline(results: Results) -> None:
    int8 = results.rows[-1]
    assert isinstance(int8.scores[0], ZeroShotScore)
    better = msgspec.structs.replace(int8.scores[0], top1=0.4321)
    rows = (*results.rows[:-1], msgspec.structs.replace(int8, scores=(better,)))
    changed = markdown(msgspec.structs.replace(results, rows=rows), plot=True)
    assert "| 43.2 (43\u00a0%) |" in changed
    assert "INT8 keeps **43\u00a0%** of the teacher's top-1 on task (43.2 % vs 100.0 %)" in changed


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
    ["<script>x</script>", "<img src=http://x>", "![x](http://x/y.png)", "[x](javascript:x)", "![x][y]", "a\n\n# b",
     "a\r- b", "a\u2028b", "\x1b[2J", "a|b"],
)  # fmt: skip
def test_markdown_has_no_html_link_or_image_from_any_text_of_the_results(results: Results, name: str) -> None:
    def report(name: str) -> str:
        skipped = (SkippedRow(label="x", model="x", reason="x", hint="x"),)
        missing = (MissingTask(name="x", reason="x"),)
        return markdown(
            with_every_text(msgspec.structs.replace(results, skipped=skipped, missing=missing), name), plot=True
        )

    text, clean = report(name), report("clean")
    assert "<" not in text
    assert "\x1b" not in text
    assert text.count("](") == 1  # the plot
    assert "][" not in text
    assert len(text.splitlines()) == len(clean.splitlines())
    assert sum(line.startswith("# ") for line in text.splitlines()) == 1


@pytest.mark.parametrize("name", ["<script>x</script>", "\x1b[2J", "\u202egnp.exe", '" onerror="x'])
def test_the_page_shows_any_text_of_the_results_and_obeys_none(results: Results, name: str) -> None:
    html = page(with_every_text(results, name))
    assert not set("\x1b\u202e") & set(html)
    assert "<script" not in html
    assert '" onerror' not in html


FIXED = {"role", "runtime", "kind", "missing_tasks", "interpolation", "resize_mode", "measure", "questions", "images"}


def with_every_text(results: Results, name: str) -> Results:
    """Return the results with `name` after every text in them, such as of labels, tasks and machines."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: entry if key in FIXED else change(entry) for key, entry in value.items()}
        return (
            [change(entry) for entry in value]
            if isinstance(value, list | tuple)
            else each_text(value, lambda text: text + name)
        )

    plain = msgspec.to_builtins(results, builtin_types=(bytes,))
    return msgspec.convert(change(plain), Results, builtin_types=(bytes,))


def test_names_are_escaped(suite: Suite, open_fake: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "models" / "task" / "red").rename(tmp_path / "models" / "task" / "<b>red|")
    measured = run_suite(msgspec.structs.replace(suite, name="<i>mine</i>"), open_fake)
    html, text = page(measured), markdown(measured, plot=True)
    assert "<i>mine" not in html
    assert "<b>red" not in html
    assert "<" not in text
    rows = [line for line in text.splitlines() if line.startswith("| &lt;b>red")]
    assert rows
    assert all(line.count("|") == 4 for line in rows)


def with_latencies(row: RowResult, *, image_ms: float, end_to_end_ms: float) -> RowResult:
    """Return the row with other median latencies."""
    image = msgspec.structs.replace(row.latency.image, p50=image_ms)
    end_to_end = msgspec.structs.replace(row.latency.end_to_end, p50=end_to_end_ms)
    return msgspec.structs.replace(
        row, latency=msgspec.structs.replace(row.latency, image=image, end_to_end=end_to_end)
    )


@pytest.fixture
def timed(results: Results) -> Results:
    """Return the results with known latencies; sizes are 6, 2, 4, 4 and 3 MB, top-1 is 100, 50, 67, 67 and 50 %."""
    latencies = {"Teacher": (20.0, 24.0), "Alone": (8.0, 9.0), "Student": (10.0, 12.0), "FP32": (6.0, 8.0)}
    rows = tuple(
        with_latencies(row, image_ms=image_ms, end_to_end_ms=end_to_end_ms)
        for row in results.rows
        for image_ms, end_to_end_ms in (latencies.get(row.label, (2.0, 3.0)),)
    )
    return msgspec.structs.replace(results, rows=rows)


def test_headline_leads_with_the_shipped_model_against_the_teacher(timed: Results) -> None:
    shipped, student, quantised, distilled = headline(timed)
    assert shipped == (
        "INT8 keeps **50\u00a0%** of the teacher's top-1 on task (50.0 % vs 100.0 %), "
        "is **8.0× faster** end to end (3.00 ms vs 24.0 ms from image file to label) "
        "and **2.0× smaller** (3.0 MB vs 6.0 MB)."
    )
    assert student == (
        "The student before export keeps **67\u00a0%** of the teacher's top-1 on task (66.7 % vs 100.0 %), "
        "is **1.5× smaller**, and its image tower is **2.0× faster**."
    )
    assert quantised.startswith("Compared with FP32, INT8 loses 16.7 points of top-1 (95 % confidence interval ")
    assert quantised.endswith(", so this may be chance), is **1.3× smaller**, and its image tower is **3.0× faster**.")
    assert distilled.startswith("Distillation changes top-1 by +16.7 points compared with the same student trained")


def test_headline_of_a_busy_machine_says_so_first_and_stresses_no_speed(timed: Results) -> None:
    busy, shipped, student, quantised, _ = headline(msgspec.structs.replace(timed, other_load=0.96))
    assert busy.startswith("The machine was busy: other processes used 96\u00a0% of it while the models were timed.")
    assert "is 8.0× faster end to end" in shipped
    assert student.endswith("is **1.5× smaller**, and its image tower is 2.0× faster.")
    assert quantised.endswith("and its image tower is 3.0× faster.")
    somewhat = msgspec.structs.replace(timed, other_load=0.1)  # as on a desktop; comparisons are made, too
    assert headline(somewhat) == headline(timed)
    assert any(remark.startswith("The machine was busy: other processes used 10") for remark in remarks(somewhat))


def test_headline_leads_with_the_last_exported_model_without_a_quantised_one(timed: Results) -> None:
    exported = timed.rows[3]
    last = msgspec.structs.replace(with_latencies(exported, image_ms=3.0, end_to_end_ms=48.0), label="OpenVINO")
    shipped, *_ = headline(msgspec.structs.replace(timed, rows=(*timed.rows[:-1], last)))
    assert shipped.startswith("OpenVINO keeps **67\u00a0%** of the teacher's top-1 on task")
    assert "is **2.0× slower** end to end (48.0 ms vs 24.0 ms from image file to label)" in shipped


def test_headline_of_the_last_of_several_quantised_models(timed: Results) -> None:
    other = msgspec.structs.replace(timed.rows[-1], label="INT8 per tensor")
    assert headline(msgspec.structs.replace(timed, rows=(*timed.rows, other)))[0].startswith("INT8 per tensor keeps")


def test_headline_without_a_shipped_model_is_about_the_student(timed: Results) -> None:
    (sentence,) = headline(msgspec.structs.replace(timed, rows=(timed.rows[0], timed.rows[2])))
    assert sentence.startswith("The student keeps **67\u00a0%** of the teacher's top-1")


def test_a_difference_of_a_few_answers_may_be_chance_though_its_interval_leaves_out_zero(timed: Results) -> None:
    comparison = msgspec.structs.replace(timed.comparisons[0], interval=Interval(-0.016, -0.002), p_value=0.125)
    shown = msgspec.structs.replace(timed, comparisons=(comparison,))
    assert differences(shown)[0].verdict == "not significant (exact sign test: p = 0.12)"
    wide = msgspec.structs.replace(comparison, interval=Interval(-0.016, 0.002))
    assert differences(msgspec.structs.replace(timed, comparisons=(wide,)))[0].verdict == "not significant"
    int8 = msgspec.structs.replace(comparison, label="INT8", reference="FP32")
    sentence = headline(msgspec.structs.replace(timed, comparisons=(int8,)))[-1]
    assert (
        "of top-1 (95 % confidence interval 0.2 to 1.6; exact sign test: p = 0.12, so this may be chance)" in sentence
    )
    known = msgspec.structs.replace(comparison, p_value=0.01)
    assert differences(msgspec.structs.replace(timed, comparisons=(known,)))[0].verdict == ""


def test_headline_reports_slower_larger_and_more_accurate_models(timed: Results) -> None:
    *_, fp32, int8 = timed.rows
    large = msgspec.structs.replace(int8.description, size_bytes=3 * fp32.description.size_bytes)
    changed = msgspec.structs.replace(with_latencies(int8, image_ms=12.0, end_to_end_ms=48.0), description=large)
    gained = tuple(
        msgspec.structs.replace(comparison, difference=0.021, interval=Interval(-0.01, 0.05))
        if (comparison.label, comparison.reference) == ("INT8", "FP32")
        else comparison
        for comparison in timed.comparisons
    )
    sentences = headline(msgspec.structs.replace(timed, rows=(*timed.rows[:-1], changed), comparisons=gained))
    assert sentences[0].endswith(
        "is **2.0× slower** end to end (48.0 ms vs 24.0 ms from image file to label) "
        "and **2.0× larger** (12.0 MB vs 6.0 MB)."
    )
    assert sentences[2] == (
        "Compared with FP32, INT8 gains 2.1 points of top-1 (95 % confidence interval −1.0 to 5.0, "
        "so this may be chance), "
        "is **3.0× larger**, and its image tower is **2.0× slower**."
    )


def test_headline_has_no_accuracy_relative_to_a_teacher_at_chance_level(timed: Results) -> None:
    teacher, *others = timed.rows
    assert isinstance(teacher.scores[0], ZeroShotScore)
    at_chance = msgspec.structs.replace(teacher.scores[0], top1=0.2, top1_interval=Interval(0.1, 0.3))
    rows = (msgspec.structs.replace(teacher, scores=(at_chance,)), *others)
    changed = msgspec.structs.replace(timed, rows=rows)
    chance, shipped, student, *_ = headline(changed)
    assert chance == "On task, the top-1 of Teacher is **no better than chance level** (16.7 %)."
    assert shipped.startswith("Compared with the teacher, INT8 is **8.0× faster** end to end")
    assert student == (
        "Compared with the teacher, the student before export is **1.5× smaller**, "
        "and its image tower is **2.0× faster**."
    )
    assert "Not significantly above chance level on task: Teacher." in page(changed)


def test_headline_reports_equal_models(timed: Results) -> None:
    teacher, _, student, *_, int8 = timed.rows
    equal = {"latency": teacher.latency, "description": teacher.description}
    student, int8 = (msgspec.structs.replace(row, **equal) for row in (student, int8))
    first, second = headline(msgspec.structs.replace(timed, rows=(teacher, student, int8)))
    assert "is **as fast** end to end (24.0 ms vs 24.0 ms from image file to label) and **the same size**" in first
    assert second.endswith("is **the same size**, and its image tower is **as fast**.")


def test_a_suite_of_one_model_has_a_headline(results: Results) -> None:
    alone = msgspec.structs.replace(results, rows=results.rows[1:2], comparisons=())
    (sentence,) = headline(alone)
    assert sentence.startswith("Alone reaches **50.0 %** top-1 on task, takes **")
    assert sentence.endswith("and needs **2.0 MB** on disk.")
    assert "teacher" not in markdown(alone, plot=True).split("## Sample")[0]


def test_skipped_rows_are_in_both_reports(results: Results) -> None:
    reason = "There is no model folder quickstart/bundles/int4."
    skipped = msgspec.structs.replace(results, skipped=(SkippedRow(label="INT4", model="int4", reason=reason),))
    for text in (markdown(skipped, plot=True), page(skipped)):
        assert "INT4" in text
        assert reason in text


def test_terminal_table_shows_latency_and_relative_accuracy(with_retrieval: Results) -> None:
    text = render(with_retrieval)
    for row in with_retrieval.rows:
        assert row.label in text
        assert formatting.three_digits(row.latency.end_to_end.p50) in text
    assert "67\u00a0%" in text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_terminal_tables_cut_nothing_and_fit(with_retrieval: Results, width: int) -> None:
    console = Console(width=width, file=StringIO())
    tables = terminal_tables(with_retrieval, width)
    for table in tables:
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(tables) == (1 if width == 200 else len(tables))
    assert "…" not in text
    assert text.count("End to end, ms") == len(tables)
    for row in with_retrieval.rows:
        assert text.count(f" {row.label}") >= 1
        assert text.count(formatting.three_digits(row.latency.end_to_end.p50)) >= 1


def test_score_tables_fit_80_columns(with_retrieval: Results) -> None:
    console = Console(width=80, file=StringIO())
    for table in score_tables(with_retrieval.rows[0].scores, 80):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for score in with_retrieval.rows[0].scores:
        assert score.task.split()[0] in text
    assert "Prompt templates: " in text


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_score_tables_cut_neither_names_nor_figures(with_retrieval: Results, width: int) -> None:
    console = Console(width=width, file=StringIO())
    scores = [
        msgspec.structs.replace(score, task=f"product-photos-winter-{year}")
        for score in with_retrieval.rows[0].scores
        for year in (2025, 2026)
    ]
    for table in score_tables(scores, width):
        console.print(table)
    for table in (class_table(score) for score in scores if isinstance(score, ZeroShotScore)):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "75.8 to 100.0" in text
    assert "12.3 / 45.6 / –" in text
    assert {"2025", "2026"} <= set(re.findall(r"\d{4}", text))


def test_score_tables_show_intervals_and_recall(with_retrieval: Results) -> None:
    console = Console(width=200, file=StringIO())
    for table in score_tables(with_retrieval.rows[0].scores, 200):
        console.print(table)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "75.8 to 100.0" in output
    assert "12.3 / 45.6 / –" in output


def test_write_report_writes_all_files(results: Results, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    write_report(results, folder)
    names = {"results.json", "report.md", "report.html", "accuracy-latency.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert read_results(folder / "results.json") == results
    assert (folder / "accuracy-latency.png").read_bytes().startswith(b"\x89PNG")
    assert "![" in (folder / "report.md").read_text()


def test_a_suite_with_only_retrieval_has_no_plot_and_no_samples(
    suite: Suite,
    open_fake: Callable[[str], Any],
    colour_retrieval: RetrievalTask,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(Suite, "load_tasks", lambda self: [colour_retrieval])
    measured = run_suite(suite, open_fake)
    write_report(measured, tmp_path / "report")
    assert not (tmp_path / "report" / "accuracy-latency.png").exists()
    text = (tmp_path / "report" / "report.md").read_text()
    assert "![" not in text
    assert "Compared with the teacher, the student before export is **1.5× smaller**" in text
    assert "Image → text, R@1, %" in text
    assert "<figure" not in (tmp_path / "report" / "report.html").read_text()


def render(results: Results) -> str:
    console = Console(width=200, file=StringIO())
    (table,) = terminal_tables(results, 200)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_label_is_no_markup(results: Results) -> None:
    label = "Teacher [/models/a]"
    renamed = msgspec.structs.replace(results.rows[0], label=label)
    results = msgspec.structs.replace(results, rows=(renamed, *results.rows[1:]))
    output = StringIO()
    console = Console(width=60, file=output, markup=False, emoji=False)
    for table in terminal_tables(results, 60):
        console.print(table)
    assert label in output.getvalue()


def test_the_text_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    write_between_markers(page, "table", "| new |")
    assert page.read_text() == "before\n<!-- table: begin -->\n| new |\n<!-- table: end -->\nafter\n"
    page.write_bytes(b"before\r\n<!-- table: begin -->\r\n<!-- table: end -->\r\n")
    write_between_markers(page, "table", "| a |\n| b |")
    assert page.read_bytes() == b"before\r\n<!-- table: begin -->\r\n| a |\r\n| b |\r\n<!-- table: end -->\r\n"
    with pytest.raises(InputError, match="no lines <!-- other: begin -->"):
        write_between_markers(page, "other", "| new |")
    with pytest.raises(InputError, match=r"Cannot read .*nope\.md: No such file"):
        write_between_markers(tmp_path / "nope.md", "table", "| new |")
    page.write_bytes("<!-- table: begin -->é<!-- table: end -->".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        write_between_markers(page, "table", "| new |")


@pytest.mark.parametrize("name", ["towers", "peers"])
def test_the_benchmarks_readme_has_the_markers(name: str) -> None:
    text = (shipped_path("benchmarks") / "README.md").read_text()
    assert text.index(f"<!-- {name}: begin -->") < text.index(f"<!-- {name}: end -->")
