"""Rank teachers for a student by short runs: the largest teacher is often not the best (Yang et al. 2024, CLIP-KD)."""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from clip_rd_edge.benchmarking.accuracy import evaluate
from clip_rd_edge.benchmarking.answer_cache import task_state
from clip_rd_edge.benchmarking.metrics import Interval, Score, primary_interval, primary_metric
from clip_rd_edge.contract.checkpoint import WEIGHTS_FILE, read_training_record
from clip_rd_edge.contract.task import Task
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.processes.distributed import require_one_process
from clip_rd_edge.distillation.processes.signals import stop_on_signals
from clip_rd_edge.distillation.run import resumed_by_the_same_call, run_distillation
from clip_rd_edge.distillation.teachers.teacher import require_teaching_recipe, require_use_of_weights, teacher_weights
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip, require_model
from clip_rd_edge.utils.files import sha256_of, write_bytes
from clip_rd_edge.utils.paths import is_file
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.structs import read_json, to_json

RESULT = "probe.json"
DEFAULT_STEPS = 200
WITHOUT_TORCHRUN = "its runs are short: start it without torchrun"
_MAX_FOLDER_NAME = 80  # characters


class ProbedTeacher(msgspec.Struct, frozen=True, kw_only=True):
    """A teacher, and what a student learned from it in a short run.

    Attributes:
        teacher: as it was named.
        teacher_scores, student_scores: by task.
        student_sha256: of the weights that were measured; empty in a file of an older version.
    """

    teacher: str
    teacher_scores: dict[str, Score]
    student_scores: dict[str, Score]
    student_sha256: str = ""

    @property
    def teacher_mean(self) -> float:
        """The teacher's mean top-1, or R@1 from image to text, over the tasks."""
        return statistics.fmean(map(primary_metric, self.teacher_scores.values()))

    @property
    def student_mean(self) -> float:
        """The student's."""
        return statistics.fmean(map(primary_metric, self.student_scores.values()))


class Probe(msgspec.Struct, frozen=True):
    """Content of probe.json: the teachers, the best for the student first.

    Attributes:
        tasks: the fingerprint of each task by its name, which other images and labels may share; empty in a file of an
            older version.
    """

    student: str
    steps: int
    teachers: tuple[ProbedTeacher, ...]
    tasks: dict[str, str] = {}

    def is_certain(self) -> bool:
        """Return whether the first is ahead of the second by more than chance in the mean over the tasks.

        That is: the 95 % intervals of their means over images do not overlap. Another seed of the student may still
        rank otherwise.
        """
        if len(self.teachers) < 2:
            return True
        first, second = (_interval_of_mean(list(teacher.student_scores.values())) for teacher in self.teachers[:2])
        return first.low > second.high


def _interval_of_mean(scores: Sequence[Score]) -> Interval:
    """Return the 95 % interval of the mean over tasks, as if of different images each (Zou and Donner 2008, MOVER)."""
    figures = [(primary_metric(score), primary_interval(score)) for score in scores]
    mean = statistics.fmean(figure for figure, _ in figures)
    below = math.hypot(*(figure - interval.low for figure, interval in figures)) / len(figures)
    above = math.hypot(*(interval.high - figure for figure, interval in figures)) / len(figures)
    return Interval(mean - below, mean + above)


