"""What INT8 is tried and measured in: a runtime, and the ways of quantising that it runs. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import onnx

from clip_rd_edge.exporters.candidates import Candidate, candidates, static_candidates
from clip_rd_edge.exporters.measure import Inputs
from clip_rd_edge.exporters.nncf import nncf_is_there, quantize_by_nncf
from clip_rd_edge.exporters.ranges import measure_ranges
from clip_rd_edge.exporters.symmetric import quantize_symmetrically, quantized_inputs
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.backends.openvino import open_openvino


class Opener(Protocol):
    """Opens a model in a runtime: something with ONNX Runtime's `get_inputs()` and `run(names, feed)`."""

    def __call__(self, model: str | bytes, *, threads: int | None = None) -> Any:
        """The model of that path or content."""
        ...


class Ways(Protocol):
    """Candidates for a tower; see `candidates.candidates`."""

    def __call__(
        self, model: Path, samples: Inputs, *, allowed_error: float, threads: int, progress: Callable[[str], None]
    ) -> Iterator[Candidate]:
        """Those worth trying."""
        ...


@dataclass(frozen=True)
class Backend:
    """A runtime; `name` is the target that a manifest names."""

    name: str
    open: Opener
    ways: Ways


def openvino_candidates(
    model: Path, samples: Inputs, *, allowed_error: float, threads: int, progress: Callable[[str], None]
) -> Iterator[Candidate]:
    """Q/DQ of both kinds: OpenVINO's kernels are fast with U8 and with S8 activations, but not always right with S8.

    NNCF's own is tried where it is installed: at times faster, mostly less accurate. Dynamic INT8 is left in float by
    OpenVINO.
    """
    yield from static_candidates(model, samples, allowed_error=allowed_error, threads=threads, progress=progress)
    yield Candidate("symmetric, percentile", partial(_symmetric, model, samples))
    if nncf_is_there():
        yield Candidate("by NNCF", partial(quantize_by_nncf, model, samples))


def _symmetric(model: Path, samples: Inputs) -> bytes:
    graph = onnx.load(model)
    content: bytes = quantize_symmetrically(
        graph, measure_ranges(graph, quantized_inputs(graph), samples)
    ).SerializeToString()
    return content


ORT = Backend("onnxruntime", open_session, candidates)
OPENVINO = Backend("openvino", open_openvino, openvino_candidates)
