"""What a quickstart is asked to do, and who watches it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Watcher(Protocol):
    """Who is told how it goes."""

    def stage(self, number: int, stages: int, title: str) -> None:
        """A stage begins; numbers count from 1."""

    def progress(self, done: int, total: int, note: str) -> None:
        """How far the stage is."""

    def say(self, sentence: str) -> None:
        """Something was decided."""


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        folder: where everything goes.
        student: a preset.
        recipe: how it is distilled.
        seed: of the student; the teacher's is 0 always.
        with_baseline: train the same student without a teacher, too, for as many steps.
        teacher_steps, student_steps: of 64 and 32 pairs.
    """

    folder: Path
    student: str = "resnet10t"
    recipe: str = "clip-rd"
    seed: int = 0
    with_baseline: bool = False
    teacher_steps: int = 600
    student_steps: int = 1100
