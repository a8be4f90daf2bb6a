"""Labels that images teach: what is learnt, kept, added and forgotten, and what of a stranger's file is refused."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import Watch, rewrite

import clip_rd_edge as edge
from clip_rd_edge.bundle.encoder import Scoring, label_embeddings, normalise, paired
from clip_rd_edge.bundle.labels import LabelBank, Taught, read_taught, taught_bytes, write_labels
from clip_rd_edge.bundle.manifest import LABELS, TAUGHT, read_manifest, write_manifest
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.runtime.labels import NO_LABELS
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.taught import _regression, taught_bank

SCORING = Scoring(10.0)
PURPLE, ORANGE, RED = (200, 30, 200), (230, 140, 20), (240, 10, 10)


def draw(folder: Path, colours: Mapping[str, tuple[int, int, int]], *, count: int = 3, seed: int = 0) -> Path:
    """Write images of about a colour into a subfolder for each name."""
    rng = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shade = np.clip(np.add(colour, rng.integers(-12, 13, 3)), 0, 255)
            Image.new("RGB", (20, 20), tuple(map(int, shade))).save(folder / name / f"{seed}-{number}.png")
    return folder


@pytest.fixture
def bank_bundle(colour_bundle: Path) -> Path:
    """The bundle of colours with labels of its own."""
    write_labels(colour_bundle, LabelBank(("red", "green", "blue"), np.eye(3, dtype=np.float32)))
    write_manifest(colour_bundle, read_manifest(colour_bundle).with_scoring(SCORING))
    return colour_bundle


@pytest.fixture
def taught(bank_bundle: Path, tmp_path: Path) -> Path:
    folder = draw(tmp_path / "things", {"my_purple": PURPLE, "orange": ORANGE})
    edge.teach(bank_bundle, folder, output=tmp_path / "taught")
    return tmp_path / "taught"


def answer(bundle: Path, colour: tuple[int, int, int], labels: list[str] | None = None) -> str:
    return edge.load(bundle).classify(Image.new("RGB", (9, 9), colour), labels)[0].label


def test_taught_labels_stand_beside_those_of_the_bundle_and_those_that_are_typed(taught: Path) -> None:
    assert read_manifest(taught).taught == ("my purple", "orange")
    colours = (PURPLE, ORANGE, (10, 240, 10))
    assert [answer(taught, colour) for colour in colours] == ["my purple", "orange", "green"]
    assert answer(taught, PURPLE, ["yellow", "my purple"]) == "my purple"
    assert answer(taught, (240, 240, 10), ["yellow", "my purple"]) == "yellow"
    assert all(check.passed for check in edge.verify(taught))
    model = edge.load(taught)
    labels = ["orange", "red"]
    rows = label_embeddings(model.encoder, labels, ["a {}"])  # as `evaluate` does, by templates of its own
    image = model.encode_images([Image.new("RGB", (9, 9), ORANGE)])
    assert model.describe().scoring.probabilities(image, rows).argmax() == 0


def test_taught_labels_are_compared_with_common_nouns_whose_texts_stay_texts(bank_bundle: Path, tmp_path: Path) -> None:
    edge.teach(
        bank_bundle, draw(tmp_path / "things", {"basketball": PURPLE, "orange": ORANGE}), output=tmp_path / "new"
    )
    model = edge.load(tmp_path / "new")
    purple = Image.new("RGB", (9, 9), PURPLE)
    for labels in (None, ["basketball", "green"]):
        assert model.classify(purple, labels, none=True)[0].label == "basketball"
        assert model.classify(purple, labels, multi=True)[0].label == "basketball"
    watch = Watch()
    (score,) = edge.evaluate(tmp_path / "new", tmp_path / "things", reporter=watch)
    assert [label for label in ("green", "basketball") if any(label in line for line in watch.noted)] == ["green"]
    assert score.mean_average_precision == 1


def test_evaluate_measures_what_images_of_each_label_would_bring(bank_bundle: Path, tmp_path: Path) -> None:
    shades = {"purple": [(120 + 2 * i, 20, 150 + i) for i in range(8)], "orange": [(240, 140 + i, i) for i in range(5)]}
    for name, colours in shades.items():
        (tmp_path / "things" / name).mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (9, 9), colour).save(tmp_path / "things" / name / f"{number}.png")
    (score,) = edge.evaluate(bank_bundle, tmp_path / "things", shots=7)
    assert [shot.shots for shot in score.over_shots] == [0, 1, 2]  # at most half of the five
    assert score.over_shots[-1].top1 == 1
    by_texts = score.over_shots[0]
    assert by_texts.top1_interval.low <= by_texts.top1 <= by_texts.top1_interval.high
    watch = Watch()
    for number in range(1, 5):
        (tmp_path / "things" / "orange" / f"{number}.png").unlink()
    (score,) = edge.evaluate(bank_bundle, tmp_path / "things", shots=1, reporter=watch)
    assert score.over_shots == ()
    assert "shots" in " ".join(watch.noted)


def test_a_label_is_added_later_without_the_images_of_the_others(bank_bundle: Path, tmp_path: Path) -> None:
    first, second = draw(tmp_path / "1", {"purple": PURPLE}), draw(tmp_path / "2", {"orange": ORANGE})
    both = draw(draw(tmp_path / "12", {"purple": PURPLE}), {"orange": ORANGE})
    edge.teach(bank_bundle, first, output=tmp_path / "a")
    shutil.rmtree(first)
    edge.teach(tmp_path / "a", second, output=tmp_path / "b")
    edge.teach(tmp_path / "b", second, output=tmp_path / "same")  # nothing that it does not have
    edge.teach(bank_bundle, both, output=tmp_path / "c")
    banks = [load(tmp_path / name).label_bank for name in ("b", "same", "c")]
    for bank in banks:
        assert bank is not None
        assert set(bank.names) == {"purple", "orange", "red", "green", "blue"}
        rows = bank.find(["purple", "orange", "red"]), banks[0].find(["purple", "orange", "red"])  # type: ignore[union-attr]
        np.testing.assert_allclose(*rows, atol=1e-5)


def test_a_label_that_is_forgotten_is_what_it_was_before(bank_bundle: Path, tmp_path: Path) -> None:
    folder = draw(tmp_path / "things", {"purple": PURPLE, "red": ORANGE})
    edge.teach(bank_bundle, folder, output=tmp_path / "taught")
    assert answer(tmp_path / "taught", ORANGE) == "red"
    edge.teach(tmp_path / "taught", forget="purple", output=tmp_path / "less")
    lesson = edge.teach(tmp_path / "less", forget=["red"], output=tmp_path / "nothing")
    bank = load(tmp_path / "nothing").label_bank
    assert bank is not None
    assert (lesson.labels, bank.names) == ({}, ("green", "blue", "red"))
    np.testing.assert_array_equal(bank.embeddings, np.eye(3)[[1, 2, 0]])
    assert not (tmp_path / "nothing" / TAUGHT).exists()
    assert read_manifest(tmp_path / "nothing").format_version == 1
    with pytest.raises(InputError):
        edge.teach(tmp_path / "less", forget="purple", output=tmp_path / "none")


def test_an_open_model_is_taught_by_images_and_writes_nothing(colour_bundle: Path) -> None:
    model = edge.load(colour_bundle)
    shades = [np.full((9, 9, 3), (200 + i, 30, 200), np.uint8) for i in range(3)]
    lesson = model.teach({"purple": shades})
    assert (lesson.labels, lesson.beside) == ({"purple": 3}, 0)
    assert model.classify(shades[0], ["purple", "green"])[0].label == "purple"
    model.teach({}, forget=["purple"])
    with pytest.raises(InputError):
        model.classify(shades[0])  # without labels again
    assert not (colour_bundle / LABELS).exists()


def test_a_bundle_without_text_tower_is_taught(colours_without_text: Path, tmp_path: Path) -> None:
    folder = draw(tmp_path / "things", {"purple": PURPLE})
    write_manifest(colours_without_text, read_manifest(colours_without_text).with_scoring(SCORING))
    edge.teach(colours_without_text, folder / "purple", output=tmp_path / "taught")  # the images of one label
    assert answer(tmp_path / "taught", PURPLE) == "purple"
    assert answer(tmp_path / "taught", RED, ["red", "purple"]) == "red"


def test_images_that_say_nothing_leave_the_answers_of_the_texts() -> None:
    rng = np.random.default_rng(0)
    texts = normalise(rng.standard_normal((4, 32)))
    classes = np.repeat(np.arange(4, dtype=np.int32), 4)
    noise = normalise(texts[classes] + 0.5 * normalise(rng.standard_normal((16, 32))))
    shuffled = Taught(tuple("abcd"), texts, np.zeros(4, bool), noise.astype(np.float16), classes[::-1].copy(), "")
    _, lesson = taught_bank(shuffled, NO_LABELS, Scoring(20.0))
    assert lesson.accuracy is not None
    assert lesson.accuracy >= (lesson.by_texts or 0)
    right = Taught(tuple("abcd"), texts, np.zeros(4, bool), noise.astype(np.float16), classes, "")
    for scoring in (Scoring(20.0), Scoring(20.0, -10.0)):
        bank, lesson = taught_bank(right, NO_LABELS, scoring)
        assert lesson.accuracy == 1
        images = normalise(texts + 0.3 * normalise(rng.standard_normal((4, 32))))
        assert (paired(images, bank.embeddings) @ bank.embeddings.T).argmax(axis=1).tolist() == [0, 1, 2, 3]


def test_wrong_requests_are_refused_and_replace_no_bundle(bank_bundle: Path, tmp_path: Path) -> None:
    things, damaged = (draw(tmp_path / name, {"purple": PURPLE}) for name in ("things", "damaged"))
    (damaged / "purple" / "x.png").write_bytes(b"no image")
    with pytest.raises(InputError):
        edge.teach(bank_bundle, damaged, output=tmp_path / "new")
    with pytest.raises(UsageError):
        edge.teach(bank_bundle, things, output=bank_bundle, force=True)
    assert not (bank_bundle / TAUGHT).exists()


def test_a_left_out_image_gets_what_a_regression_without_it_gives_it() -> None:
    rng = np.random.default_rng(1)
    images, targets, weights = rng.standard_normal((9, 5)), rng.random((9, 2)), rng.random(9)
    _, left_out = _regression(images, targets, weights, 0.3)
    for row in range(9):
        others = np.arange(9) != row
        head, _ = _regression(images[others], targets[others], weights[others], 0.3)
        np.testing.assert_allclose(left_out[row], head @ images[row])


def changed(taught: Taught, **fields: Any) -> Taught:
    return Taught(**{name: fields.get(name, getattr(taught, name)) for name in Taught.__struct_fields__})


def test_a_strangers_file_of_taught_labels_is_checked(taught: Path) -> None:
    t = read_taught(taught / TAUGHT, size=3)
    changes: list[dict[str, Any]] = [
        {"images": t.images * np.float16(3)},
        {"images": t.images[:, :2]},
        {"images": np.full_like(t.images, np.nan)},
        {"texts": t.texts * 2},
        {"classes": t.classes + 1},
        {"classes": np.zeros_like(t.classes)},
        {"classes": t.classes[1:]},
        {"own": t.own.astype(np.float32)},
        {"names": "orange"},
        {"names": ("orange", "orange")},
        {"names": ("my purple", " ")},
        {"names": ("my purple", "red")},
        {"model": "of another bundle"},
    ]
    for change in changes:
        (taught / TAUGHT).write_bytes(taught_bytes(changed(t, **change)))
        rewrite(taught)
        with pytest.raises((ConfigError, InputError)):
            _ = load(taught).taught
    assert not all(check.passed for check in edge.verify(taught))
