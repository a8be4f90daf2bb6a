"""The report as a single HTML file without scripts or external resources; images are embedded as data URIs."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from clip_rd_edge.benchmarking import formatting
from clip_rd_edge.benchmarking.report.findings import headline, shipped_row
from clip_rd_edge.benchmarking.report.method import facts, remarks, samples_note, worst_note
from clip_rd_edge.benchmarking.report.plot import DARK, LIGHT, Palette, draw
from clip_rd_edge.benchmarking.report.tables import RELATIVE_NOTE, Cell, Section, details, differences, sections
from clip_rd_edge.benchmarking.results import Answer, Results, RowResult, Sample, WorstClass
from clip_rd_edge.utils.text import printable

_TEMPLATE = Path(__file__).with_name("page.html")


def page(results: Results) -> str:
    """Return the report as HTML."""
    lead, *findings = headline(results)
    lead_row = shipped_row(results) if results.first("teacher") else None
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=f"{escape(results.suite.name)}: accuracy, latency, size",
        light=_css_variables(LIGHT),
        dark=_css_variables(DARK),
        lead=_emphasise(lead),
        lead_role=lead_row.role if lead_row else "student",
        findings=_findings(findings),
        plot=_plot(results),
        relative_note=_relative_note(results),
        comparison=_table(results, sections(results)),
        skipped=_skipped(results),
        samples=_samples(results),
        worst=_worst(results),
        differences=_differences(results),
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(results)),
        remarks="\n".join(f"<li>{escape(remark)}</li>" for remark in remarks(results)),
        details=_table(results, details(results)),
    )


def escape(text: str) -> str:
    """Return a text as HTML that shows it, control characters as escapes: some reorder the text around them."""
    return html.escape(printable(text))


def _css_variables(palette: Palette) -> str:
    return " ".join(f"--{role}: {colour};" for role, colour in palette.roles.items())


def _emphasise(sentence: str) -> str:
    unbroken = escape(sentence).replace("top-1", "top\u20111")
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", unbroken)


def _findings(sentences: Sequence[str]) -> str:
    paragraphs = "".join(f"<p>{_emphasise(sentence)}</p>" for sentence in sentences)
    return f'<div class="findings">{paragraphs}</div>' if sentences else ""


def _plot(results: Results) -> str:
    # Two images that the style sheet chooses from. A <picture> element would stay dark when a dark page is printed.
    images = "".join(_plot_image(results, name, palette) for name, palette in (("light", LIGHT), ("dark", DARK)))
    return f'<figure class="plot">{images}</figure>' if images else ""


def _plot_image(results: Results, name: str, palette: Palette) -> str:
    svg = draw(results, file_format="svg", palette=palette)
    if svg is None:
        return ""
    return (
        f'<img class="{name}" src="{_data_uri(svg, "image/svg+xml")}" width="640" height="420" '
        f'alt="Top-1 against the latency of the image tower; the table below has the numbers.">'
    )


def _relative_note(results: Results) -> str:
    return f'<p class="small">{RELATIVE_NOTE}</p>' if results.first("teacher") else ""


def _table(results: Results, shown: Sequence[Section]) -> str:
    headings = "".join(_column_heading(row) for row in results.rows)
    bodies = "".join(_table_body(section, len(results.rows)) for section in shown)
    head = f'<thead><tr><th scope="col">Model</th>{headings}</tr></thead>'
    return f'<div class="scroll" tabindex="0"><table class="models">{head}{bodies}</table></div>'


def _column_heading(row: RowResult) -> str:
    runtime = f"{row.description.runtime}, {row.description.precision}"
    dot = f'<span class="dot" style="--role: var(--{row.role})"></span>'
    return f'<th scope="col">{dot}{escape(row.label)}<small>{escape(runtime)}</small></th>'


def _table_body(section: Section, models: int) -> str:
    note = f" <span>{escape(section.note)}</span>" if section.note else ""
    title = f'<tr><th scope="rowgroup" colspan="{models + 1}">{escape(section.title)}{note}</th></tr>'
    lines = "".join(
        f'<tr><th scope="row">{escape(line.name)}</th>{"".join(map(_cell, line.cells))}</tr>' for line in section.lines
    )
    return f"<tbody>{title}{lines}</tbody>"


def _cell(cell: Cell) -> str:
    relative = f" <small>{escape(cell.relative)}</small>" if cell.relative else ""
    return f"<td>{escape(cell.text)}{relative}</td>"


def _skipped(results: Results) -> str:
    models = [(row.label, str(row)) for row in results.skipped]
    tasks = [(task.name, task.reason) for task in results.missing]
    return _reasons("Not measured:", models) + _reasons("Missing data sets:", tasks)


def _reasons(title: str, reasons: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li><strong>{escape(name)}</strong>: {escape(reason)}</li>" for name, reason in reasons)
    return f'<p>{title}</p><ul class="remarks">{items}</ul>' if items else ""


def _samples(results: Results) -> str:
    if not results.samples:
        return ""
    items = "\n".join(map(_sample, results.samples))
    return _image_section("samples", "Sample predictions", samples_note(results), items, css_class="samples")


def _worst(results: Results) -> str:
    if not results.worst:
        return ""
    items = "\n".join(map(_worst_class, results.worst))
    return _image_section("worst", "Worst classes", worst_note(results), items, css_class="samples worst")


def _image_section(name: str, title: str, note: str, items: str, *, css_class: str) -> str:
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>'
        f'<p class="small">{escape(note)}</p><ul class="{css_class}">{items}</ul></section>'
    )


def _worst_class(worst: WorstClass) -> str:
    image = f'<img src="{_data_uri(worst.png, "image/png")}" alt="{escape(worst.label)}">'
    other_image = ""
    if worst.taken_for_png:
        other_image = f'<img src="{_data_uri(worst.taken_for_png, "image/png")}" alt="{escape(worst.taken_for)}">'
    correct = f"{worst.right} of {worst.images} correct"
    mistaken_for = f"mistaken for <strong>{escape(worst.taken_for)}</strong>"
    return (
        f"<li><figure>{image}<figcaption><strong>{escape(worst.label)}</strong> {correct}</figcaption></figure>"
        f'<span class="no" aria-hidden="true">→</span>'
        f"<figure>{other_image}<figcaption>{mistaken_for}</figcaption></figure></li>"
    )


def _sample(sample: Sample) -> str:
    image = f'<img src="{_data_uri(sample.png, "image/png")}" alt="{escape(sample.label)}">'
    answers = "".join(map(_answer, sample.answers))
    return f"<li>{image}<div><strong>{escape(sample.label)}</strong><dl>{answers}</dl></div></li>"


def _answer(answer: Answer) -> str:
    symbol, css_class = ("✓", "yes") if answer.right else ("✗", "no")
    probability = formatting.share(answer.probability, 1)
    prediction = f'<span class="{css_class}">{symbol}</span> {escape(answer.label)}, {probability}'
    return f"<dt>{escape(answer.row)}</dt><dd>{prediction}</dd>"


def _differences(results: Results) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(row.models)}</th><td class="text">{escape(row.task)}</td>'
        f'<td>{row.points}</td><td>{row.interval}</td><td class="text small">{row.verdict}</td></tr>'
        for row in differences(results)
    )
    if not rows:
        return ""
    headings = '<th scope="col">Models</th><th scope="col" class="text">Task</th><th scope="col">Points</th>'
    headings += '<th scope="col">95 % interval</th><th scope="col" class="text">Verdict</th>'
    head = f"<thead><tr>{headings}</tr></thead>"
    return (
        f'<section aria-labelledby="differences"><h2 id="differences">Differences in top-1</h2>'
        f'<div class="scroll" tabindex="0"><table class="differences">{head}<tbody>{rows}</tbody></table></div>'
        f"</section>"
    )


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
