"""examples/rank_teachers.py puts the teacher first from which the student learns most."""

from __future__ import annotations

import runpy
from pathlib import Path

from PIL import Image
from support import save_tiny_teacher

SCRIPT = Path(__file__).parents[2] / "examples" / "rank_teachers.py"


def test_teachers_are_ranked_by_their_students(pairs_csv: Path, tmp_path: Path) -> None:
    for colour in ("red", "lime", "blue"):
        (tmp_path / "task" / colour).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "task" / colour / "a.png")
    teachers = [str(save_tiny_teacher(tmp_path / f"teacher-{seed}", seed=seed)) for seed in (1, 2)]
    rank = runpy.run_path(str(SCRIPT))["rank"]

    def ranks() -> list[tuple[float, float, str]]:
        ranked: list[tuple[float, float, str]] = rank(
            "test_resnet", pairs_csv, tmp_path / "task", teachers, tmp_path / "runs", steps=2, batch_size=8,
            image_size=32, text="64x1", context_length=8, precision="fp32", workers=0,
        )  # fmt: skip
        return ranked

    found = ranks()
    assert sorted(name for _, _, name in found) == sorted(teachers)
    assert found == sorted(found, reverse=True)
    weights = tmp_path / "runs" / "1" / "student" / "open_clip_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert ranks() == found
    assert weights.stat().st_mtime_ns == written  # a finished run is not repeated
