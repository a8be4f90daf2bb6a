"""The table of students of one teacher and of two."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.training import quickstart_students, teachers
from benchmarks.training.quickstart_students import SETTINGS, TASKS


def test_differences_are_those_to_the_students_of_one_teacher() -> None:
    scores = {"the teacher of seed 0": 0.2, "the teacher of seed 1": 0.3, "both teachers": 0.4}
    runs = [
        {"way": way, "seed": seed, "top1": dict(zip(TASKS, (top1 + seed / 100, top1), strict=True))}
        for way, top1 in scores.items()
        for seed in (0, 1, 2)
        if (way, seed) != ("both teachers", 2)  # not finished yet
    ]
    result = {"teachers": {"the teacher of seed 0, itself": dict.fromkeys(TASKS, 0.5)}, "runs": runs}
    assert teachers.markdown(result).splitlines()[2:] == [
        "| the teacher of seed 0, itself | | 50.0 | 50.0 | |",
        "| the teacher of seed 0 | 2 | 20.5 ± 0.7 | 20.0 ± 0.0 | -10.0 ± 0.0 |",
        "| the teacher of seed 1 | 2 | 30.5 ± 0.7 | 30.0 ± 0.0 | 10.0 ± 0.0 |",
        "| both teachers | 2 | 40.5 ± 0.7 | 40.0 ± 0.0 | 15.0 ± 0.0 |",
    ]


def test_two_models_together_have_unit_rows_and_mean_cosines() -> None:
    def random_encoder(seed: int) -> Any:
        images, texts = (np.random.default_rng(seed + side).normal(size=(4, 8)) for side in (0, 1))
        rows = [(side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in (images, texts)]
        return SimpleNamespace(encode_images=lambda _: rows[0], encode_texts=lambda _: rows[1])

    encoders = [random_encoder(0), random_encoder(2)]
    images, texts = (getattr(teachers.Together(*encoders), f"encode_{side}")([]) for side in ("images", "texts"))
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-6)
    cosines = [encoder.encode_images([]) @ encoder.encode_texts([]).T for encoder in encoders]
    np.testing.assert_allclose(images @ texts.T, np.mean(cosines, axis=0), atol=1e-6)


def test_all_students_have_the_quickstarts_settings_but_for_teachers() -> None:
    assert {name: len(seeds) for name, seeds in teachers.WAYS.items()} == {
        "the teacher of seed 0": 1,
        "the teacher of seed 1": 1,
        "both teachers": 2,
    }
    assert SETTINGS["embedding_size"] == teachers.WIDTH


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"pretrained_text": "tokens"}),
        (["--text", "trimmed"], {"pretrained_text": None, "freeze_text": False, "freeze_text_layers": 0}),
        (["--text", "trimmed", "--freeze-text-layers", "2"], {"freeze_text": False, "freeze_text_layers": 2}),
        (["--text", "trimmed", "--freeze-text"], {"freeze_text": True, "freeze_text_layers": 0}),
    ],
)
def test_a_text_tower_with_weights_is_trained_as_far_as_it_is_asked(
    words: list[str], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, Any] = {}
    monkeypatch.setattr(quickstart_students.edge, "distill", lambda **options: trained.update(options))
    monkeypatch.setattr(quickstart_students.edge, "load", lambda _: SimpleNamespace(encoder=None))
    monkeypatch.setattr(quickstart_students, "top1", lambda _: dict.fromkeys(TASKS, 0.5))
    parser = quickstart_students.parser_for("ways", steps=3)
    arguments = parser.parse_args([str(tmp_path), "-o", str(tmp_path / "ways.json"), *words])
    quickstart_students.train_all(arguments, {"way": {}}, {}, markdown=lambda _: "")
    assert {name: trained.get(name) for name in expected} == expected
