"""The page that shows a run: as a file of its own, or served with its style and script beside it."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from string import Template

from clip_rd_edge.contract.run_folder import EVALUATION_PREFIX, TERM_PREFIX
from clip_rd_edge.utils.printable import shown_source
from clip_rd_edge.utils.reporting import duration
from clip_rd_edge.web.watch.charts import Chart, draw, series
from clip_rd_edge.web.watch.state import Answers, RunState, SampleAnswer

FOLDER = Path(__file__).parent
_LINKS = """<link rel="icon" href="icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="style.css">
<script type="module" src="watch.js"></script>"""


_TITLE_ENDS = ": clip-rd-edge watch"


def is_page(beginning: bytes) -> bool:
    """Return whether a file that begins like this is a page that `render` made."""
    return beginning.startswith(b"<!doctype html>") and f"{_TITLE_ENDS}</title>".encode() in beginning


def render(state: RunState, answers: Answers, *, served: bool) -> str:
    """Return the page as HTML.

    Args:
        served: whether style and script are served beside it; else it is one file, without a script.
    """
    template = Template((FOLDER / "page.html").read_text(encoding="utf-8"))
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    done = f"{state.step / state.steps:.0%}, " if state.steps and state.phase == "running" else ""
    return template.substitute(
        title=escape(f"{done}{state.name}{_TITLE_ENDS}"),
        head=_LINKS if served else f"<style>\n{style}</style>",
        name=escape(state.name),
        lead=_lead(state),
        progress=_progress(state),
        facts=_facts(state),
        accuracy=_charts("Accuracy", _accuracy_charts(state), state),
        loss=_charts("Loss", _loss_charts(state), state),
        speed=_charts("Speed", _speed_charts(state), state),
        answers=_answers(answers),
        footer=escape("Read from the run’s own files; this page changes as they do." if served else
                      "Written by clip-rd-edge watch from the files of the run."),
    )  # fmt: skip


def _lead(state: RunState) -> str:
    total = f" of {state.steps:,}" if state.steps else ""
    steps = f"<strong>{state.step:,}{total} steps</strong>"
    if state.phase == "finished":
        return f"{steps}: the run is finished."
    if state.phase == "starting":
        return "The run has begun, and has not logged a step yet."
    if state.phase == "stopped" and not state.is_finite:  # as distill says where a run has diverged
        return (
            f"{steps}: the run has stopped, and its loss was not finite. Begin a new run, with another -o, with a "
            "lower learning rate, or --precision fp32."
        )
    if state.phase == "stopped":
        return f"{steps}: the run has stopped; the same distill command with --resume continues it."
    if state.step == state.steps:
        return f"{steps}: the last step is done; the student is being saved."
    if state.silent_s is not None:
        return (
            f"{steps}, and nothing new for {rough_duration(state.silent_s)}: the run is evaluating or saving, or it "
            "hangs; its terminal tells."
        )
    left = state.seconds_left
    return f"{steps}, about {rough_duration(left)} left." if left is not None else f"{steps}."


def rough_duration(seconds: float) -> str:
    """Return a duration in its two largest units; above a minute, in steps of 5 s."""
    return duration(seconds if seconds < 60 else 5 * round(seconds / 5))


def _progress(state: RunState) -> str:
    if not state.steps:
        return ""
    return f'<progress aria-label="Completed steps" max="{state.steps}" value="{state.step}"></progress>'


def _facts(state: RunState) -> str:
    last = state.last
    facts: list[tuple[str, str, bool]] = []
    for name, key, form in (
        ("Loss", "loss", number),
        ("Samples per second", "samples_per_second", number),
        ("Waiting for data", "data_wait", percent),
        ("Learning rate", "learning_rate", number),
        ("Memory", "memory_mb", lambda value: f"{value / 1000:.1f} GB"),
        ("Bad samples", "bad_samples", lambda value: f"{value:,.0f}"),
        ("Skipped steps", "skipped_steps", lambda value: f"{value:,.0f}"),
    ):
        if isinstance(last.get(key), int | float):
            facts.append((name, form(last[key]), False))
        elif key == "loss" and not state.is_finite:
            facts.append((name, "not finite", False))
    if state.quiet_s is not None and state.phase != "finished":
        facts.append(("Last logged", f"{rough_duration(state.quiet_s)} ago", False))
    if config := state.config:
        facts += [("Recipe", config.recipe_name, True), ("Student", config.student, True)]
        if isinstance(config.teacher, tuple):
            facts.append(("Teachers", ", ".join(config.teacher), True))
        elif config.teacher:
            facts.append(("Teacher", config.teacher, True))
        sources = (("Data", config.data), ("Images", config.images), ("Texts", config.texts))
        facts += [(name, shown_source(source), True) for name, source in sources if source]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd{' class=text' if is_text else ''}>{escape(value)}</dd></div>"
        for name, value, is_text in facts
    )
    return f'<dl class="facts">{items}</dl>' if items else ""


def _accuracy_charts(state: RunState) -> list[Chart]:
    names = dict.fromkeys(key for line in state.lines for key in line if key.startswith(EVALUATION_PREFIX))
    return [Chart(key.removeprefix(EVALUATION_PREFIX), series(state.lines, key), percent, floor=0.0) for key in names]


def _loss_charts(state: RunState) -> list[Chart]:
    terms = sorted({key for line in state.lines for key in line if key.startswith(TERM_PREFIX)})
    parts = [Chart(f"{key.removeprefix(TERM_PREFIX)}, unweighted", series(state.lines, key), number) for key in terms]
    total = "total" if state.is_finite else "total, last finite value"
    return [Chart(total, series(state.lines, "loss"), number), *(parts if len(parts) > 1 else [])]


def _speed_charts(state: RunState) -> list[Chart]:
    return [
        Chart("samples per second", series(state.lines, "samples_per_second"), number, floor=0.0),
        Chart("waiting for data", series(state.lines, "data_wait"), percent, floor=0.0),
    ]


def _charts(title: str, charts: list[Chart], state: RunState) -> str:
    figures = "".join(draw(chart, steps=state.steps or state.step) for chart in charts)
    return f'<section><h2>{title}</h2><div class="charts">{figures}</div></section>' if figures else ""


def _answers(answers: Answers) -> str:
    if answers.problem:
        body = f"<p>{escape(answers.problem)}</p>"
    elif answers.samples:
        when = "The finished student" if answers.step is None else f"The student after step {answers.step:,}"
        body = f'<p class="small">{when}, {escape(answers.among)}.</p>'
        body += f'<ul class="samples">{"".join(map(_sample, answers.samples))}</ul>'
    else:
        return ""
    return f"<section><h2>Sample answers</h2>{body}</section>"


def _sample(sample: SampleAnswer) -> str:
    uri = f"data:image/png;base64,{base64.b64encode(sample.png).decode()}"
    symbol, css_class, meaning = ("✓", "yes", "right") if sample.right else ("✗", "no", "wrong")
    mark = f'<span class="{css_class}" role="img" aria-label="{meaning}:">{symbol}</span>'
    return (
        f'<li><img src="{uri}" alt=""><div><strong>{escape(sample.truth)}</strong>'
        f"<p>{mark} {escape(sample.answer)}, {percent(sample.probability)}</p></div></li>"
    )


def number(value: float) -> str:
    """Return a number with three significant digits, such as 12.3, 1,230 or 0.00012."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:g}"


def percent(value: float) -> str:
    """Return a fraction as a percentage with at most one decimal."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"
