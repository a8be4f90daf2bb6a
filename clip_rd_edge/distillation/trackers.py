"""Metrics of a run in TensorBoard or Weights & Biases, by their own libraries.

`metrics.jsonl` has everything; a tracker is a copy of it. A resumed run continues the same run of the tracker:

RUN/tensorboard/     events for TensorBoard
RUN/wandb/           what Weights & Biases keeps on this machine, also if it is offline
RUN/tracking.json    which run of Weights & Biases this is, and the last step reported to it
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager
from math import isfinite
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from clip_rd_edge.bundle.runs import read_metrics
from clip_rd_edge.distillation.checkpoint import TENSORBOARD_FOLDER, TRACKING_FILE
from clip_rd_edge.distillation.config import RunConfig, TrackerName
from clip_rd_edge.errors import MissingExtraError, UsageError
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.structs import read_json, to_json
from clip_rd_edge.utils.text import Reporter, one_line, shown_sources

PROJECT = "clip-rd-edge"  # of Weights & Biases, unless the user's variables name another
_EXTRAS: dict[TrackerName, str] = {"tensorboard": "train", "wandb": "wandb"}


def require_tracker(name: TrackerName) -> None:
    """Check that a tracker can be used, before anything else of a run begins."""
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(name, extra=_EXTRAS[name], purpose=f"{{report_to}} {name}")
    if name == "wandb":
        os.environ.setdefault("WANDB__DISABLE_META", "true")  # the command line, which may hold a secret
        _require_login()


def open_tracker(config: RunConfig, run: Path, *, start: int, reporter: Reporter) -> Tracker:
    """Return the tracker that `config.report_to` names, for a run that continues after `start` steps."""
    return WandbRun(run, config, reporter) if config.report_to == "wandb" else TensorBoardLog(run, start=start)


class TensorBoardLog(AbstractContextManager[None]):
    """Appends to `RUN/tensorboard`. On resume, events after the checkpoint are purged."""

    def __init__(self, run: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, so only on request

        self._writer = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=start + 1)

    def write(self, line: Mapping[str, float | None]) -> None:
        """Write a line of metrics.jsonl as scalars of the same names and flush it to disk; skips None."""
        step, figures = _figures(line)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    add = write

    def show(self, step: int, predictions: Path) -> None:
        """Write a step's predictions, a plot of the run's report, as an image."""
        image = np.asarray(Image.open(predictions, formats=["PNG"]).convert("RGB"))
        self._writer.add_image("predictions", image, step, dataformats="HWC")
        self._writer.flush()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._writer.close()


class Reported(msgspec.Struct, frozen=True):
    """Content of `RUN/tracking.json`: the run's identity at Weights & Biases, and the last step that it has."""

    identity: str
    step: int = 0


class WandbRun(AbstractContextManager[None]):
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, … are the library's own variables.

    Training does not depend on it: what its library cannot take is read from metrics.jsonl once the run is resumed.

    Args:
        config: shown as the run's settings, but for what may be a secret in the addresses of data.
    """

    def __init__(self, run: Path, config: RunConfig, reporter: Reporter) -> None:
        import wandb

        self._path, self._reporter, self._has_failed = run / TRACKING_FILE, reporter, False
        known = read_json(self._path, Reported) if self._path.is_file() else Reported(secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.resolve().name,
            id=known.identity,
            resume="allow",
            dir=run,
            config=dict(shown_sources(msgspec.to_builtins(config))),
            # Its lines would tear the progress bar, and the console's output says no more than metrics.jsonl.
            settings=wandb.Settings(console="off", silent=True),
        )
        # A resumed run repeats steps and adds to earlier ones, which wandb's own counter of steps does not allow.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._record(known if known.identity == str(self._run.id) else Reported(str(self._run.id)))
        for line in read_metrics(run):
            self.write(line)

    def write(self, line: Mapping[str, float | None]) -> None:
        """Report the line of a step, unless it was reported before the run was interrupted."""
        if line["step"] and line["step"] > self._reported.step:
            self.add(line)

    def add(self, line: Mapping[str, float | None]) -> None:
        """Report figures of a step."""
        if self._has_failed:
            return
        step, figures = _figures(line)
        try:
            self._run.log({"step": step, **figures})
        except Exception as error:  # noqa: BLE001 - a run must not end by what its tracker raises
            self._fail(error)
        else:
            self._record(msgspec.structs.replace(self._reported, step=max(step, self._reported.step)))

    def show(self, step: int, predictions: Path) -> None:
        """Send nothing: pictures of the data stay on this machine."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._run.finish(exit_code=0 if error is None else 1)
        except Exception as failure:  # noqa: BLE001 - as above
            self._fail(failure)

    def _record(self, reported: Reported) -> None:
        self._reported = reported
        write_bytes(self._path, to_json(reported))

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        self._reporter.note(
            f"Weights & Biases failed ({type(error).__name__}: {one_line(error)}); training goes on, and "
            "metrics.jsonl has what is missing there"
        )


Tracker = TensorBoardLog | WandbRun


def _require_login() -> None:
    """Raises UsageError where Weights & Biases would ask for a key, in the middle of the progress bar."""
    import wandb

    session = wandb.setup(wandb.Settings(silent=True))
    # Releases before 0.31 have no question without a prompt: there, wandb.init asks or refuses itself.
    asks = "prompt" in inspect.signature(wandb.login).parameters and session.settings.mode == "online"
    if asks and not wandb.login(prompt=False):
        raise UsageError(
            "Weights & Biases needs an API key, and there is none.",
            hint="log in with `wandb login`, or keep the run on this machine with the variable WANDB_MODE=offline",
        )


def _figures(line: Mapping[str, float | None]) -> tuple[int, dict[str, float]]:
    figures = {name: x for name, x in line.items() if name != "step" and x is not None and isfinite(x)}
    return int(line["step"] or 0), figures
