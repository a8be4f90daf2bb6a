"""Run a bundle's towers in ExecuTorch's Python package, which computes on PyTorch's tensors.

Apps run the same files by ExecuTorch's own libraries, without PyTorch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.manifest import Tower
from clip_rd_edge.errors import ConfigError, in_one_line, needs_extra
from clip_rd_edge.runtime.encoder import BundleEncoder, OneInputModel, require_threads
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.process import SharedBlock, without_progress_bars


class ExecuTorchModel(OneInputModel):
    """A model in ExecuTorch.

    Args:
        method: of a program with one input and one output, for a batch of one.
    """

    def __init__(self, method: Any) -> None:
        super().__init__(["input"])  # its name is not in the file
        self._method = method

    def run_row(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """See `OneInputModel`."""
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
    """Open a program.

    Args:
        model: path of a .pte file, or its bytes.
        threads: threads to run on; None uses every core. All programs of a process share them.
    """
    purpose = "Running a bundle in ExecuTorch"
    with needs_extra("executorch", extra="executorch", purpose=purpose), without_progress_bars():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime
    require_threads(threads)
    wanted = threads or usable_cores()
    if portable_lib._threadpool_get_thread_count() != wanted:
        with _QUIET_NATIVE_CODE:
            portable_lib._unsafe_reset_threadpool(wanted)
    try:
        program = Runtime.get().load_program(Path(model) if isinstance(model, str) else model)
        return ExecuTorchModel(program.load_method("forward"))
    except Exception as error:
        name = model if isinstance(model, str) else "the program"
        raise ConfigError(f"ExecuTorch cannot run {name}: {in_one_line(error)}.") from error


class ExecuTorchEncoder(BundleEncoder):
    """A bundle in ExecuTorch, on the CPU."""

    runtime = "executorch"

    def open_tower(self, tower: Tower) -> ExecuTorchModel:
        """Open the tower's file; raises as `open_executorch`."""
        return open_executorch(str(self.folder / tower.file), threads=self.threads)
