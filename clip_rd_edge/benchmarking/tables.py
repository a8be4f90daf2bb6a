"""The figures of a report as texts, and as tables of the terminal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from clip_rd_edge.benchmarking.metrics import Interval, RetrievalScore, Score, ShotScore, ZeroShotScore
from clip_rd_edge.benchmarking.results import Comparison, Results, RowResult
from clip_rd_edge.utils.text import printable

if TYPE_CHECKING:
    from clip_rd_edge.benchmarking.regression import AccuracyChange, Changes, LatencyChange

NO_VALUE = "–"


def percent(fraction: float | None) -> str:
    """Format a fraction in percent with one decimal and without the unit, `71.8`; a dash for None."""
    return NO_VALUE if fraction is None else _one_decimal(fraction)


def share(part: float, whole: float) -> str:
    """Format `part` as a whole percentage of `whole`, `87 %`; a dash if `whole` is not positive."""
    return f"{100 * part / whole:.0f}\N{NO-BREAK SPACE}%" if whole > 0 else NO_VALUE


def signed_points(difference: float) -> str:
    """Format a difference of fractions in percentage points with its sign, `−1.3`."""
    text = _one_decimal(difference)
    return text if text.startswith(("−", "0.0")) else f"+{text}"


def interval(bounds: Interval) -> str:
    """Format an interval of fractions in percent, `67.1 to 76.3`."""
    return f"{percent(bounds.low)} to {percent(bounds.high)}"


def signed_interval(bounds: Interval) -> str:
    """Format an interval of differences in percentage points, `−2.6 to −0.3`."""
    return f"{signed_points(bounds.low)} to {signed_points(bounds.high)}"


def three_digits(value: float | None) -> str:
    """Format a latency or a rate with about three digits, without the unit: `1.78`, `32.5`, `120`; a dash for None."""
    if value is None:
        return NO_VALUE
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Format a duration with two digits, without the unit: `0.41`, `2.3`, `15`; a dash for None."""
    if value is None:
        return NO_VALUE
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def megabytes(size_bytes: float | None) -> str:
    """Format a size in millions of bytes, without the unit: `7.6`, `605`; a dash for None."""
    if size_bytes is None:
        return NO_VALUE
    value = size_bytes / 1e6
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def millions(count: int) -> str:
    """Format a number of weights in millions, `6.9`; a dash for 0, which means unknown."""
    return NO_VALUE if count == 0 else f"{count / 1e6:.1f}" if count >= 1e5 else f"{count / 1e6:.3f}"


def ratio(value: float) -> str:
    """Format a ratio: `4.7×`, `18×`."""
    return f"{value:.1f}×" if value < 10 else f"{value:,.0f}×"


def _one_decimal(fraction: float) -> str:
    text = f"{100 * fraction:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def markdown_table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Build a Markdown table; the first row holds the column headings.

    Args:
        left: indices of the left-aligned columns; all others are right-aligned.
    """
    rule = ["---" if i in left else "---:" for i in range(len(rows[0]))]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(
        f"| {' | '.join(inert_markdown(cell).replace('|', '&#124;') for cell in line)} |" for line in lines
    )


def inert_markdown(text: str) -> str:
    """Return one line of Markdown in which names from elsewhere are shown as they are, not as HTML, links or images."""
    return printable(" ".join(text.splitlines())).replace("<", "&lt;").replace("](", "]&#40;").replace("][", "]&#91;")


RELATIVE_NOTE = (
    "Second figures are relative to the teacher: how many times smaller or faster, or the share of its accuracy."
)


class Cell(NamedTuple):
    """A figure, and the same figure relative to the teacher's; the latter is empty if there is none."""

    text: str
    relative: str = ""


class Line(NamedTuple):
    """One measurement of every model."""

    name: str
    cells: tuple[Cell, ...]


class Section(NamedTuple):
    """Related measurements, such as those of one task."""

    title: str
    note: str
    lines: tuple[Line, ...]