def probe_teachers(
    teachers: Sequence[str], folder: Path, config: RunConfig, tasks: Sequence[Task], *, reporter: Reporter = SILENT
) -> Probe:
    """Train a student from each teacher for the same few steps, with the same seed, and rank the teachers by it.

    `folder` gets a run per teacher, and probe.json after each. An interrupted call is continued by the same one. With
    other tasks, also of the same names, the students that are trained already are measured again, and so is a student
    that was trained again since it was measured.

    Args:
        teachers: as `load_clip` takes them.
        config: the run, without a teacher.
        tasks: what teachers and students are measured on.

    Raises:
        UsageError: a teacher is named twice, there is no task or no teacher, also in the recipe, `folder` holds other
            runs, or several processes were started.
        InputError, ConfigError: a teacher, the data or the student cannot be used.
        InterruptedRunError: a signal requested a stop.
    """
    require_one_process("Teachers are ranked", hint=WITHOUT_TORCHRUN)
    _require_comparison(teachers, tasks)
    require_teaching_recipe(config)
    require_use_of_weights(config, teachers)
    for name in teachers:  # all, before the first has run
        require_model(name, pretrained=teacher_weights(config, name))
    fingerprints = {task.name: hashlib.sha256(task_state(task).encode()).hexdigest() for task in tasks}
    known = _measured_before(folder, fingerprints)
    probed, steps = list[ProbedTeacher](), config.recipe.steps
    with stop_on_signals(), resumed_by_the_same_call(), _removed_if_empty(folder):
        for number, (name, run) in enumerate(zip(teachers, _folders(teachers), strict=True), start=1):
            reporter.begin(name, number, len(teachers))
            # A store holds the embeddings of one teacher.
            store = config.teacher_cache and str(Path(config.teacher_cache) / run)
            weights = teacher_weights(config, name)
            own = msgspec.structs.replace(config, teacher=name, teacher_pretrained=weights, teacher_cache=store)
            # Also called for a finished run: it refuses one with other settings.
            student = run_distillation(own, folder / run, resume=True, reporter=reporter)
            # With epochs, as many as the data give; and the same of each teacher.
            steps = int(read_training_record(str(student)).get("steps", config.recipe.steps))
            sha256 = sha256_of(student / WEIGHTS_FILE)
            if name in known and known[name].student_sha256 == sha256:
                probed.append(known[name])
                continue
            reporter.update("evaluating teacher and student")
            probed.append(
                ProbedTeacher(
                    teacher=name,
                    teacher_scores=_scores(load_clip(name, pretrained=weights), tasks),
                    student_scores=_scores(load_clip(str(student)), tasks),
                    student_sha256=sha256,
                )
            )
            write_bytes(folder / RESULT, to_json(_ranked(config.student, steps, probed, fingerprints)))
    probe = _ranked(config.student, steps, probed, fingerprints)
    write_bytes(folder / RESULT, to_json(probe))  # also the last teachers, if they were measured before
    return probe


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Leave no folder behind if the first teacher cannot be used."""
    try:
        yield
    finally:
        with suppress(OSError):  # it is not empty, or not there
            folder.rmdir()


def _require_comparison(teachers: Sequence[str], tasks: Sequence[Task]) -> None:
    if not tasks:
        raise UsageError("There is no task to rank the teachers by.", hint="name labelled images: --task my-images/")
    if not teachers:
        raise UsageError("There are no teachers to rank.", hint="name some, such as ViT-B-16@laion400m_e32")
    for name in teachers:
        if teachers.count(name) > 1:
            raise UsageError(
                f"The teacher {name} is named {teachers.count(name)} times; expected once.",
                hint="name different teachers, and another seed with --seed",
            )


def _folders(teachers: Iterable[str]) -> list[str]:
    """Return a name for each teacher's run, with its number where two would be the same."""
    names = [re.sub(r"[^\w.@-]+", "-", name).strip("-.")[-_MAX_FOLDER_NAME:] for name in teachers]
    folders: dict[str, None] = {}
    for number, name in enumerate(names, 1):
        folder = name if name and names.count(name) == 1 else f"{name}-{number}".lstrip("-")
        while folder in folders:  # also a name with its number may be that of another teacher
            folder += f"-{number}"
        folders[folder] = None
    return list(folders)


def _scores(clip: ClipModel, tasks: Sequence[Task]) -> dict[str, Score]:
    encoder = TorchEncoder(clip)
    return {task.name: evaluate(encoder, task) for task in tasks}


def _ranked(student: str, steps: int, probed: Sequence[ProbedTeacher], fingerprints: dict[str, str]) -> Probe:
    ranking = sorted(probed, key=lambda teacher: teacher.student_mean, reverse=True)
    return Probe(student, steps, tuple(ranking), fingerprints)


def _measured_before(folder: Path, fingerprints: dict[str, str]) -> dict[str, ProbedTeacher]:
    """Return the teachers in probe.json by name, if they were measured on these tasks; the order is that of a table."""
    if not is_file(folder / RESULT):
        return {}
    probe = read_json(folder / RESULT, Probe)
    is_same = list(probe.tasks.items()) == list(fingerprints.items())
    return {teacher.teacher: teacher for teacher in probe.teachers} if is_same else {}
