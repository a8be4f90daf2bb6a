"""ONNX Runtime's sessions, models of other engines in place of them, and the limits of threads."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.manifest import EXTERNAL_DATA_SUFFIX
from clip_rd_edge.errors import ConfigError, UnreachableError, UsageError, in_one_line
from clip_rd_edge.runtime.backends.onnxruntime_builds import import_onnxruntime
from clip_rd_edge.runtime.backends.providers import KEEP_ENGINES, PROVIDERS, provider_list, session_device, warn
from clip_rd_edge.utils.files import machine_failure, sha256_of
from clip_rd_edge.utils.paths import cache_home
from clip_rd_edge.utils.process import NativeCall

# How ONNX Runtime reports that memory cannot be had, also while it starts.
_NO_MEMORY = re.compile("bad_alloc|[Cc]annot allocate memory|Failed to allocate memory")
_LOG_WARNINGS, _LOG_NOTHING = 2, 4  # severities; the first is ONNX Runtime's default
MAX_THREADS = 1_024  # each takes memory, and hundreds of thousands take minutes to start


def open_session(
    model: str | bytes,
    *,
    threads: int | None = None,
    device: str = "cpu",
    spin: bool = True,
    optimize: bool = True,
) -> Any:
    """Open an ONNX Runtime session for a model.

    If the device's provider is installed but fails to start (no driver, another CUDA version), a warning is logged and
    the session runs on the CPU.

    Args:
        model: path of an ONNX file, or its bytes.
        threads: intra-op threads; None uses every core.
        device: one of `providers.PROVIDERS`.
        spin: let idle threads busy-wait, ONNX Runtime's default and the fastest for a single image. False frees their
            cores for other work, such as opening many images.
        optimize: fuse nodes. False computes each as the file says, which is slower: for reference answers.
    """
    ort = import_onnxruntime()

    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only: its warnings are about its own graph optimisations
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    require_threads(threads)
    if threads is not None:
        options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    name = model if isinstance(model, str) else "the model"
    try:
        if device != "cpu":
            session, reason = _open_on(ort, model, options, device, threads)
            if session is not None:
                return session
            warn(f"{device} does not start; {name} runs on the CPU instead: {reason}; run clip-rd-edge doctor.")
        return _open(ort, model, options, ["CPUExecutionProvider"])
    except Exception as error:
        if _NO_MEMORY.search(str(error)):
            raise UnreachableError(
                f"There is not enough memory to open {name}.", hint="end other programs, or use a smaller model"
            ) from error
        raise machine_failure(error) or ConfigError(
            f"ONNX Runtime {ort.__version__} cannot run {name}: {in_one_line(error)}."
        ) from error


def _open_on(ort: Any, model: str | bytes, options: Any, device: str, threads: int | None) -> tuple[Any, str]:
    """Return a session that really runs on `device`, or None and the reason why there is none."""
    engines = cache_home() / "engines"
    if device in KEEP_ENGINES:
        engines /= _engine_folder(model)
    providers = provider_list(device, cache=engines, threads=threads)
    try:
        if PROVIDERS[device].package == PROVIDERS["cuda"].package:
            _preload_cuda()
        session = _open(ort, model, options, providers)
    except Exception as error:  # noqa: BLE001 — drivers raise anything; if the model is at fault, the CPU raises, too
        return None, in_one_line(error)
    if session_device(session, device) != device:
        needs = PROVIDERS[device].needs
        return None, f"its provider could not be loaded{f', which needs {needs}' if needs else ''}"
    return session, ""


def start_failure(model: bytes, device: str) -> str:
    """Return why ONNX Runtime does not run a model on a device, or an empty string; it logs nothing meanwhile."""
    ort = import_onnxruntime()

    options = ort.SessionOptions()
    options.log_severity_level = _LOG_NOTHING
    ort.set_default_logger_severity(_LOG_NOTHING)
    try:
        return _open_on(ort, model, options, device, None)[1]
    finally:
        ort.set_default_logger_severity(_LOG_WARNINGS)


@cache
def _preload_cuda() -> None:
    """Load the libraries of CUDA and cuDNN that pip has installed, where the system's loader does not look."""
    ort = import_onnxruntime()

    if hasattr(ort, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()


def _open(ort: Any, model: str | bytes, options: Any, providers: Sequence[Any]) -> Any:
    # ONNX Runtime's own fallback prints to stdout, which is reserved for results.
    return Session(ort.InferenceSession(model, options, providers=providers, enable_fallback=0))


def _engine_folder(model: str | bytes) -> str:
    """Return a name that changes with the model, also with weights that are in a file of their own."""
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()[:32]
    data = Path(f"{model}{EXTERNAL_DATA_SUFFIX}")
    return "-".join(sha256_of(path)[:32] for path in (Path(model), *([data] if data.is_file() else [])))


class Session:
    """A session of ONNX Runtime, whose runs a stop signal ends."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._current = self._new_call()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run the model; return the named outputs, or all."""
        while True:
            options, call = self._current
            if call.is_ended:
                options, call = self._current = self._new_call()
            try:
                with call:
                    outputs: list[npt.NDArray[Any]] = self._session.run(names, feed, options)
                    return outputs
            except Exception:
                if not call.by_signal:
                    raise
            # The signal's handler has run here, and lets the program go on.

    @staticmethod
    def _new_call() -> tuple[Any, NativeCall]:
        """Return options of a run, and the call that they end."""
        options = import_onnxruntime().RunOptions()
        options.log_severity_level = _LOG_NOTHING  # the exception says it
        return options, NativeCall(partial(setattr, options, "terminate", True))


class NamedInput(NamedTuple):
    """An input of a model, as a session describes it."""

    name: str


class OneInputModel(ABC):
    """A model with the two methods of an ONNX Runtime session that are used here; its file takes one input at a time.

    Calls run one at a time, too: an engine owns its buffers, or does not say that several threads may call it.

    Args:
        inputs: names of the inputs.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._inputs = [NamedInput(name) for name in inputs]

    def get_inputs(self) -> list[NamedInput]:
        """Return the inputs with their names."""
        return self._inputs

    def run(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Run the model on each row of its input, (N, …); return its output, (N, D)."""
        (rows,) = feed.values()
        with self._lock, NativeCall():
            return [np.concatenate([self.run_row(row) for row in rows])]

    @abstractmethod
    def run_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the output of one row, (1, D)."""


def require_threads(threads: int | None) -> None:
    """Raise UsageError if a number of threads is neither None nor a whole number from 1 to MAX_THREADS."""
    if threads is not None and not (isinstance(threads, int | np.integer) and 1 <= threads <= MAX_THREADS):
        raise UsageError(
            f"The number of threads is {threads!r}; expected 1 to {MAX_THREADS:,}.",
            hint=f"this machine has {os.cpu_count()} cores",
        )
