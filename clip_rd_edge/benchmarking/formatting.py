"""Number formats shared by the terminal, Markdown, HTML and plot output."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from clip_rd_edge.benchmarking.metrics import Interval
from clip_rd_edge.utils.text import printable

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


def signed_percent(change: float) -> str:
    """Format a relative change in percent with its sign and one decimal, `−1.3 %`."""
    return f"{signed_points(change)}\N{NO-BREAK SPACE}%"


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
    """Return one line of Markdown in which names from elsewhere are no HTML, links or images, but seen as they are."""
    return printable(" ".join(text.splitlines())).replace("<", "&lt;").replace("](", "]&#40;").replace("][", "]&#91;")
