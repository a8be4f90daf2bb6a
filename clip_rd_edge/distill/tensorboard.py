"""The lines of metrics.jsonl for TensorBoard, too: `tensorboard --logdir RUNS` shows all runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from clip_rd_edge.errors import MissingExtraError

FOLDER = "tensorboard"


class TensorBoardLog:
    """Appends to `RUN/tensorboard`; what a resumed run goes over again is hidden there.

    Args:
        start: steps done.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, run: Path, *, start: int) -> None:
        try:  # seconds of imports, for those who ask for it
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise MissingExtraError("tensorboard", extra="train", purpose="--report-to tensorboard") from error
        self._writer = SummaryWriter(str(run / FOLDER), purge_step=start + 1)

    def write(self, line: Mapping[str, float | None]) -> None:
        """One line of metrics.jsonl as scalars under its names, at once on disk; None is left out."""
        for name, value in line.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()