def sections(results: Results) -> list[Section]:
    """Return the main table: cost first, then each task in the suite's order."""
    rows, latencies = results.rows, [row.latency for row in results.rows]
    costs: dict[str, tuple[list[float | None], Callable[[float | None], str]]] = {
        "Size, MB": ([row.description.size_bytes for row in rows], megabytes),
        "Image tower, ms": ([latency.image.p50 for latency in latencies], three_digits),
        "Text tower, ms": ([latency.text.p50 if latency.text else None for latency in latencies], three_digits),
        "End to end, ms": ([latency.end_to_end.p50 for latency in latencies], three_digits),
    }
    peaks = [row.cold_start.peak_memory_bytes if row.cold_start else None for row in rows]
    if all(peaks):
        costs["Peak memory, MB"] = ([*peaks], megabytes)
    lines = (_relative(results, name, values, show, _ratio_of) for name, (values, show) in costs.items())
    tasks = zip(*(row.scores for row in rows), strict=True)
    return [Section("Cost", "batch 1, median", tuple(lines)), *(_accuracy(results, scores) for scores in tasks)]


def details(results: Results) -> list[Section]:
    """Return what `sections` leaves out.

    These are latency percentiles and steps, throughput, cold start, confidence intervals, means per class, and R@5 and
    R@10.
    """
    tasks = zip(*(row.scores for row in results.rows), strict=True)
    return [_plain("Cost", _cost_details(results.rows)), *map(_accuracy_details, tasks)]


def _cost_details(rows: Sequence[RowResult]) -> dict[str, list[str]]:
    texts = {"Parameters, millions": [millions(row.description.parameters) for row in rows]}
    for name in ("image", "text", "end_to_end"):
        timed = [getattr(row.latency, name) for row in rows]  # None is a model without this tower
        title = {"end_to_end": "End to end"}.get(name, f"{name.capitalize()} tower")
        for percentile in ("p50", "p95", "p99"):
            if percentile != "p50":
                texts[f"{title}, ms, {percentile}"] = [three_digits(getattr(each, percentile, None)) for each in timed]
            bounds = [getattr(each, f"{percentile}_interval", None) for each in timed]
            texts[f"{title}, ms, {percentile}, 95 % interval"] = [
                f"{three_digits(each.low)} to {three_digits(each.high)}" if each else NO_VALUE for each in bounds
            ]
    steps = [row.latency.steps for row in rows]
    texts["Decoding, ms"] = [three_digits(step.decode) for step in steps]
    texts["Preprocessing, ms"] = [three_digits(step.preprocess) for step in steps]
    texts[f"Classifying among {steps[0].labels:,} labels, ms"] = [three_digits(step.classify) for step in steps]
    texts["Images per second, batch 1"] = [three_digits(1000 / row.latency.image.p50) for row in rows]
    for same_batch in zip(*(row.throughput for row in rows), strict=False):
        rates = [three_digits(throughput.images_per_second) for throughput in same_batch]
        texts[f"Images per second, batch {same_batch[0].batch}"] = rates
    if any(row.cold_start for row in rows):
        starts = [seconds(row.cold_start.first_answer_s if row.cold_start else None) for row in rows]
        texts["Cold start to first answer, s"] = starts
    return texts


def chance_verdict(comparison: Comparison) -> str:
    """Return why a difference is not significant, and an empty text if it is."""
    if comparison.interval.low == comparison.interval.high == 0:
        return "correct on the same images"
    if not comparison.may_be_chance:
        return ""
    test = sign_test(comparison)
    return f"not significant ({test})" if test else "not significant"


def sign_test(comparison: Comparison) -> str:
    """Describe the test that calls a difference chance though its interval excludes zero; else return an empty text."""
    bounds = comparison.interval
    return "" if bounds.low <= 0 <= bounds.high else f"exact sign test: p = {comparison.p_value:.2f}"


def heading(task: str) -> str:
    """Return a task's name as a heading."""
    return task[:1].upper() + task[1:]


def _of_kinds(scores: Sequence[Score]) -> tuple[list[ZeroShotScore], list[RetrievalScore]]:
    zero_shot = [score for score in scores if isinstance(score, ZeroShotScore)]
    return zero_shot, [score for score in scores if isinstance(score, RetrievalScore)]


def _accuracy(results: Results, scores: Sequence[Score]) -> Section:
    (zero_shot, retrieval), first = _of_kinds(scores), scores[0]
    figures: dict[str, list[float | None]]
    if isinstance(first, ZeroShotScore):
        note = f"{first.images:,} images, {first.classes:,} labels; chance level {100 / first.classes:.1f} %"
        figures = {"Top-1, %": [score.top1 for score in zero_shot], "Top-5, %": [score.top5 for score in zero_shot]}
    else:
        note = f"{first.images:,} images, {first.captions:,} captions"
        figures = {
            "Image → text, R@1, %": [score.image_to_text.at1 for score in retrieval],
            "Text → image, R@1, %": [score.text_to_image.at1 for score in retrieval],
        }
    lines = (_relative(results, name, values, percent, share) for name, values in figures.items())
    return Section(heading(first.task), note, tuple(lines))


