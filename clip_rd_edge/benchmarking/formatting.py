"""Numbers as people read them: one way for terminal, Markdown, HTML and plot."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from clip_rd_edge.benchmarking.metrics import Interval

NOTHING = "–"


def percent(fraction: float | None) -> str:
    """A fraction in per cent with one decimal and without the sign, `71.8`, or a dash where there is none."""
    return NOTHING if fraction is None else _one_decimal(fraction)


def share(part: float, whole: float) -> str:
    """A part of a whole in whole per cent, `87 %`, or a dash where the whole is nothing."""
    return f"{100 * part / whole:.0f}\N{NO-BREAK SPACE}%" if whole > 0 else NOTHING


def signed_points(difference: float) -> str:
    """A difference of fractions in points with its sign, `−1.3`."""
    text = _one_decimal(difference)
    return text if text.startswith(("−", "0.0")) else f"+{text}"


def signed_percent(change: float) -> str:
    """A change in per cent with its sign and one decimal, `−1.3 %`."""
    return f"{signed_points(change)}\N{NO-BREAK SPACE}%"


def interval(bounds: Interval) -> str:
    """An interval of fractions in per cent, `67.1 to 76.3`."""
    return f"{percent(bounds.low)} to {percent(bounds.high)}"


def signed_interval(bounds: Interval) -> str:
    """An interval of differences in points, `−2.6 to −0.3`."""
    return f"{signed_points(bounds.low)} to {signed_points(bounds.high)}"


def milliseconds(value: float) -> str:
    """A latency with three digits, without the unit: `1.78`, `32.5`, `120`."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """A time with two digits, without the unit: `0.41`, `2.3`, `15`, or a dash where there is none."""
    return (
        NOTHING if value is None else f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"
    )


def rate(value: float) -> str:
    """How many a second, with about three digits: `9.74`, `97.4`, `974`."""
    return milliseconds(value)


def megabytes(size_bytes: float) -> str:
    """A size in millions of bytes, without the unit: `7.6`, `605`."""
    value = size_bytes / 1e6
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def millions(count: int) -> str:
    """A number of weights in millions, `6.9`, or a dash where it is not known."""
    return NOTHING if count == 0 else f"{count / 1e6:.1f}" if count >= 1e5 else f"{count / 1e6:.3f}"


def times(ratio: float) -> str:
    """A ratio: `4.7×`, `18×`."""
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:,.0f}×"


def _one_decimal(fraction: float) -> str:
    text = f"{100 * fraction:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def markdown_table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """A Markdown table whose first row holds the headings.

    Args:
        left: numbers of the columns that are aligned to the left; the others are aligned to the right.
    """
    rule = ["---" if i in left else "---:" for i in range(len(rows[0]))]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
