"""Metrics of a run in TensorBoard, Weights & Biases or MLflow, by their own libraries.

`metrics.jsonl` has everything; a tracker is a copy of it. A resumed run continues the same run of the tracker:

RUN/tensorboard/     events for TensorBoard
RUN/wandb/           what Weights & Biases keeps on this machine, also if it is offline
RUN/tracking.json    which run of Weights & Biases or MLflow this is, and the last step reported to it
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
from PIL import Image

from clip_rd_edge.bundle.runs import PREDICTIONS_FILE, REPORT_FOLDER, read_metrics
from clip_rd_edge.distillation.config import RunConfig, TrackerName
from clip_rd_edge.errors import InterruptedRunError, MissingExtraError, UsageError
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.reporting import Reporter
from clip_rd_edge.utils.structs import read_json, to_json
from clip_rd_edge.utils.text import one_line, shown_sources

TENSORBOARD_FOLDER = "tensorboard"
TRACKING_FILE = "tracking.json"
PROJECT = "clip-rd-edge"  # project of Weights & Biases, experiment of MLflow, unless the user's variables name another
_RETRY_INTERVAL_S = 60.0  # between attempts to reach a service that failed
_EXTRAS: dict[TrackerName, str] = {"tensorboard": "train", "wandb": "wandb", "mlflow": "mlflow"}
Outcome = Literal["finished", "stopped", "failed"]


class Tracker:
    """Receives the lines of metrics.jsonl. This base class ignores them."""

    def write(self, line: Mapping[str, float | None]) -> None:
        """Report the line of a step; a step that the tracker has already is not reported again."""

    def add(self, line: Mapping[str, float | None]) -> None:
        """Report more figures of a step that was reported before."""

    def show(self, step: int, plot: Callable[[Path], None]) -> None:
        """Show a step's predictions.

        Args:
            plot: plots them into a file, at the cost of computing them.
        """

    def close(self, outcome: Outcome) -> None:
        """Say how the run ended; nothing is reported after that."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, (InterruptedRunError, KeyboardInterrupt))
        self.close("finished" if error is None else "stopped" if stopped else "failed")


def require_tracker(name: TrackerName | None) -> None:
    """Check that a tracker can be used, before anything else of a run begins."""
    if name is None:
        return
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(name, extra=_EXTRAS[name], purpose=f"{{report_to}} {name}")
    if name == "wandb":
        os.environ.setdefault("WANDB__DISABLE_META", "true")  # the command line, which may hold a secret
        _require_login()


def open_tracker(config: RunConfig, run: Path, *, start: int, reporter: Reporter) -> Tracker:
    """Return the tracker that `config.report_to` names, for a run that continues after `start` steps."""
    if config.report_to is None:
        return Tracker()
    if config.report_to == "tensorboard":
        return TensorBoardLog(run, start=start)
    services: dict[str, Callable[[], Service]] = {"wandb": WandbService, "mlflow": MLflowService}
    return RemoteRun(run, services[config.report_to](), config, reporter)


class TensorBoardLog(Tracker):
    """Appends to `RUN/tensorboard`. On resume, events after the checkpoint are purged.

    Args:
        start: number of completed steps.
    """

    def __init__(self, run: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import, so only on request

        self._path = run / REPORT_FOLDER / PREDICTIONS_FILE
        self._writer = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=start + 1)

    def write(self, line: Mapping[str, float | None]) -> None:
        """Write a line of metrics.jsonl as scalars of the same names and flush it to disk; skips None."""
        step, figures = _figures(line)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    add = write

    def show(self, step: int, plot: Callable[[Path], None]) -> None:
        """Write predictions as an image, which is in the run's report, too."""
        self._path.parent.mkdir(exist_ok=True)
        plot(self._path)
        if self._path.is_file():
            image = np.asarray(Image.open(self._path, formats=["PNG"]).convert("RGB"))
            self._writer.add_image("predictions", image, step, dataformats="HWC")
            self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        self._writer.close()


class Service(ABC):
    """A tracking service, as little of it as a run needs."""

    name: str  # as in sentences
    key: Literal["wandb", "mlflow"]  # in RUN/tracking.json

    @abstractmethod
    def open(self, run: Path, identity: str | None, settings: Mapping[str, Any]) -> str:
        """Begin or continue a run; return its identity, which is another one if the given one no longer exists.

        Args:
            identity: of the run to continue; None for a new one.
            settings: the configuration of the run, nested.
        """

    @abstractmethod
    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Report figures of a step."""

    @abstractmethod
    def close(self, outcome: Outcome) -> None:
        """Say how the run ended."""


class Reported(msgspec.Struct, frozen=True):
    """What a service has of a run: the run's identity there, and the last step."""

    identity: str
    step: int = 0


class Tracking(msgspec.Struct, frozen=True, omit_defaults=True):
    """Content of `RUN/tracking.json`."""

    wandb: Reported | None = None
    mlflow: Reported | None = None


