"""How far a run is, from the files in its folder alone: the run knows nothing of who watches it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from clip_rd_edge.contract.checkpoint import STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.contract.run_folder import INPUTS_FILE, METRICS_FILE, RUN_CONFIG_FILE, read_metrics
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.lock import LOCK_FILE, is_held_here
from clip_rd_edge.utils.paths import exists, is_file, is_folder, near_files
from clip_rd_edge.utils.structs import read_json, read_yaml

Phase = Literal["starting", "running", "stopped", "finished"]
_MISSING_LINES = 10  # a run that has written none of these counts as silent
_MIN_SILENCE_S = 60.0  # that of a run whose lines follow each other quickly
_QUIET_S = 600.0  # a locked run that has written nothing for so long, by a process that is not here, counts as stopped


class _Recipe(msgspec.Struct):
    steps: int
    epochs: int
    batch_size: int


class _Config(msgspec.Struct):
    """What is shown of `distillation.config.RunConfig`, which cannot be read without PyTorch."""

    recipe_name: str
    recipe: _Recipe
    student: str
    data: str | None = None
    images: str | None = None
    texts: str | None = None
    teacher: str | tuple[str, ...] | None = None
    log_every: int = 10
    tasks: tuple[str, ...] = ()
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"


class _Inputs(msgspec.Struct):
    pairs: int


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        name: of the run's folder.
        phase: `starting` before its first step, `stopped` if no process works on it.
        config: None before the run has written it.
        lines: of metrics.jsonl.
        steps: in total; None if not known yet.
        quiet_s: seconds since the last line; None if there is none.
    """

    name: str
    phase: Phase
    config: _Config | None
    lines: list[dict[str, Any]]
    steps: int | None
    quiet_s: float | None

    @property
    def last(self) -> Mapping[str, Any]:
        """The last line with a loss; empty if there is none."""
        return next((line for line in reversed(self.lines) if "loss" in line), {})

    @property
    def is_finite(self) -> bool:
        """Whether the last loss is a number, or there is none yet; a loss that is not finite is null."""
        return self.last.get("loss", 0.0) is not None

    @property
    def step(self) -> int:
        """Completed steps, as far as they are logged."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds until the last step, evaluations included, as since the start or resume; None if unknown."""
        if self.phase != "running" or not self._seconds_per_line or self.steps is None:
            return None
        # The run has gone on since its last line, yet no further than to the next.
        gone_on_s = min(self.quiet_s or 0.0, self._seconds_per_line)
        return max((self.steps - self.step) * float(self.last["seconds_per_step"]) - gone_on_s, 0.0)

    @property
    def silent_s(self) -> float | None:
        """Seconds since the last line of a running run, if much longer than from one line to the next; else None."""
        if self.phase != "running" or self.quiet_s is None:
            return None
        usual_s = max(_MISSING_LINES * self._seconds_per_line, _MIN_SILENCE_S)
        return self.quiet_s if self.quiet_s > usual_s else None

    @property
    def _seconds_per_line(self) -> float:
        """Expected seconds from one line to the next; 0 if unknown."""
        return (self.config.log_every if self.config else 0) * float(self.last.get("seconds_per_step") or 0.0)


def read_run(run: Path) -> RunState:
    """Return the state of a run.

    Raises:
        InputError: the folder does not exist, or holds no run.
        ConfigError: a file of the run is damaged.
    """
    _require_run(run)
    config = read_yaml(run / RUN_CONFIG_FILE, _Config) if is_file(run / RUN_CONFIG_FILE) else None
    lines = read_metrics(run)
    quiet_s = max(time.time() - (run / METRICS_FILE).stat().st_mtime, 0.0) if lines else None
    return RunState(
        name=run.resolve().name,
        phase=_phase(run, logged=bool(lines), quiet_s=quiet_s),
        config=config,
        lines=lines,
        steps=_total_steps(run, config),
        quiet_s=quiet_s,
    )


def _require_run(run: Path) -> None:
    if not is_folder(run):
        problem = "is a file; expected its folder." if exists(run) else f"does not exist.{near_files(run)}"
        raise InputError(f"The run {run} {problem}", hint="pass the folder that distill writes to with -o")
    if is_file(run / RUN_CONFIG_FILE) or is_file(run / LOCK_FILE):
        return
    runs = sorted(path.parent for path in run.glob(f"*/{RUN_CONFIG_FILE}"))
    hint = f"one of the runs in it: {', '.join(map(str, runs))}" if runs else "pass the folder that distill writes to"
    if is_file(run.parent / RUN_CONFIG_FILE):
        hint = f"it is in a run: clip-rd-edge watch {run.parent}"
    raise InputError(f"{run} is not the folder of a run: it has no {RUN_CONFIG_FILE}.", hint=hint)


def _total_steps(run: Path, config: _Config | None) -> int | None:
    if config is None:
        return None
    if config.recipe.steps:
        return config.recipe.steps
    if not is_file(run / INPUTS_FILE):
        return None
    return config.recipe.epochs * (read_json(run / INPUTS_FILE, _Inputs).pairs // config.recipe.batch_size)


def _phase(run: Path, *, logged: bool, quiet_s: float | None) -> Phase:
    if is_file(run / STUDENT_FOLDER / WEIGHTS_FILE):
        return "finished"
    if not _is_worked_on(run / LOCK_FILE, quiet_s=quiet_s):
        return "stopped"
    return "running" if logged else "starting"


def _is_worked_on(lock: Path, *, quiet_s: float | None) -> bool:
    """Return whether a process works on the run.

    Its lock is only looked at: locking it, even for a moment, could refuse a run that starts just then.
    """
    try:
        content, locked_s = lock.read_text(), time.time() - lock.stat().st_mtime
    except PermissionError:  # on Windows, of a file that is locked
        return True
    except OSError:
        return False
    if is_held_here(content):
        return True
    # The process was killed and left the lock, or works on another machine or in a container, whose processes are not
    # known here.
    return any(age_s < _QUIET_S for age_s in (locked_s, quiet_s) if age_s is not None)


class SampleAnswer(msgspec.Struct, frozen=True):
    """The student's answer for one image: the most likely label or caption, and whether it is the image's own."""

    png: bytes
    truth: str
    answer: str
    probability: float
    right: bool


class Answers(msgspec.Struct, frozen=True):
    """What the current student answers.

    Attributes:
        step: after how many steps the student was saved; None if it is the finished one or there is none yet.
        among: what the answers were chosen from, such as `among 10 labels of my-images/`.
        samples: one per image.
        problem: why there are no answers, in a sentence; else empty.
    """

    step: int | None = None
    among: str = ""
    samples: tuple[SampleAnswer, ...] = ()
    problem: str = ""
