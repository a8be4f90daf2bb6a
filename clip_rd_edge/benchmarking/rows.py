"""A suite's models opened, and what each said on every task; one that cannot be opened or run is left out, with why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from clip_rd_edge.benchmarking.accuracy import Advance, retrieval, zero_shot
from clip_rd_edge.benchmarking.answers import Answers
from clip_rd_edge.benchmarking.opened import Opened
from clip_rd_edge.benchmarking.parts import DamagedPartError, Parts
from clip_rd_edge.benchmarking.results import SkippedRow
from clip_rd_edge.benchmarking.suite import Suite, SuiteRow
from clip_rd_edge.contract.encoder import TowerEncoder
from clip_rd_edge.contract.task import Task, ZeroShotTask
from clip_rd_edge.errors import ClipRdEdgeError

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
OpenEncoder = Callable[..., TowerEncoder]  # called with a model, and with `runtime=` where a row names one


@dataclass
class Measured:
    """By label, in the suite's order: encoders, their models as they were found, and their answers a task."""

    encoders: dict[str, TowerEncoder] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    answers: dict[str, list[Answers]] = field(default_factory=dict)
    skipped: list[SkippedRow] = field(default_factory=list)


def measure_rows(
    suite: Suite, tasks: Sequence[Task], open_encoder: OpenEncoder, progress: Progress, parts: Parts | None
) -> Measured:
    """Open every model and measure its accuracy.

    Raises:
        DamagedPartError: what was kept of an earlier run cannot be read.
    """
    measured = Measured()
    for row in suite.rows:
        try:
            model = suite.find(row)
            encoder = open_encoder(model, runtime=row.runtime) if row.runtime else open_encoder(model)
            _try_once(encoder, tasks[0])
            answers = [_answers(encoder, task, row, model, parts, progress) for task in tasks]
        except ModuleNotFoundError as error:
            # A device without torch still measures its bundles.
            reason = f"It needs the package {error.name!r}, which is not installed."
            measured.skipped.append(SkippedRow(label=row.label, model=row.model, reason=reason))
        except DamagedPartError:
            raise
        except ClipRdEdgeError as error:
            measured.skipped.append(SkippedRow(label=row.label, model=row.model, reason=str(error)))
        else:
            measured.encoders[row.label], measured.models[row.label] = encoder, model
            measured.answers[row.label] = answers
    return measured


def _try_once(encoder: TowerEncoder, task: Task) -> None:
    """Run both towers on one input: what fails when it is timed, after accuracies that were kept, fails here."""
    opened = Opened(encoder, task.images[0], 1)
    opened.embed_picture()
    opened.embed_text()


def _answers(
    encoder: TowerEncoder, task: Task, row: SuiteRow, model: str, parts: Parts | None, progress: Progress
) -> Answers:
    """A model's answers on a task: those that were kept, or else new ones, which are kept."""
    kept = parts.find(model, row.runtime, task) if parts else None
    if kept is not None:
        return kept
    measured = _measure(encoder, task, advance=partial(progress, f"{row.label}: {task.name}"))
    if parts:
        parts.keep(model, row.runtime, task, measured, row=row.label)
    return measured


def _measure(encoder: TowerEncoder, task: Task, *, advance: Advance) -> Answers:
    if isinstance(task, ZeroShotTask):
        return zero_shot(encoder, task, advance=advance)
    return retrieval(encoder, task, advance=advance)
