"""Rank teachers for a student by short runs: the largest is often not the best (CLIP-KD, Yang et al. 2024).

python examples/rank_teachers.py resnet18 pairs.csv my-images/ ViT-B-16@laion400m_e32 ViT-L-14@laion2b_s32b_b82k

The student is trained from each teacher for the same 200 steps with the same seed, and the teachers are ranked by its
top-1 on my-images/, a folder with a folder of images per class. What was interrupted goes on when it is started again.
Few steps rank by what is learned first: where the first two are close, train from both for longer.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import clip_rd_edge as edge


class Rank(NamedTuple):
    """The top-1 of a student, and that of the teacher that it was trained from."""

    student: float
    teacher: float
    name: str


def rank(student: str, data: str, task: str, teachers: Iterable[str], output: Path, **options: Any) -> list[Rank]:
    """Train a student from each teacher, with the options of `edge.distill`; the best comes first."""
    ranks = []
    for number, teacher in enumerate(teachers, start=1):
        run = edge.distill(
            data=data, student=student, teacher=teacher, output=output / str(number), resume=True, **options
        )
        (of_student,), (of_teacher,) = edge.evaluate(run, task), edge.evaluate(teacher, task)
        ranks.append(Rank(of_student.top1, of_teacher.top1, teacher))
    return sorted(ranks, reverse=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "data", "task"):
        parser.add_argument(name)
    parser.add_argument("teachers", nargs="+")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/teachers"), help="folder of the runs")
    print("student  teacher")
    for row in rank(**vars(parser.parse_args())):
        print(f"{row.student:7.1%} {row.teacher:8.1%}  {row.name}")
