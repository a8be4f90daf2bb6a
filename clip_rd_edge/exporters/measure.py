"""What a tower's file does: its embeddings, its latency, and both beside another's. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_rd_edge.contract.bundle import Measurement
from clip_rd_edge.contract.encoder import Embeddings, in_batches
from clip_rd_edge.exporters.parity import Agreement
from clip_rd_edge.utils.host import machine_name
from clip_rd_edge.utils.timing import Milliseconds, time_in_turn

Inputs = npt.NDArray[np.float32] | npt.NDArray[np.int64]
# Times some calls in turn: `runtime.timing.time_in_turn`, or a stand-in.
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Milliseconds]]
BATCH_SIZE = 16


def embed(session: Any, inputs: Inputs, *, batch_size: int = BATCH_SIZE) -> Embeddings:
    """A tower's embeddings (N, D) of its inputs, run in batches."""
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: inputs[batch]})[0] for batch in in_batches(len(inputs), batch_size)]
    joined: Embeddings = np.concatenate(parts)
    return joined


def latencies(sessions: Mapping[str, Any], one: Inputs, *, timer: Timer = time_in_turn) -> Mapping[str, Milliseconds]:
    """Latency in milliseconds of each session on the same input of batch 1, all timed in turn."""
    feed = {name: {session.get_inputs()[0].name: one[:1]} for name, session in sessions.items()}
    return timer({name: _call(session, feed[name]) for name, session in sessions.items()})


def lowest_tenth(times: Milliseconds) -> float:
    """What candidates are compared by: on a busy machine what runs longer than a time slice is interrupted almost
    always, and its median tells of the other programs."""
    return float(np.percentile(times, 10))


def measurement(of: Agreement, times: Milliseconds, *, reference: Milliseconds, threads: int) -> Measurement:
    """As the manifest keeps it; `reference` are the float32 tower's latencies, timed in turn with `times`."""
    return Measurement(
        latency_ms_p50=float(np.median(times)),
        latency_ms_p95=float(np.percentile(times, 95)),
        speedup=float(np.median(reference) / np.median(times)),
        max_difference=of.max_difference,
        cosine=of.cosine,
        centred_cosine=of.centred_cosine,
        samples=of.samples,
        threads=threads,
        machine=machine_name(),
    )


def _call(session: Any, feed: dict[str, Inputs]) -> Callable[[], object]:
    return lambda: session.run(None, feed)
