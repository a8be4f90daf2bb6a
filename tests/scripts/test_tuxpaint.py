"""Photographs from Tux Paint's stamps: the script on stamps made here, and the whole way on the real package."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clip_rd_edge as edge
from benchmarks.data import tuxpaint
from clip_rd_edge.data.tasks import load_task


def save_stamp(path: Path, *, colours: int, text: str | None) -> None:
    """A stamp of 60 × 60 opaque pixels in so many colours, with a transparent edge."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (colours, 3))
    pixels = np.zeros((80, 80, 4), dtype=np.uint8)
    pixels[10:70, 10:70, :3] = palette[rng.integers(0, colours, (60, 60))]
    pixels[10:70, 10:70, 3] = 255
    Image.fromarray(pixels).save(path)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


def image_sizes(photos: Path) -> list[tuple[int, int]]:
    """Width and height of every image that the script wrote."""
    sizes = []
    for path in (photos / "images").iterdir():
        with Image.open(path) as image:
            sizes.append(image.size)
    return sizes


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    root = tmp_path / "stamps"
    save_stamp(root / "animals/cat.png", colours=3600, text="A cat (asleep).\nfr.utf8=Un chat.\n")
    save_stamp(root / "animals/cat_mirror.png", colours=3600, text="A cat.\n")
    save_stamp(root / "animals/dog.png", colours=8, text="A dog.\n")
    save_stamp(root / "animals/owl.png", colours=3600, text=None)
    save_stamp(root / "vehicles/van.png", colours=3600, text="The van/lorry.\n")
    return root


def test_photographs_are_the_stamps_with_a_caption_and_many_colours(stamps: Path) -> None:
    photographs = [stamp for stamp in tuxpaint.read_stamps(stamps) if tuxpaint.is_photograph(stamp)]
    assert [(stamp.label, stamp.translations) for stamp in photographs] == [
        ("cat", {"fr": "Un chat."}),
        ("van or lorry", {}),
    ]


def test_composites_are_wide_and_tall_and_the_same_every_time(stamps: Path, tmp_path: Path) -> None:
    photographs = [stamp for stamp in tuxpaint.read_stamps(stamps) if tuxpaint.is_photograph(stamp)]
    first, second = tmp_path / "first", tmp_path / "second"
    for output in (first, second):
        tuxpaint.write(photographs, output, views=3, seed=0)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    sizes = image_sizes(first)
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)
    with (first / "pairs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all((first / row["filepath"]).is_file() for row in rows)
    assert {path.parent.name for path in (first / "tasks").rglob("*.jpg")} == {"cat", "van or lorry"}


def test_the_reports_tasks_share_images_and_have_labels_in_four_languages(stamps: Path, tmp_path: Path) -> None:
    photographs = [stamp for stamp in tuxpaint.read_stamps(stamps) if tuxpaint.is_photograph(stamp)]
    # One label is enough for a task here: both are put into `test`.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuxpaint, "task_of", lambda label: "test")
        tuxpaint.write(photographs, tmp_path / "photos", views=2, seed=0)
    moved = (tmp_path / "photos").rename(tmp_path / "moved")
    tasks = {path.name: load_task(str(path)) for path in sorted(moved.glob("photographs*"))}
    assert {name: task.labels for name, task in tasks.items()} == {
        "photographs": ("cat", "van or lorry"),
        "photographs-de": ("cat", "van or lorry"),
        "photographs-es": ("cat", "van or lorry"),
        "photographs-fr": ("Un chat", "van or lorry"),
    }
    assert {(len(task.images), task.templates) for task in tasks.values()} == {(4, ("{}",))}


@pytest.mark.slow
def test_photographs_of_the_real_package_are_trained_and_evaluated_on(tmp_path: Path) -> None:
    """Every photograph is read, none counts as damaged, and a student learns from them."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("needs Debian or Ubuntu")
    script, photos = Path(tuxpaint.__file__), tmp_path / "photos"
    made = subprocess.run(
        [sys.executable, script, photos, "--views", "2"], capture_output=True, text=True, check=False, timeout=300
    )
    if "apt-get" in made.stderr:
        pytest.skip("the package cannot be fetched here")
    assert made.returncode == 0, made.stderr
    assert {0.7, 1.0, 1.5, 1.8} <= {round(width / height, 1) for width, height in image_sizes(photos)}
    run = edge.distill(
        data=str(photos / "pairs.csv"),
        student="resnet10t",
        recipe="clip",
        output=tmp_path / "run",
        image_size=32,
        embedding_size=32,
        text="64x1",
        context_length=16,
        steps=40,
        batch_size=32,
        max_bad=0.0,
        workers=0,
        precision="fp32",
    )
    (score,) = edge.evaluate(run, [str(photos / "tasks" / "choose")])
    chance = 1 / score.classes
    assert score.classes >= 100
    assert score.images == len(list((photos / "tasks" / "choose").rglob("*.jpg")))
    assert score.top5 is not None
    assert score.top5 > 5 * chance  # it was trained on them
