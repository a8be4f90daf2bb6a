"""A PyTorch model whose towers torch.compile has compiled for this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from clip_rd_edge.contract.encoder import Description, Embeddings
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder


class CompiledEncoder(TorchEncoder):
    """A `ClipModel` under torch.compile: each tower once for single inputs, and once for batches of any size.

    Raises:
        UsageError: torch cannot compile here, such as for want of a C++ compiler; said when a tower is first called.
    """

    def __init__(self, clip: ClipModel, *, folder: Path | None = None) -> None:
        super().__init__(clip, folder=folder)
        self._compiled: dict[tuple[int, bool], Callable[[Tensor], Tensor]] = {}

    def describe(self) -> Description:
        """What this encoder is."""
        return msgspec.structs.replace(super().describe(), runtime="torch-compile")

    def _tower_for(self, tower: nn.Module, batch_size: int) -> Callable[[Tensor], Tensor]:
        key = (id(tower), batch_size > 1)
        if key not in self._compiled:
            self._compiled[key] = torch.compile(tower, dynamic=batch_size > 1)
        return self._compiled[key]

    def _run(
        self, tower: Callable[[Tensor], Tensor], inputs: npt.NDArray[np.float32] | npt.NDArray[np.int64]
    ) -> Embeddings:
        try:
            return super()._run(tower, inputs)
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, or a model that it cannot take
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"torch.compile does not work on {self.clip.name} here: {reason}") from error
