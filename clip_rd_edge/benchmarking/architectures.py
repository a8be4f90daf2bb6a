"""Image towers of many architectures in every runtime, each as a multiple of one baseline timed beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.environment import Environment
from clip_rd_edge.utils.timing import Milliseconds

BASELINE = "baseline"
EAGER, COMPILED, ORT_FP32, ORT_INT8 = "torch", "torch.compile", "ORT FP32", "ORT INT8"
OPENVINO_FP32, OPENVINO_BF16, OPENVINO_INT8 = "OpenVINO FP32", "OpenVINO BF16", "OpenVINO INT8"
RUNTIMES = (EAGER, COMPILED, ORT_FP32, ORT_INT8, OPENVINO_FP32, OPENVINO_BF16, OPENVINO_INT8)


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in one runtime.

    Attributes:
        runtime: one of RUNTIMES.
        latency_ms: p50 at batch 1, the median over sittings.
        ratio: what the baseline takes over what this takes: median over sittings, least and greatest.
        made: what it is made of, where that was chosen, such as the way of quantising.
    """

    runtime: str
    latency_ms: float
    ratio: tuple[float, float, float]
    made: str = ""


class ArchitectureLatency(msgspec.Struct, frozen=True, kw_only=True):
    """An image tower in every runtime that runs it here; `skipped` says of the others why not."""

    name: str
    parameters: int
    timed: tuple[Timed, ...]
    skipped: dict[str, str]

    @property
    def best(self) -> Timed:
        """The fastest runtime."""
        return max(self.timed, key=lambda each: each.ratio[0])


class Architectures(msgspec.Struct, frozen=True, kw_only=True):
    """What one run measured; `baseline` in words, such as `ViT-B/16 in eager torch`."""

    environment: Environment
    baseline: str
    image_size: int
    threads: int
    weights: str
    rows: tuple[ArchitectureLatency, ...]


def summarise_runtimes(
    sittings: Sequence[Mapping[str, Milliseconds]], made: Mapping[str, str]
) -> tuple[tuple[Timed, ...], float]:
    """Figures of every runtime, and the baseline's p50.

    Args:
        sittings: latencies by runtime, and of BASELINE beside them.
        made: as in Timed, by runtime.
    """
    medians = {name: np.asarray([np.median(sitting[name]) for sitting in sittings]) for name in sittings[0]}
    baseline = medians.pop(BASELINE)
    timed = []
    for name, values in medians.items():
        ratios = baseline / values
        spread = (float(np.median(ratios)), float(ratios.min()), float(ratios.max()))
        timed.append(Timed(runtime=name, latency_ms=float(np.median(values)), ratio=spread, made=made.get(name, "")))
    return tuple(timed), float(np.median(baseline))


def architectures_table(results: Architectures) -> str:
    """A Markdown table: a row an architecture, milliseconds a runtime, and the best one's ratio to the baseline."""
    lines = [
        ["image tower", "weights, M", *(f"{runtime}, ms" for runtime in RUNTIMES), f"best: {results.baseline} / it"],
        ["---", "---:", *("---:" for _ in RUNTIMES), "---:"],
    ]
    for row in results.rows:
        found = {each.runtime: f"{each.latency_ms:.2f}" for each in row.timed}
        middle, low, high = row.best.ratio
        best = f"{row.best.runtime}, {middle:.1f}× ({low:.1f} to {high:.1f})"
        times = [found.get(runtime, "–") for runtime in RUNTIMES]
        lines.append([row.name, f"{row.parameters / 1e6:.1f}", *times, best])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