def _accuracy_details(scores: Sequence[Score]) -> Section:
    zero_shot, retrieval = _of_kinds(scores)
    if zero_shot:
        texts = {
            "Top-1, 95 % interval": [interval(score.top1_interval) for score in zero_shot],
            "Mean per class, %": [percent(score.mean_per_class) for score in zero_shot],
            "Calibration error, points": [percent(score.calibration_error) for score in zero_shot],
        }
        if any(score.hidden for score in zero_shot):
            passed = [score.hidden.fpr95 if score.hidden else None for score in zero_shot]
            areas = [
                f"{percent(score.auroc)} ({interval(score.hidden.auroc_interval)})" if score.hidden else percent(None)
                for score in zero_shot
            ]
            texts["Half of the labels hidden: AUROC, %"] = areas
            texts["Others taken for known, at 95 % of these, %"] = [percent(share) for share in passed]
            texts["Each label by itself: mAP, %"] = [percent(score.mean_average_precision) for score in zero_shot]
        for step in dict.fromkeys(shot.shots for score in zero_shot for shot in score.over_shots):
            name = f"Taught by {step} of each label, %" if step else "The same images by texts alone, %"
            of_step = ([shot for shot in score.over_shots if shot.shots == step] for score in zero_shot)
            texts[name] = [_of_shots(shots[0]) if shots else percent(None) for shots in of_step]
    else:
        recalls = {
            "Image → text": [score.image_to_text for score in retrieval],
            "Text → image": [score.text_to_image for score in retrieval],
        }
        texts = {
            f"{name}, R@5 / R@10, %": [f"{percent(recall.at5)} / {percent(recall.at10)}" for recall in each]
            for name, each in recalls.items()
        }
    return _plain(heading(scores[0].task), texts)


def _of_shots(shot: ShotScore) -> str:
    return f"{percent(shot.top1)} ({interval(shot.top1_interval)})"


def _ratio_of(value: float, teacher: float) -> str:
    return ratio(teacher / value) if value else ""


def _relative(
    results: Results,
    name: str,
    values: Sequence[float | None],
    show: Callable[[float | None], str],
    compare: Callable[[float, float], str],
) -> Line:
    """Return a line with each value also compared with the teacher's; None is a model that has none."""
    roles = [row.role for row in results.rows]
    teacher = values[roles.index("teacher")] if "teacher" in roles else None
    cells = (
        Cell(show(value), compare(value, teacher) if teacher and value is not None and role != "teacher" else "")
        for role, value in zip(roles, values, strict=True)
    )
    return Line(name, tuple(cells))


def _plain(title: str, texts: Mapping[str, Sequence[str]]) -> Section:
    return Section(title, "", tuple(Line(name, tuple(map(Cell, shown))) for name, shown in texts.items()))


def terminal_tables(results: Results, width: int) -> list[Table]:
    """Return the report's table, one column per model, each figure also relative to the teacher's.

    Args:
        width: of the terminal, in columns. Models for which there is no room are in further tables.
    """
    shown = sections(results)
    tables: list[Table] = []
    for count in range(len(results.rows), 0, -1):
        starts = range(0, len(results.rows), count)
        tables = [_terminal_table(results, shown, slice(start, start + count)) for start in starts]
        if all(_width(table) <= width for table in tables):
            break
    if tables and results.first("teacher"):
        tables[-1].caption = RELATIVE_NOTE
        tables[-1].caption_justify = "left"
    return tables


def _terminal_table(results: Results, shown: Sequence[Section], models: slice) -> Table:
    table = plain_table("", *(row.label for row in results.rows[models]))
    for section in shown:
        table.add_section()
        table.add_row(Text(section.title, style="bold"))
        for line in section.lines:
            # Padded, so that figures line up with and without a relative figure.
            cells = (Text.assemble(f"{text:>6}", (f" {relative:>5}", "dim")) for text, relative in line.cells[models])
            table.add_row(line.name, *cells)
    return table


def _width(table: Table) -> int:
    console = Console(width=10_000, markup=False, emoji=False)  # as the commands print it
    return Measurement.get(console, console.options, table).maximum


