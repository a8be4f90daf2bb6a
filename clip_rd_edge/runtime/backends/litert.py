"""Run a bundle's towers in LiteRT, formerly TensorFlow Lite. Its files take one input at a time."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.errors import ConfigError, in_one_line, needs_extra
from clip_rd_edge.runtime.encoder import BundleEncoder, OneInputModel, require_threads
from clip_rd_edge.utils.host import usable_cores


class LiteRtModel(OneInputModel):
    """A model in LiteRT.

    Args:
        interpreter: of a model with one input and one output, for a batch of one.
    """

    def __init__(self, interpreter: Any) -> None:
        (signature,) = interpreter.get_signature_list().values()
        super().__init__(signature["inputs"])
        self._interpreter = interpreter
        (self._input,), (self._output,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """See `OneInputModel`; the row is cast to the type that the file takes."""
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
    require_threads(threads)
    kernels = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        interpreter = Interpreter(
            **{"model_path" if isinstance(model, str) else "model_content": model},
            num_threads=threads or usable_cores(),
            experimental_op_resolver_type=kernels,
        )
        interpreter.allocate_tensors()
        return LiteRtModel(interpreter)
    except Exception as error:
        name = model if isinstance(model, str) else "the model"
        raise ConfigError(f"LiteRT cannot run {name}: {in_one_line(error)}.") from error


class LiteRtEncoder(BundleEncoder):
    """A bundle in LiteRT, on the CPU; in an app, LiteRT also runs its files on the GPU and the NPU.

    Attributes:
        xnnpack: as for `open_litert`.
    """

    runtime = "litert"
    xnnpack = True

    def open_tower(self, tower: Tower) -> LiteRtModel:
        """Open the tower's file; raises as `open_litert`."""
        return open_litert(str(self.folder / tower.file), threads=self.threads, xnnpack=self.xnnpack)
