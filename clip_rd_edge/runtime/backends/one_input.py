"""Engines whose files take one input at a time: LiteRT (formerly TensorFlow Lite), ExecuTorch, and Core ML on a Mac."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.errors import ConfigError, in_one_line, needs_extra
from clip_rd_edge.runtime.encoder import AUTO, BundleEncoder, TowerModel
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.process import WITHOUT_PROGRESS_BARS, SharedBlock

COREML = "coreml"
_CPU = "cpu"


class OneInputModel(TowerModel):
    """A model whose file takes one input at a time."""

    def batch_size(self, count: int) -> int:
        return 1

    def compute(self, names: Sequence[str] | None, feed: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        ((row,),) = feed.values()
        return [self.run_row(row)]

    @abstractmethod
    def run_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the output of one row, (1, D)."""


@contextlib.contextmanager
def _opening(engine: str, model: str | bytes | Path) -> Iterator[None]:
    """Within the block, any error is that an engine cannot run a model, named by its path."""
    try:
        yield
    except Exception as error:
        name = "the model" if isinstance(model, bytes) else model
        raise ConfigError(f"{engine} cannot run {name}: {in_one_line(error)}.") from error


class LiteRtModel(OneInputModel):
    """A model in LiteRT, by the interpreter of a file with one input and one output, for a batch of one."""

    def __init__(self, interpreter: Any) -> None:
        (signature,) = interpreter.get_signature_list().values()
        super().__init__(signature["inputs"])
        self._interpreter = interpreter
        (self._input,), (self._output,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self._interpreter.set_tensor(self._input["index"], row[None].astype(self._input["dtype"], copy=False))
        self._interpreter.invoke()
        output: npt.NDArray[Any] = self._interpreter.get_tensor(self._output["index"])  # a copy
        return output


def open_litert(model: str | bytes, *, threads: int | None = None, xnnpack: bool = True) -> LiteRtModel:
    """Open a model.

    Args:
        model: path of a .tflite file, or its bytes.
        threads: threads to run on; None uses every core.
        xnnpack: False runs LiteRT's own kernels, which are slower and the same on all processors of a kind.
    """
    with needs_extra("ai-edge-litert", extra="litert", purpose="Running a bundle in LiteRT"):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    kernels = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    with _opening("LiteRT", model):
        interpreter = Interpreter(
            **{"model_path" if isinstance(model, str) else "model_content": model},
            num_threads=threads or usable_cores(),
            experimental_op_resolver_type=kernels,
        )
        interpreter.allocate_tensors()
        return LiteRtModel(interpreter)


class LiteRtEncoder(BundleEncoder):
    """A bundle in LiteRT, on the CPU; in an app, LiteRT also runs its files on the GPU and the NPU.

    Attributes:
        xnnpack: as for `open_litert`.
    """

    runtime = "litert"
    xnnpack = True

    def open_tower(self, tower: Tower) -> LiteRtModel:
        return open_litert(str(self.folder / tower.file), threads=self.threads, xnnpack=self.xnnpack)


class ExecuTorchModel(OneInputModel):
    """A model in ExecuTorch's Python package, which computes on PyTorch's tensors: a program's method for one input."""

    def __init__(self, method: Any) -> None:
        super().__init__(["input"])  # its name is not in the file
        self._method = method

    def run_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        import torch  # what opened the program has imported it

        # Not `row[None]`, to which NumPy gives a stride of 0.
        output: npt.NDArray[Any] = self._method.execute([torch.from_numpy(np.ascontiguousarray(row))[None]])[0].numpy()
        return output


@contextlib.contextmanager
def _without_native_stderr() -> Iterator[None]:
    """Discard what native code writes to the standard error stream: ExecuTorch reports its threads there."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


_QUIET_NATIVE_CODE = SharedBlock(_without_native_stderr)


def open_executorch(model: str | bytes, *, threads: int | None = None) -> ExecuTorchModel:
    """Open a program, a .pte file or its bytes; all programs of a process share the threads, by default every core."""
    purpose = "Running a bundle in ExecuTorch"
    with needs_extra("executorch", extra="executorch", purpose=purpose), WITHOUT_PROGRESS_BARS:
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime
    wanted = threads or usable_cores()
    if portable_lib._threadpool_get_thread_count() != wanted:
        with _QUIET_NATIVE_CODE:
            portable_lib._unsafe_reset_threadpool(wanted)
    with _opening("ExecuTorch", model):
        program = Runtime.get().load_program(Path(model) if isinstance(model, str) else model)
        return ExecuTorchModel(program.load_method("forward"))


class ExecuTorchEncoder(BundleEncoder):
    """A bundle in ExecuTorch, on the CPU."""

    runtime = "executorch"

    def open_tower(self, tower: Tower) -> ExecuTorchModel:
        return open_executorch(str(self.folder / tower.file), threads=self.threads)


class CoreMlModel(OneInputModel):
    """A model in Core ML: a coremltools MLModel with the tower's input and output, for a batch of one."""

    def __init__(self, model: Any, tower: Tower) -> None:
        super().__init__([tower.input_name])
        self._model, self._tower = model, tower

    def run_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if row.dtype == np.int64:
            row = row.astype(np.int32)
        output: npt.NDArray[Any] = self._model.predict({self._tower.input_name: row[None]})[self._tower.output_name]
        return output.astype(np.float32)


class CoreMlEncoder(BundleEncoder):
    """A bundle in Core ML, which chooses among the CPU, the GPU and the Neural Engine if the device is not `cpu`."""

    runtime, devices = COREML, (AUTO, COREML, _CPU)

    def device_for(self, tower: Tower) -> str:
        """Return `coreml` or `cpu`: Core ML does not say which of a Mac's processors it chose."""
        return _CPU if self.options.device == _CPU else COREML

    def open_tower(self, tower: Tower) -> CoreMlModel:
        """Open a tower's package, which compiles it for this Mac."""
        with needs_extra("coremltools", extra=COREML, purpose="Running a bundle in Core ML"):
            import coremltools
        units, package = coremltools.ComputeUnit, self.folder / tower.file
        unit = units.CPU_ONLY if self.options.device == _CPU else units.ALL
        with _opening("Core ML", package):
            return CoreMlModel(coremltools.models.MLModel(str(package), compute_units=unit), tower)
