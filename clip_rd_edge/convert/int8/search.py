"""A float32 tower in INT8, by measurement: make candidates, measure them all in turn, choose. Never imports torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_rd_edge.contract.bundle import Measurement
from clip_rd_edge.contract.encoder import Embeddings
from clip_rd_edge.convert.graph import preprocessed
from clip_rd_edge.convert.int8.candidates import ORT, Backend, Candidate
from clip_rd_edge.convert.int8.dynamic import scales_by_batch
from clip_rd_edge.convert.int8.select import Measured, Trial, choose
from clip_rd_edge.convert.options import Budget
from clip_rd_edge.convert.parity import BATCH_SIZE, Answers, Inputs, Timer, agreement, embed, latencies, measurement
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.io import full_disk
from clip_rd_edge.utils.reporting import SILENT, PrefixedReporter, Reporter
from clip_rd_edge.utils.timing import time_in_turn

_FP32 = "float32"


@dataclass(frozen=True)
class QuantizedTower:
    """What came of quantising a tower.

    Attributes:
        model: the file's content, or None where float32 is to be shipped.
        precision: as `contract.bundle.Tower` has it.
        note: why it is float32, with figures, or empty.
        measured: of what is shipped.
        trials: all that was tried, for a table.
        one_at_a_time: as `contract.bundle.Tower` has it.
    """

    model: bytes | None
    precision: str
    note: str
    measured: Measurement
    trials: tuple[Trial, ...]
    one_at_a_time: bool = False


@dataclass(frozen=True)
class TowerSamples:
    """Inputs of one tower.

    Attributes:
        tower: `image` or `text`.
        calibrate: inputs to set ranges by: (N, 3, H, W) float32 or (N, T) int64.
        judge: others, (M, …), which candidates are judged by.
        reference: embeddings of `judge` by the float32 file, (M, D), where they have been computed already.
        accuracy: which of the judging pairs the tower's embeddings of `judge` match beside the other tower's, (M,).
    """

    tower: str
    calibrate: Inputs
    judge: Inputs
    reference: Embeddings | None = None
    accuracy: Callable[[Embeddings], Answers] = lambda rows: np.ones(len(rows), dtype=bool)


def quantize_tower(
    model: Path,
    samples: TowerSamples,
    *,
    budget: Budget = Budget(),  # noqa: B008 — frozen
    threads: int = 1,
    backend: Backend = ORT,
    reporter: Reporter = SILENT,
    timer: Timer = time_in_turn,
) -> QuantizedTower:
    """Quantise a tower in every way worth trying, and choose by what is measured on this machine.

    Args:
        model: the float32 ONNX file.
        budget: what INT8 may cost.
        threads: threads that latencies are measured with.
        backend: the runtime that it is quantised for, and measured in.
        timer: times calls in turn.
    """
    tower, judge = samples.tower, samples.judge
    reporter = PrefixedReporter(reporter, f"{tower} tower: ")
    sessions: dict[str, Any] = {_FP32: backend.open(str(model), threads=threads)}
    contents: dict[str, bytes] = {}
    failed: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder:
        ways = backend.ways(
            preprocessed(model, Path(folder)),
            samples.calibrate,
            allowed_error=1 - budget.min_agreement(tower),
            threads=threads,
            reporter=reporter,
        )
        for way in ways:
            reporter.update(way.name)
            made = _made(way, backend, threads)
            if isinstance(made, str):
                failed.append(_failed(tower, way, made))
            else:
                contents[way.name], sessions[way.name] = made
    reporter.update(f"timing {len(contents)} candidates and float32 in turn")
    times = latencies(sessions, judge, timer=timer)
    reporter.update(f"judging {len(contents)} candidates")
    reference = embed(sessions[_FP32], judge) if samples.reference is None else samples.reference
    right = samples.accuracy(reference)
    fp32 = Measured(_FP32, times[_FP32], agreement(reference, reference), model.stat().st_size)
    alone = {name for name, content in contents.items() if scales_by_batch(content)}
    tried = {}
    for name, content in contents.items():
        found = embed(sessions[name], judge, batch_size=1 if name in alone else BATCH_SIZE)
        still = samples.accuracy(found)
        tried[name] = Measured(
            name,
            times[name],
            agreement(reference, found),
            len(content),
            lost=int((right & ~still).sum()),
            gained=int((still & ~right).sum()),
        )
    choice = choose(tower, fp32, list(tried.values()), budget=budget)
    shipped = tried[choice.name] if choice.name else fp32
    return QuantizedTower(
        model=contents[choice.name] if choice.name else None,
        precision=f"int8 {choice.name}" if choice.name else "fp32",
        note=choice.note,
        measured=measurement(shipped.of, shipped.times, reference=fp32.times, threads=threads),
        trials=(*choice.trials, *failed),
        one_at_a_time=choice.name in alone,
    )


def _made(way: Candidate, backend: Backend, threads: int) -> tuple[bytes, Any] | str:
    """The candidate's file content and a session of it, or why it cannot be had."""
    try:
        content = way.make()
        return content, backend.open(content, threads=threads)
    except ConfigError as error:
        return str(error)
    except Exception as error:  # the quantiser raises all kinds; one way that fails leaves the others
        if full := full_disk(error):
            raise full from error
        return f"{type(error).__name__}: {error}"


def _failed(tower: str, way: Candidate, reason: str) -> Trial:
    first_line = (reason.splitlines() or ["unknown"])[0]
    return Trial(
        tower=tower,
        name=way.name,
        latency_ratio=float("nan"),
        centred_cosine=float("nan"),
        size_ratio=float("nan"),
        loss_points=float("nan"),
        verdict=f"failed: {first_line[:80]}",
    )
