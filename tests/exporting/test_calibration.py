from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.runs import CALIBRATION_FILE
from clip_rd_edge.bundle.tokenizer import TokenIds
from clip_rd_edge.data.folders import Folder
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.exporting.calibration import calibration_set, choose_pairs, keep_pairs, kept_pairs, named_pairs
from clip_rd_edge.runtime.labels import everyday_labels
from clip_rd_edge.utils.arrays import npz_bytes
from clip_rd_edge.utils.paths import Typed

RECORD = np.frombuffer(b'{"name":"greys","captions":["a","b"],"paired":true}', np.uint8)
PREPROCESSING = Preprocessing(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _tokenize(texts: Sequence[str]) -> TokenIds:
    return np.asarray([[int(text)] for text in texts], dtype=np.int64)


def _pairs(folder: Path, count: int) -> Folder:
    """Image i has the red level i and the captions i and i + 1000."""
    images = []
    for i in range(count):
        images.append(folder / f"{i}.png")
        Image.new("RGB", (10, 9), (i % 256, i // 256, 0)).save(images[-1])
    return Folder.of("greys", images, [(str(i), str(i + 1000)) for i in range(count)])


def test_half_are_for_calibration_and_half_are_held_out(tmp_path: Path) -> None:
    samples = calibration_set(_pairs(tmp_path, 60), preprocessing=PREPROCESSING, tokenize=_tokenize)
    calibrate = np.rint(samples.calibrate.pixels[:, 0, 0, 0] * 255).astype(int)
    held_out = np.rint(samples.held_out.pixels[:, 0, 0, 0] * 255).astype(int)
    assert (len(calibrate), len(held_out)) == (30, 30)
    assert sorted([*calibrate, *held_out]) == list(range(60))
    np.testing.assert_array_equal(samples.calibrate.ids[:, 0] % 1000, calibrate)  # captions belong to their images
    assert {int(caption) // 1000 for caption in samples.calibrate.ids[:, 0]} == {0, 1}  # any of an image's captions
    assert samples.name == "greys"


def test_answers_are_calibrated_on_all_of_the_pairs_that_the_model_was_not_trained_on(tmp_path: Path) -> None:
    ranges, unseen = (
        calibration_set(_pairs(tmp_path, count), preprocessing=PREPROCESSING, tokenize=_tokenize, seen=count == 40)
        for count in (40, 60)
    )
    assert ranges.for_answers is ranges
    answers = replace(ranges, unseen=unseen).for_answers
    assert not answers.seen
    assert sorted(answers.calibrate.ids[:, 0] % 1000) == list(range(60))


def test_a_folder_of_images_alone_takes_its_texts_from_elsewhere(tmp_path: Path) -> None:
    _pairs(tmp_path, 40)
    (tmp_path / "2024").mkdir()
    (tmp_path / "0.png").rename(tmp_path / "2024" / "0.png")  # one folder is no two classes
    for texts in (("7", "8", "9"), None):
        pairs = named_pairs(Typed(str(tmp_path)), "ViT-B-32", texts=texts)
        chosen = choose_pairs(pairs, preprocessing=PREPROCESSING)
        assert (len(chosen.images), chosen.paired) == (40, False)
        assert set(chosen.captions) <= set(texts or everyday_labels())
        assert len(set(chosen.captions)) >= 3


def test_class_folders_stay_pairs_beside_labels_and_are_images_alone_beside_texts(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9), name).save(tmp_path / name / "a.png")
    for texts, captions in ((None, ("blue",)), (("sky",), ("sky",))):
        pairs = named_pairs(Typed(str(tmp_path)), "ViT-B-32", texts=texts, labels=["grass", "sky"])
        assert (pairs.read(0).captions, pairs.read(0).paired) == (captions, texts is None)


def test_samples_depend_on_the_seed_and_their_number_is_bounded(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, 340)
    first, repeated, other = (
        calibration_set(pairs, preprocessing=PREPROCESSING, tokenize=_tokenize, seed=seed) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.held_out.ids, repeated.held_out.ids)
    assert not np.array_equal(first.held_out.ids, other.held_out.ids)
    assert (len(first.calibrate.ids), len(first.held_out.ids)) == (128, 192)


def test_as_many_samples_may_be_unreadable_as_were_in_training(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, 60)
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"more than 1\.00%"):
        calibration_set(pairs, preprocessing=PREPROCESSING, tokenize=_tokenize)
    reds = choose_pairs(pairs, preprocessing=PREPROCESSING, max_bad=0.2).images[:, 0, 0, 0]
    assert sorted(reds) == list(range(10, 60))  # none stands in for a bad one and is then seen twice


def test_no_image_sets_ranges_and_is_held_out(tmp_path: Path) -> None:
    once = _pairs(tmp_path, 40)
    pairs = Folder.of("captions", once.images * 5, [(str(i),) for i in range(200)])
    samples = calibration_set(pairs, preprocessing=PREPROCESSING, tokenize=_tokenize)
    calibrate, held_out = (set(part.ids[:, 0] % 40) for part in (samples.calibrate, samples.held_out))
    assert (len(calibrate), len(held_out), calibrate & held_out) == (20, 20, set())


def _run(folder: Path) -> Path:
    """The folder of a run with a student that has no weights."""
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "open_clip_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_the_pairs_that_a_run_keeps_are_the_model_inputs_that_its_data_give(tmp_path: Path, resize_mode: Any) -> None:
    preprocessing = Preprocessing(size=(8, 12), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1), resize_mode=resize_mode)
    run, rng = _run(tmp_path / "run"), np.random.default_rng(0)
    pairs = _pairs(tmp_path, 40)
    for path in pairs.images:
        Image.fromarray(rng.integers(0, 256, (23, 17, 3), dtype=np.uint8)).save(path)
    keep_pairs(run, choose_pairs(pairs, preprocessing=preprocessing))
    direct = calibration_set(pairs, preprocessing=preprocessing, tokenize=_tokenize)
    for model in (run, run / "student"):
        kept = kept_pairs(str(model)).for_model(preprocessing=preprocessing, tokenize=_tokenize)
        assert (kept.name, kept.paired) == ("greys", True)
        for ours, theirs in ((kept.calibrate, direct.calibrate), (kept.held_out, direct.held_out)):
            np.testing.assert_array_equal(ours.pixels, theirs.pixels)
            np.testing.assert_array_equal(ours.ids, theirs.ids)
    (tmp_path / "alone").mkdir()
    (run / "student").rename(tmp_path / "alone" / "student")
    with pytest.raises(UsageError):
        kept_pairs(str(tmp_path / "alone" / "student"))


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": np.zeros((2, 8, 8, 3), np.uint8)},
        {"images": np.zeros((2, 8, 8, 3), np.uint8), "record": np.frombuffer(b"[[[", np.uint8)},
        {"images": np.zeros((9, 8, 8, 3), np.uint8), "record": RECORD},
        {"images": np.zeros((2, 8, 8), np.uint8), "record": RECORD},
    ],
)
def test_what_is_no_file_of_kept_pairs_is_an_error(tmp_path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    run = _run(tmp_path)
    (run / CALIBRATION_FILE).write_bytes(npz_bytes(**arrays))
    with pytest.raises(ConfigError):
        kept_pairs(str(run))
