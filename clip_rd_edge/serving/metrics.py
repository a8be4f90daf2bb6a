"""Counters and histograms in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

PREFIX = "clip_rd_edge_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Histogram:
    """Counts values by upper bounds.

    Args:
        bounds: upper bounds of the buckets, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))] += 1
        self.sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        """Return the samples of the histogram; `labels` are as in `tower="image"`."""
        lines, total = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        return [*lines, f"{name}_sum{{{labels}}} {self.sum:.6f}", f"{name}_count{{{labels}}} {total}"]


class Metrics:
    """The server's counters."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: dict[str, Histogram] = {}
        self.batches = {tower: Histogram(SIZES) for tower in ("image", "text")}

    def finish(self, path: str, status: int, seconds: float) -> None:
        """Count a finished request of a known path."""
        self.requests[path, status] += 1
        self.seconds.setdefault(path, Histogram(SECONDS)).observe(seconds)

    def render(self, *, pending: int, memory_bytes: int | None) -> str:
        """Return all metrics as text.

        Args:
            pending: items of requests that are not answered yet.
            memory_bytes: resident memory of the process, or None if it is unknown.
        """
        lines = [f"# TYPE {PREFIX}requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'{PREFIX}requests_total{{path="{path}",status="{status}"}} {count}')
        lines.append(f"# TYPE {PREFIX}request_seconds histogram")
        for path, histogram in sorted(self.seconds.items()):
            lines += histogram.lines(f"{PREFIX}request_seconds", f'path="{path}"')
        lines.append(f"# TYPE {PREFIX}batch_size histogram")
        for tower, histogram in self.batches.items():
            lines += histogram.lines(f"{PREFIX}batch_size", f'tower="{tower}"')
        lines.append(f"# TYPE {PREFIX}pending_items gauge")
        lines.append(f"{PREFIX}pending_items {pending}")
        if memory_bytes is not None:
            lines += ["# TYPE process_resident_memory_bytes gauge", f"process_resident_memory_bytes {memory_bytes}"]
        return "\n".join(lines) + "\n"
