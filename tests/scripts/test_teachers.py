"""The table of students of one teacher and of two."""

from __future__ import annotations

import teachers
from quickstart_students import SETTINGS, TASKS


def test_differences_are_those_to_the_students_of_one_teacher() -> None:
    scores = {"the teacher of seed 0": 0.2, "the teacher of seed 1": 0.3, "both, 512 numbers": 0.4}
    runs = [
        {"way": way, "seed": seed, "top1": dict(zip(TASKS, (top1 + seed / 100, top1), strict=True))}
        for way, top1 in scores.items()
        for seed in (0, 1, 2)
        if (way, seed) != ("both, 512 numbers", 2)  # not finished yet
    ]
    result = {"teachers": {"the teacher of seed 0, itself": dict.fromkeys(TASKS, 0.5)}, "runs": runs}
    assert teachers.markdown(result).splitlines()[2:] == [
        "| the teacher of seed 0, itself | | 50.0 | 50.0 | |",
        "| the teacher of seed 0 | 2 | 20.5 ± 0.7 | 20.0 ± 0.0 | -10.0 ± 0.0 |",
        "| the teacher of seed 1 | 2 | 30.5 ± 0.7 | 30.0 ± 0.0 | 10.0 ± 0.0 |",
        "| both, 512 numbers | 2 | 40.5 ± 0.7 | 40.0 ± 0.0 | 15.0 ± 0.0 |",
    ]


def test_all_students_have_the_quickstarts_settings_but_for_teachers_and_width() -> None:
    assert {name: len(seeds) for name, (seeds, _) in teachers.WAYS.items()} == {
        "the teacher of seed 0": 1,
        "the teacher of seed 1": 1,
        "both, 256 numbers": 2,
        "both, 512 numbers": 2,
    }
    assert SETTINGS["embedding_size"] == teachers.WIDTH
