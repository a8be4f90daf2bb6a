"""The report as one HTML file without scripts or anything from outside: pictures are in it as data."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from clip_rd_edge.benchmarking import formatting as formats
from clip_rd_edge.benchmarking.report.findings import headline
from clip_rd_edge.benchmarking.report.method import facts, remarks, samples_note, worst_note
from clip_rd_edge.benchmarking.report.plot import DARK, LIGHT, Palette, draw
from clip_rd_edge.benchmarking.report.tables import COMPARED, Cell, Section, details, differences, sections
from clip_rd_edge.benchmarking.results import Answer, Results, RowResult, Sample, WorstClass

_TEMPLATE = Path(__file__).with_name("page.html")


def page(results: Results) -> str:
    """The whole report as HTML."""
    first, *others = headline(results)
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=f"{escape(results.suite.name)}: accuracy, latency, size",
        light=_variables(LIGHT),
        dark=_variables(DARK),
        lead=_emphasised(first),
        also=_also(others),
        plot=_plot(results),
        compared=_compared(results),
        overview=_table(results, sections(results)),
        skipped=_skipped(results),
        samples=_samples(results),
        worst=_worst(results),
        differences=_differences(results),
        facts="\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts(results)),
        remarks="\n".join(f"<li>{escape(remark)}</li>" for remark in remarks(results)),
        details=_table(results, details(results)),
    )


def _variables(palette: Palette) -> str:
    return " ".join(f"--{role}: {colour};" for role, colour in palette.roles.items())


def _emphasised(sentence: str) -> str:
    unbroken = escape(sentence).replace("top-1", "top\u20111")
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", unbroken)


def _also(sentences: Sequence[str]) -> str:
    paragraphs = "".join(f"<p>{_emphasised(sentence)}</p>" for sentence in sentences)
    return f'<div class="also">{paragraphs}</div>' if sentences else ""


def _plot(results: Results) -> str:
    # Two pictures that the style sheet chooses from, not <picture>: that one stays dark where a dark page is printed.
    images = "".join(_plot_image(results, name, palette) for name, palette in (("light", LIGHT), ("dark", DARK)))
    return f'<figure class="plot">{images}</figure>' if images else ""


def _plot_image(results: Results, name: str, palette: Palette) -> str:
    svg = draw(results, file_format="svg", palette=palette)
    if svg is None:
        return ""
    return (
        f'<img class="{name}" src="{_data_uri(svg, "image/svg+xml")}" width="640" height="420" '
        f'alt="Top-1 over the latency of the image tower; the numbers stand in the table below.">'
    )


def _compared(results: Results) -> str:
    return f'<p class="small">{COMPARED}</p>' if results.first("teacher") else ""


def _table(results: Results, shown: Sequence[Section]) -> str:
    heads = "".join(_column_head(row) for row in results.rows)
    bodies = "".join(_table_body(section, len(results.rows)) for section in shown)
    head = f'<thead><tr><th scope="col">Model</th>{heads}</tr></thead>'
    return f'<div class="scroll" tabindex="0"><table class="models">{head}{bodies}</table></div>'


def _column_head(row: RowResult) -> str:
    how = f"{row.description.runtime}, {row.description.precision}"
    dot = f'<span class="dot" style="--role: var(--{row.role})"></span>'
    return f'<th scope="col">{dot}{escape(row.label)}<small>{escape(how)}</small></th>'


def _table_body(section: Section, models: int) -> str:
    note = f" <span>{escape(section.note)}</span>" if section.note else ""
    title = f'<tr><th scope="rowgroup" colspan="{models + 1}">{escape(section.title)}{note}</th></tr>'
    lines = "".join(
        f'<tr><th scope="row">{escape(line.name)}</th>{"".join(map(_cell, line.cells))}</tr>' for line in section.lines
    )
    return f"<tbody>{title}{lines}</tbody>"


def _cell(cell: Cell) -> str:
    compared = f" <small>{escape(cell.compared)}</small>" if cell.compared else ""
    return f"<td>{escape(cell.text)}{compared}</td>"


def _skipped(results: Results) -> str:
    models = [(row.label, row.reason) for row in results.skipped]
    tasks = [(task.name, task.reason) for task in results.missing]
    return _reasons("Not measured:", models) + _reasons("Missing data sets:", tasks)


def _reasons(title: str, named: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li><strong>{escape(name)}</strong>: {escape(reason)}</li>" for name, reason in named)
    return f'<p>{title}</p><ul class="remarks">{items}</ul>' if items else ""


def _samples(results: Results) -> str:
    if not results.samples:
        return ""
    items = "\n".join(map(_sample, results.samples))
    return _pictures("samples", "What it says to pictures", samples_note(results), items, kind="samples")


def _worst(results: Results) -> str:
    if not results.worst:
        return ""
    items = "\n".join(map(_worst_class, results.worst))
    return _pictures("worst", "What it gets wrong most", worst_note(results), items, kind="samples worst")


def _pictures(name: str, title: str, note: str, items: str, *, kind: str) -> str:
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>'
        f'<p class="small">{escape(note)}</p><ul class="{kind}">{items}</ul></section>'
    )


def _worst_class(found: WorstClass) -> str:
    shown = f'<img src="{_data_uri(found.png, "image/png")}" alt="{escape(found.label)}">'
    other = ""
    if found.taken_for_png:
        other = f'<img src="{_data_uri(found.taken_for_png, "image/png")}" alt="{escape(found.taken_for)}">'
    right = f"{found.right} of {found.images} right"
    return (
        f"<li><figure>{shown}<figcaption><strong>{escape(found.label)}</strong> {right}</figcaption></figure>"
        f'<span class="no" aria-hidden="true">→</span>'
        f"<figure>{other}<figcaption>taken for <strong>{escape(found.taken_for)}</strong></figcaption></figure></li>"
    )


def _sample(sample: Sample) -> str:
    picture = f'<img src="{_data_uri(sample.png, "image/png")}" alt="{escape(sample.label)}">'
    answers = "".join(map(_answer, sample.answers))
    return f"<li>{picture}<div><strong>{escape(sample.label)}</strong><dl>{answers}</dl></div></li>"


def _answer(answer: Answer) -> str:
    mark, kind = ("✓", "yes") if answer.right else ("✗", "no")
    said = f'<span class="{kind}">{mark}</span> {escape(answer.label)}, {formats.share(answer.probability, 1)}'
    return f"<dt>{escape(answer.row)}</dt><dd>{said}</dd>"


def _differences(results: Results) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(found.models)}</th><td class="text">{escape(found.task)}</td>'
        f'<td>{found.points}</td><td>{found.interval}</td><td class="text small">{found.verdict}</td></tr>'
        for found in differences(results)
    )
    if not rows:
        return ""
    names = '<th scope="col">Models</th><th scope="col" class="text">Task</th><th scope="col">Points</th>'
    head = f'<thead><tr>{names}<th scope="col">95 % interval</th><th></th></tr></thead>'
    return (
        f'<section aria-labelledby="differences"><h2 id="differences">Differences in top-1</h2>'
        f'<div class="scroll" tabindex="0"><table class="differences">{head}<tbody>{rows}</tbody></table></div>'
        f"</section>"
    )


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
