"""A bundle's towers in ONNX Runtime."""

from __future__ import annotations

from typing import Any

from clip_rd_edge.contract.bundle import Tower
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.runtime.bundle_encoder import BundleEncoder


def open_session(model: str | bytes, *, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU for a file's path or a model's bytes.

    Raises:
        ConfigError: it is no model that this ONNX Runtime can run.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own graph rewriting
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; at least 1 is needed.")
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        shown = model if isinstance(model, str) else "the model"
        raise ConfigError(f"ONNX Runtime {ort.__version__} cannot run {shown}: {error}.") from error


class OrtEncoder(BundleEncoder):
    """A bundle in ONNX Runtime."""

    runtime = "onnxruntime"

    def open_tower(self, tower: Tower) -> Any:
        """An ONNX Runtime session of the tower; raises as `open_session`."""
        return open_session(str(self.folder / tower.file), threads=self.threads)
