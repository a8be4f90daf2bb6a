"""What was measured so far, so that an interrupted benchmark goes on: a small file a model and task.

Only accuracy is kept: it is the same whenever it is measured. Latencies are compared as ratios, which have to come from
one run, so that a resumed benchmark times all models anew.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.accuracy import Answers, RetrievalAnswers, ZeroShotAnswers
from clip_rd_edge.benchmarking.results import Environment
from clip_rd_edge.contract.task import Task, ZeroShotTask
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.io import read_json, write_bytes

FOLDER = "parts"


class DamagedPartError(ConfigError):
    """A kept measurement cannot be read: no model is to blame, so that none is skipped for it."""


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file: a model's answers on a task of either kind."""

    row: str
    task: str
    zero_shot: ZeroShotAnswers | None = None
    retrieval: RetrievalAnswers | None = None


class Parts:
    """Measurements in a folder, each under a name made of all that it depends on: what has changed is measured anew.

    Args:
        folder: made at the first measurement.
        environment: versions of packages and code belong to what a score depends on.
    """

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder = folder
        self._software = repr((sorted(environment.packages.items()), environment.commit))

    def find(self, model: str, runtime: str | None, task: Task) -> Answers | None:
        """What was measured of this model on this task, or None.

        Raises:
            DamagedPartError: its file cannot be read.
        """
        path = self._path(model, runtime, task)
        if not path.is_file():
            return None
        try:
            part = read_json(path, Part)
        except ConfigError as error:
            raise DamagedPartError(str(error), hint=f"remove {path}: what was in it is measured again") from error
        return part.zero_shot or part.retrieval

    def keep(self, model: str, runtime: str | None, task: Task, answers: Answers, *, row: str) -> None:
        """Write what was measured, whole or not at all."""
        part = Part(
            row=row,
            task=task.name,
            zero_shot=answers if isinstance(answers, ZeroShotAnswers) else None,
            retrieval=answers if isinstance(answers, RetrievalAnswers) else None,
        )
        write_bytes(self._path(model, runtime, task), msgspec.json.encode(part))

    def remove(self) -> None:
        """Remove all of them, once they are in the results."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, model: str, runtime: str | None, task: Task) -> Path:
        parts = (self._software, repr(runtime), _state_of(model), _state_of_task(task))
        return self.folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.json"


def _state_of(model: str) -> str:
    """A model's name and, of a folder, its files with sizes and dates: hashing gigabytes would take longer."""
    files = sorted(path for path in Path(model).rglob("*") if path.is_file()) if Path(model).is_dir() else []
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return repr((model, stats))


def _state_of_task(task: Task) -> str:
    images = [str(image) for image in task.images]
    if isinstance(task, ZeroShotTask):
        return repr((task.name, images, task.targets, task.labels, task.templates))
    return repr((task.name, images, task.captions, task.caption_images))
