"""Class folders are data: the name of a class is the caption of its images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.data.load import TrainingData, load_pairs, load_samples
from clip_rd_edge.data.order import StepSampler
from clip_rd_edge.data.samples import fingerprint
from clip_rd_edge.distillation.loader import ViewDataset, step_loader
from clip_rd_edge.distillation.pixels import Crops

COLOURS = {"dark_red": (150, 10, 10), "light-green": (90, 230, 90), "blue": (20, 30, 220)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten noisy images of each of three colours, some of them in a subfolder."""
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for number in range(10):
            path = tmp_path / "photos" / name / ("more" if number % 3 else "") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.asarray(colour) + generator.integers(-20, 20, (36, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return tmp_path / "photos"


def captions(source: Path, *templates: str) -> Counter[tuple[str, ...]]:
    samples = load_samples(TrainingData(data=str(source), templates=templates), lambda *_: [])
    return Counter(samples.read(index).captions for index in range(len(samples)))


def test_names_of_folders_are_captions_of_their_images(photos: Path) -> None:
    pairs = load_pairs(str(photos))
    assert str(pairs.counts) == "30 images of 3 classes"
    assert pairs.counts.recorded() == {"pairs": 30, "classes": 3}
    assert captions(photos) == {("dark red",): 10, ("light-green",): 10, ("blue",): 10}
    for index in range(30):
        sample = pairs.read(index)
        assert sample.paired
        near = min(COLOURS, key=lambda name: np.abs(np.subtract(sample.image().getpixel((0, 0)), COLOURS[name])).sum())
        assert sample.captions == (near.replace("_", " "),)
    assert len({pairs.read(index).captions for index in range(6)}) == 3  # mixed: a window of an epoch holds all classes


def test_a_list_of_names_may_accompany_them(photos: Path) -> None:
    (photos / "classnames.txt").write_text("navy\nruby\nlime\n")
    assert captions(photos, "a {} image", "{c}") == {(f"a {name} image", name): 10 for name in ("navy", "ruby", "lime")}
    (photos / "classnames.txt").unlink()
    split = photos.rename(photos.parent / "train")  # whose list is beside it
    (photos.parent / "classnames.txt").write_text("light-green\tlime\ndark_red\truby\nblue\tnavy\n")
    assert captions(split) == {("ruby",): 10, ("lime",): 10, ("navy",): 10}


def test_all_rows_of_a_step_have_one_prompt(photos: Path) -> None:
    templates = tuple(f"{number} {{}}" for number in range(40))
    samples = load_samples(TrainingData(data=str(photos), templates=templates), lambda *_: [])
    dataset = ViewDataset(
        samples, Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3), [], crops=Crops(scale=(0.9, 1.0)), seed=0
    )

    def prompts(rank: int, processes: int) -> list[set[str]]:
        sampler = StepSampler(samples.groups, 6, seed=0, steps=range(20), rank=rank, processes=processes)
        batches = step_loader(dataset, sampler, workers=0)
        return [{caption.split()[0] for caption in batch.captions} for batch in batches]

    steps = prompts(0, 1)
    assert all(len(numbers) == 1 for numbers in steps)
    assert len(set.union(*steps)) > 10
    assert prompts(1, 2) == steps


def test_what_lies_in_no_class_folder_counts_as_bad(photos: Path) -> None:
    (photos / "blue" / "0.png").rename(photos / "stray.png")
    pairs = load_pairs(str(photos))
    assert (len(pairs), pairs.problems.count) == (29, 1)
    assert "stray.png" in pairs.problems.examples[0]


def test_the_fingerprint_changes_with_classes_and_files(photos: Path) -> None:
    found = {fingerprint(load_pairs(str(photos)))}
    (photos / "blue" / "0.png").rename(photos / "dark_red" / "10.png")
    found.add(fingerprint(load_pairs(str(photos))))
    (photos / "blue").rename(photos / "navy")
    found.add(fingerprint(load_pairs(str(photos))))
    assert len(found) == 3
    assert fingerprint(load_pairs(str(photos.rename(photos.with_name("moved"))))) in found