class RemoteRun(Tracker):
    """A run of a tracking service; a distillation that is resumed continues it.

    Training does not depend on the service: what cannot be reported is read from metrics.jsonl and reported later, at
    the latest by the resumed run.

    Args:
        config: shown as the run's settings, but for what may be a secret in the addresses of data.
        reporter: told if the service fails.
    """

    def __init__(self, run: Path, service: Service, config: RunConfig, reporter: Reporter) -> None:
        self._run, self._path, self._service, self._reporter = run, run / TRACKING_FILE, service, reporter
        self._retry_at = 0.0  # when to report again after a failure, by the monotonic clock
        self._all = read_json(self._path, Tracking) if self._path.is_file() else Tracking()
        known: Reported | None = getattr(self._all, service.key)
        try:
            identity = service.open(run, known.identity if known else None, shown_sources(msgspec.to_builtins(config)))
        except Exception as error:
            raise UsageError(
                f"{service.name} did not open a run: {type(error).__name__}: {error}.",
                hint=f"check the settings of {service.name}, or omit {{report_to}}; metrics.jsonl has the same",
            ) from error
        is_same = known is not None and known.identity == identity
        if known and not is_same:
            reporter.note(f"{service.name} no longer has the run {known.identity}: {identity} replaces it")
        self._record(known if known and is_same else Reported(identity))
        self._report_missing()

    def write(self, line: Mapping[str, float | None]) -> None:
        if self._retry_at:
            self._report_missing()
        elif line["step"] and line["step"] > self._reported.step:
            self._report(line)

    def add(self, line: Mapping[str, float | None]) -> None:
        if not self._retry_at:
            self._report(line)

    def close(self, outcome: Outcome) -> None:
        if self._retry_at:
            self._report_missing(at_once=True)
        try:
            self._service.close(outcome)
        except Exception as error:  # noqa: BLE001 - a run must not end by what its tracker raises
            self._say_failed(error)

    def _report_missing(self, *, at_once: bool = False) -> None:
        """Report the steps of metrics.jsonl that the service has not, unless it has just failed."""
        if at_once or time.monotonic() >= self._retry_at:
            missing = (line for line in read_metrics(self._run) if line["step"] > self._reported.step)
            if all(map(self._report, missing)):
                self._retry_at = 0.0

    def _report(self, line: Mapping[str, float | None]) -> bool:
        """Report a line; return whether the service has it."""
        step, figures = _figures(line)
        try:
            self._service.log(step, figures)
        except Exception as error:  # noqa: BLE001 - as above
            if not self._retry_at:
                self._say_failed(error)
            self._retry_at = time.monotonic() + _RETRY_INTERVAL_S
            return False
        self._record(msgspec.structs.replace(self._reported, step=max(step, self._reported.step)))
        return True

    def _record(self, reported: Reported) -> None:
        self._reported = reported
        self._all = msgspec.structs.replace(self._all, **{self._service.key: reported})
        write_bytes(self._path, to_json(self._all))

    def _say_failed(self, error: Exception) -> None:
        self._reporter.note(
            f"{self._service.name} could not be reached ({type(error).__name__}: {one_line(error)}); training goes on, "
            "and what is missing there is reported later"
        )


class WandbService(Service):
    """Weights & Biases. The variables WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, … are the library's own."""

    name = "Weights & Biases"
    key = "wandb"

    def open(self, run: Path, identity: str | None, settings: Mapping[str, Any]) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.resolve().name,
            id=identity or secrets.token_hex(4),
            resume="allow",
            dir=run,
            config=dict(settings),
            # Its lines would tear the progress bar, and the console's output says nothing that metrics.jsonl does not.
            settings=wandb.Settings(console="off", silent=True),
        )
        # A resumed run repeats steps and adds to earlier ones, which wandb's own counter of steps does not allow.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


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


class MLflowService(Service):
    """MLflow. The variables MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, … are the library's own."""

    name = "MLflow"
    key = "mlflow"
    _STATUS: Mapping[Outcome, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
    _MAX_PARAMS, _MAX_METRICS, _MAX_TEXT = 100, 1000, 500  # per request; the lowest limits of any release

    def open(self, run: Path, identity: str | None, settings: Mapping[str, Any]) -> str:
        # A server that does not answer holds up a training step: few attempts at a time, and RemoteRun repeats them.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient

        self._client = MlflowClient()
        self._identity = identity if identity and self._continue(identity) else self._begin(run, settings)
        return self._identity

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1e3 * time.time())
        metrics = [Metric(_mlflow_name(name), value, now, step) for name, value in figures.items()]
        for first in range(0, len(metrics), self._MAX_METRICS):
            self._client.log_batch(self._identity, metrics=metrics[first : first + self._MAX_METRICS])

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self._identity, status=self._STATUS[outcome])

    def _continue(self, identity: str) -> bool:
        """Mark a run as running again; return whether it is still there."""
        from mlflow.exceptions import MlflowException

        try:
            if self._client.get_run(identity).info.lifecycle_stage == "deleted":
                return False
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        self._client.update_run(identity, status="RUNNING")
        return True

    def _begin(self, run: Path, settings: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        created = self._client.create_run(experiment_id, run_name=run.resolve().name)
        identity = str(created.info.run_id)
        params = [Param(key, str(value)[: self._MAX_TEXT]) for key, value in _flat(settings).items()]
        for first in range(0, len(params), self._MAX_PARAMS):
            self._client.log_batch(identity, params=params[first : first + self._MAX_PARAMS])
        return identity


def _mlflow_name(name: str) -> str:
    """Return the name of a metric with the characters that MLflow refuses, such as those of a task's path, replaced."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with joined keys, such as `recipe.objective.fd`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _figures(line: Mapping[str, float | None]) -> tuple[int, dict[str, float]]:
    """Return the step and the finite figures of a line of metrics.jsonl."""
    figures = {name: x for name, x in line.items() if name != "step" and x is not None and isfinite(x)}
    return int(line["step"] or 0), figures
