"""Line charts as HTML and SVG, without scripts or styles of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_MAX_POINTS = 300  # a longer curve is averaged
_MAX_DOTS = 60  # up to this number, points are drawn as dots, too
_TICKS = 4  # intervals between grid lines, about


@dataclass(frozen=True)
class Chart:
    """A curve over the steps of a run.

    Attributes:
        title: what is shown.
        points: steps and values, in order.
        form: writes a value.
        floor: a value that the axis begins at; None leaves it to the values.
    """

    title: str
    points: Sequence[tuple[int, float]]
    form: Callable[[float], str]
    floor: float | None = None


def series(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return the steps and finite values of a key of metrics.jsonl."""
    return [
        (int(line["step"]), float(line[key]))
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]


def draw(chart: Chart, *, steps: int) -> str:
    """Return a chart as a figure; its horizontal axis ends at `steps`. Empty without points."""
    if not chart.points:
        return ""
    points = _averaged(chart.points)
    ticks = axis_ticks([value for _, value in points], floor=chart.floor)
    end = max(steps, points[-1][0], 1)
    low, high = ticks[0], ticks[-1]
    places = [(1000 * step / end, 1000 * (high - value) / (high - low)) for step, value in points]
    curve = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dots = f'<path class="dots" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)}"/>'
    dots = dots if len(places) <= _MAX_DOTS else ""
    grid = "".join(f"M0 {1000 * i / (len(ticks) - 1):.1f}h1000" for i in range(len(ticks)))
    (first_step, first), (last_step, last) = chart.points[0], chart.points[-1]
    form = chart.form
    summary = f"{chart.title}: from {form(first)} at step {first_step:,} to {form(last)} at step {last_step:,}"
    labels = "".join(f"<span>{escape(form(tick))}</span>" for tick in reversed(ticks))
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)} <strong>{escape(form(last))}</strong></figcaption>'
        f'<div class="frame"><div class="y" aria-hidden="true">{labels}</div>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{escape(summary)}">'
        f'<path class="grid" d="{grid}"/><path class="curve" d="{curve}"/>'
        f"{dots}</svg>"
        f'<div class="x" aria-hidden="true"><span>0</span><span>{end:,} steps</span></div></div></figure>'
    )


def axis_ticks(values: Sequence[float], *, floor: float | None = None) -> list[float]:
    """Return round, evenly spaced values that enclose all given ones."""
    low, high = min(values), max(values)
    if floor is not None:
        low = min(low, floor)
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = (low - 0.5, high + 0.5) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
        low = low if floor is None else max(low, floor)
    magnitude = 10.0 ** math.floor(math.log10((high - low) / _TICKS))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude * _TICKS >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _averaged(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Return at most _MAX_POINTS points, each the mean of as many neighbours."""
    width = math.ceil(len(points) / _MAX_POINTS)
    if width == 1:
        return points
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
