"""Accuracy results measured so far, one file per model and task, so that an interrupted benchmark can resume.

Only accuracy is cached, because it does not change from run to run. Latencies are compared as ratios, which must come
from a single run: a resumed benchmark times all models again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.accuracy import Answers, RetrievalAnswers, ZeroShotAnswers
from clip_rd_edge.benchmarking.results import Environment
from clip_rd_edge.bundle.images import ImageFile
from clip_rd_edge.data.remote import RemoteShard, version
from clip_rd_edge.data.tasks import Task
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.paths import is_folder, is_left_by_system
from clip_rd_edge.utils.structs import encode_json, read_json

FOLDER = "parts"
_FILE = re.compile(r"[0-9a-f]{24}\.json|\.[0-9a-f]{24}\.json\.[0-9a-f]{32}\.tmp")  # the latter left by a kill


def is_cache(folder: Path) -> bool:
    """Return whether a folder is a cache: it exists, and holds nothing but a cache's files."""
    return is_folder(folder) and all(map(_is_ours, folder.iterdir()))


def _is_ours(path: Path) -> bool:
    return bool(_FILE.fullmatch(path.name)) or is_left_by_system(path)


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
        environment: its hardware, package versions and commit are part of the hash: processors round INT8 differently.
    """

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder = folder
        hardware = (environment.machine, environment.instruction_sets, environment.accelerator)
        self._environment = repr((hardware, sorted(environment.packages.items()), environment.commit))

    def find(self, model: str, runtime: str | None, task: Task) -> Answers | None:
        """Return the cached answers of this model on this task, or None."""
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
        write_bytes(self._path(model, runtime, task), encode_json(cached))

    def remove(self) -> None:
        """Delete the cache, once its contents are in the results, and nothing else that may be in its folder."""
        with suppress(OSError):  # the folder is not there, or not empty
            for path in self.folder.iterdir():
                if _is_ours(path):
                    path.unlink()
            self.folder.rmdir()

    def _path(self, model: str, runtime: str | None, task: Task) -> Path:
        key = (self._environment, repr(runtime), _model_state(model), task_state(task))
        return self.folder / f"{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:24]}.json"


def _model_state(model: str) -> str:
    """Return a model's name and, for a folder, the sizes and dates of its files: hashing gigabytes takes too long."""
    files = sorted(path for path in Path(model).rglob("*") if path.is_file()) if Path(model).is_dir() else []
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return repr((model, stats))


def task_state(task: Task) -> str:
    """Return a task's questions, and the names, sizes and dates of its images or of the shards that hold them.

    Of a remote shard, it is the version that the task was loaded from.
    """
    images = (*map(str, task.images), *_file_states(task.images))
    return repr((task.name, images, *task.questions))


def _file_states(images: Iterable[ImageFile]) -> list[tuple[int, int | str]]:
    files = dict.fromkeys(getattr(image, "shard", image) for image in images)  # thousands of images share a shard
    states: list[tuple[int, int | str]] = []
    for path in files:
        with suppress(OSError):  # reported when it is opened
            if isinstance(path, Path):
                status = path.stat()
                states.append((status.st_size, status.st_mtime_ns))
            elif isinstance(path, RemoteShard):
                states.append(version(path))
    return states