def score_tables(scores: Sequence[Score]) -> list[Table]:
    """Return one table of zero-shot scores and one of retrieval scores, in percent; empty ones are left out."""
    zero_shot, of_retrieval = _of_kinds(scores)
    tables = []
    if zero_shot:
        headings = ["Zero-shot, %", "Images", "Labels", "Top-1", "95 %\ninterval", "Top-5", "Mean per\nclass"]
        rows = [
            [s.task, f"{s.images:,}", f"{s.classes:,}", percent(s.top1), interval(s.top1_interval), percent(s.top5),
             percent(s.mean_per_class)]
            for s in zero_shot
        ]  # fmt: skip
        table = _task_table(headings, rows)
        of_tasks = [f"Prompt templates of {score.task}: {score.templates}" for score in zero_shot]
        are_same = len({score.templates for score in zero_shot}) == 1
        notes = [f"Prompt templates: {zero_shot[0].templates}"] if are_same else of_tasks
        found = [
            f"{s.task}: half of the labels hidden: AUROC {percent(s.auroc)} ({interval(s.hidden.auroc_interval)}), "
            f"FPR at 95 % {percent(s.hidden.fpr95)}; mAP {percent(s.mean_average_precision)}; "
            f"calibration error {percent(s.calibration_error)}"
            for s in zero_shot
            if s.hidden
        ]
        for s in (score for score in zero_shot if score.over_shots):
            shots = "; ".join(f"{shot.shots}: {_of_shots(shot)}" for shot in s.over_shots)
            found.append(f"{s.task}: top-1 by the number of images that taught each label: {shots}")
        table.caption = "\n".join([*notes, *found])
        table.caption_justify = "left"
        tables.append(table)
    if of_retrieval:
        headings = ["Retrieval, R@1 / 5 / 10, %", "Images", "Captions", "Image → text", "Text → image"]
        rows = []
        for score in of_retrieval:
            recalls = [(r.at1, r.at5, r.at10) for r in (score.image_to_text, score.text_to_image)]
            shown = (" / ".join(map(percent, recall)) for recall in recalls)
            rows.append([score.task, f"{score.images:,}", f"{score.captions:,}", *shown])
        tables.append(_task_table(headings, rows))
    return tables


def _task_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = plain_table(*headings)
    for row in rows:
        table.add_row(*row)
    return table


def class_table(score: ZeroShotScore) -> Table:
    """Return a table of the classes of one task, lowest recall first; classes without images come last."""
    has_folders = any(row.folder for row in score.per_class)
    folder = ["Folder"] if has_folders else []
    table = plain_table(score.task, *folder, "Images", "Recall, %", "Precision, %", left=folder)
    table.add_column("Most often mistaken for", overflow="fold")
    for row in sorted(score.per_class, key=lambda row: 2.0 if row.recall is None else row.recall):
        mistakes = (f"{label} ({count:,})" for label, count in row.predicted.items() if label != row.label)
        names = [row.label, row.folder] if has_folders else [row.label]
        mistake = next(mistakes, "")
        table.add_row(*names, f"{row.images:,}", percent(row.recall), percent(row.precision), mistake)
    return table


def plain_table(first: str, *others: str, left: Sequence[str] = ()) -> Table:
    """Return an empty table: the first column and those named in `left` are left-aligned, the others right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


_STYLES = {"regression": "bold red", "improvement": "green", "noise": "dim", "same": "dim"}


def change_tables(changes: Changes) -> list[Table]:
    """Return one table of the latencies that two runs have in common and one of the accuracies that differ."""

    def verdict(change: LatencyChange | AccuracyChange) -> Text:
        return Text("within noise" if change.verdict == "noise" else change.verdict, style=_STYLES[change.verdict])

    latencies = plain_table("p50", "Old, ms", "New, ms", "Change", "Noise", "", left=("",))
    for timed in changes.latencies:
        figures = (
            three_digits(timed.old_ms),
            three_digits(timed.new_ms),
            f"{signed_points(timed.change)}\N{NO-BREAK SPACE}%",
        )
        latencies.add_row(f"{timed.row}, {timed.what}", *figures, f"± {100 * timed.noise:.1f} %", verdict(timed))
    accuracies = plain_table("Accuracy, %", "Old", "New", "Points", "Paired interval", "", left=("",))
    for change in changes.accuracies:
        if change.verdict != "same":
            figures = (percent(change.old), percent(change.new), signed_points(change.new - change.old))
            name = f"{change.row}, {change.task}, {change.measure}"
            accuracies.add_row(name, *figures, signed_interval(change.interval), verdict(change))
    return [table for table in (latencies, accuracies) if table.rows]
