"""Latencies of towers alone, in every runtime and precision, as data and as a table for `benchmarks/README.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from clip_rd_edge.benchmarking.environment import Environment
from clip_rd_edge.utils.timing import Milliseconds

ORT_FP32, ORT_INT8 = "ORT FP32", "ORT INT8"
OPENVINO = ("OpenVINO FP32", "OpenVINO BF16", "OpenVINO INT8 (NNCF)", "OpenVINO INT8 (our Q/DQ)")
VARIANTS = (ORT_FP32, ORT_INT8, *OPENVINO)


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in one runtime and precision.

    Attributes:
        name: one of VARIANTS.
        made: what it is made of, such as the way of quantising that was chosen.
        latency_ms: median over the repeats of each one's median, batch 1.
        speedup: ONNX Runtime's float32 latency divided by this one's: median over the repeats, least and greatest.
        size_bytes: of its file.
    """

    name: str
    made: str
    latency_ms: float
    speedup: tuple[float, float, float]
    size_bytes: int


class TowerLatencies(msgspec.Struct, frozen=True, kw_only=True):
    """A tower in all variants; `best` is OpenVINO's best over ONNX Runtime's best, as `Variant.speedup`."""

    tower: str
    variants: tuple[Variant, ...]
    best: tuple[float, float, float]


class Towers(msgspec.Struct, frozen=True, kw_only=True):
    """What one run measured."""

    environment: Environment
    threads: int
    weights: str
    towers: tuple[TowerLatencies, ...]


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """A variant's file, before it is timed; `made` as in Variant."""

    path: str
    made: str
    size_bytes: int


def summarise(tower: str, made: Mapping[str, Made], repeats: Sequence[Mapping[str, Milliseconds]]) -> TowerLatencies:
    """The figures of a tower.

    Args:
        made: of each variant by its name.
        repeats: latencies of each variant in milliseconds, timed in turn within a repeat.
    """
    medians = {name: np.asarray([np.median(repeat[name]) for repeat in repeats]) for name in made}
    fp32 = medians[ORT_FP32]
    variants = tuple(
        Variant(
            name=name,
            made=of.made,
            latency_ms=float(np.median(medians[name])),
            speedup=_spread(fp32 / medians[name]),
            size_bytes=of.size_bytes,
        )
        for name, of in made.items()
    )
    # The best of each runtime by its median, so that a lucky repeat does not choose it.
    ort, openvino = (
        min((medians[name] for name in names if name in medians), key=lambda values: float(np.median(values)))
        for names in ((ORT_FP32, ORT_INT8), OPENVINO)
    )
    return TowerLatencies(tower=tower, variants=variants, best=_spread(ort / openvino))


def towers_table(results: Towers) -> str:
    """A Markdown table: a row a tower, a column a variant, `speedup (least to greatest)` over ONNX Runtime's FP32."""
    others = VARIANTS[1:]
    lines = [
        ["tower", "ORT FP32, ms", *others, "best OpenVINO / best ORT", "INT8 that ORT gets, and its size"],
        ["---", "---:", *("---:" for _ in others), "---:", "---"],
    ]
    for row in results.towers:
        by_name = {variant.name: variant for variant in row.variants}
        fp32, int8 = by_name[ORT_FP32], by_name[ORT_INT8]
        size = int8.size_bytes / fp32.size_bytes
        lines.append(
            [
                row.tower,
                f"{fp32.latency_ms:.2f}",
                *(_cell(by_name[name].speedup) if name in by_name else "–" for name in others),
                _cell(row.best),
                f"{int8.made}, {size:.2f}×",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _spread(values: Milliseconds) -> tuple[float, float, float]:
    return float(np.median(values)), float(values.min()), float(values.max())


def _cell(spread: tuple[float, float, float]) -> str:
    middle, low, high = spread
    return f"{middle:.2f}× ({low:.2f} to {high:.2f})"
