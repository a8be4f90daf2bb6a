"""Accuracy results measured so far, one file per model and task, so that an interrupted benchmark can resume.

Only accuracy is cached, because it does not change from run to run. Latencies are compared as ratios, which must come
from a single run: a resumed benchmark times all models again.
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
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.structs import read_json

FOLDER = "parts"


class DamagedCacheError(ConfigError):
    """A cached result cannot be read. The model is not at fault, so it must not be skipped because of it."""


class CachedAnswers(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file of the cache: a model's answers on a task of either kind."""

    row: str
    task: str
    zero_shot: ZeroShotAnswers | None = None
    retrieval: RetrievalAnswers | None = None


class AnswerCache:
    """A folder of measured answers. Each file name is a hash of everything that the answers depend on.

    Args:
        folder: created when the first answers are stored.
        environment: its package versions and commit are part of the hash.
    """

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder = folder
        self._software = repr((sorted(environment.packages.items()), environment.commit))

    def find(self, model: str, runtime: str | None, task: Task) -> Answers | None:
        """Return the cached answers of this model on this task, or None.

        Raises:
            DamagedCacheError: the file cannot be read.
        """
        path = self._path(model, runtime, task)
        if not path.is_file():
            return None
        try:
            cached = read_json(path, CachedAnswers)
        except ConfigError as error:
            raise DamagedCacheError(str(error), hint=f"remove {path}: its contents are measured again") from error
        return cached.zero_shot or cached.retrieval

    def store(self, model: str, runtime: str | None, task: Task, answers: Answers, *, row: str) -> None:
        """Write the answers of one model on one task atomically."""
        cached = CachedAnswers(
            row=row,
            task=task.name,
            zero_shot=answers if isinstance(answers, ZeroShotAnswers) else None,
            retrieval=answers if isinstance(answers, RetrievalAnswers) else None,
        )
        write_bytes(self._path(model, runtime, task), msgspec.json.encode(cached))

    def remove(self) -> None:
        """Delete the cache, once its contents are in the results."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, model: str, runtime: str | None, task: Task) -> Path:
        key = (self._software, repr(runtime), _model_state(model), _task_state(task))
        return self.folder / f"{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:24]}.json"


def _model_state(model: str) -> str:
    """Return a model's name and, for a folder, the sizes and dates of its files: hashing gigabytes takes too long."""
    files = sorted(path for path in Path(model).rglob("*") if path.is_file()) if Path(model).is_dir() else []
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return repr((model, stats))


def _task_state(task: Task) -> str:
    images = [str(image) for image in task.images]
    if isinstance(task, ZeroShotTask):
        return repr((task.name, images, task.targets, task.labels, task.templates))
    return repr((task.name, images, task.captions, task.caption_images))
