from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import rewrite

import clip_rd_edge as edge
from clip_rd_edge.bundle.encoder import Calibration, Probabilities, Scoring, normalise
from clip_rd_edge.bundle.labels import LabelBank, write_labels
from clip_rd_edge.bundle.manifest import BACKGROUND, KNOWN, read_manifest, write_manifest
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.load import BATCH_SIZE, load
from clip_rd_edge.runtime.model import Model

RED, GREY = Image.new("RGB", (9, 9), (250, 5, 5)), Image.new("RGB", (9, 9), (100, 100, 100))
LABELS = ["blue", "red", "green"]


def test_the_most_likely_labels_come_first_and_ties_keep_the_order_of_the_labels(colour_bundle: Path) -> None:
    classifier = ZeroShotClassifier(load(colour_bundle), LABELS)
    (predictions,) = classifier.classify([RED], top=2)
    assert [prediction.label for prediction in predictions] == ["red", "blue"]
    assert predictions[0].probability > 0.99
    assert [prediction.label for prediction in classifier.classify([GREY], top=2)[0]] == ["blue", "red"]
    assert [prediction.label for prediction in classifier.classify([GREY], top=9)[0]] == LABELS


@pytest.fixture(params=["rough", "calibrated"])
def refusing(request: pytest.FixtureRequest, colour_bundle: Path) -> Path:
    """The bundle of colours, which compares labels with grey, without calibration and with one on bright colours."""
    manifest, grey = read_manifest(colour_bundle), np.full(3, 3**-0.5, np.float32)
    nouns = np.stack([grey, grey, grey, -grey])
    write_labels(colour_bundle, LabelBank(tuple("abcd"), nouns), name=BACKGROUND)
    if request.param == "calibrated":
        images = normalise(np.tile(np.eye(3) + 0.2, (10, 1)))
        write_labels(colour_bundle, LabelBank(tuple(map(str, range(30))), images), name=KNOWN)
        calibration = Calibration(temperature=2.0, slope=1.0, intercept=-3.0, curve=(4.0,) * 30)
        manifest = manifest.with_features(calibration=calibration)
    write_manifest(colour_bundle, manifest)
    return colour_bundle


@pytest.mark.parametrize("labels", [LABELS, ["red"]])
def test_an_image_that_no_label_fits_has_no_prediction(refusing: Path, labels: list[str]) -> None:
    encoder = load(refusing)
    for deciding in ({"none": True}, {"refuse_known": 0.1}, {"none": True, "multi": True}):
        red, grey = ZeroShotClassifier(encoder, labels, **deciding).classify([RED, GREY])
        assert (red[0].label, grey) == ("red", [])
    assert len(ZeroShotClassifier(encoder, LABELS, none=True).classify([RED])[0]) == len(LABELS)
    assert len(ZeroShotClassifier(encoder, LABELS, refuse_known=0.0).classify([GREY])[0]) in (0, len(LABELS))
    for wrong in ({"refuse_known": 1.5}, {"refuse_known": "0.5"}, {"non": True}):
        with pytest.raises(UsageError):
            ZeroShotClassifier(encoder, LABELS, **wrong)  # type: ignore[arg-type]  # that is what is tested


def test_a_probability_of_a_label_by_itself_does_not_depend_on_the_others(refusing: Path) -> None:
    encoder, yellow = load(refusing), Image.new("RGB", (9, 9), "yellow")
    several, alone = (dict(ZeroShotClassifier(encoder, labels, multi=True).classify([yellow])[0]) for labels in
                      (LABELS, ["red"]))  # fmt: skip
    assert several["red"] == pytest.approx(alone["red"])
    assert several["red"] > several["blue"]


def test_the_calibration_softens_probabilities_and_raw_leaves_it_out(refusing: Path) -> None:
    model = edge.load(refusing)
    calibrated, raw = (model.classify(RED, LABELS, raw=raw)[0].probability for raw in (False, True))
    softened = model.describe().calibration is not None
    assert (calibrated < raw) == softened
    assert raw == pytest.approx(edge.load(refusing).encoder.describe().scoring.probabilities(
        model.encode_images([RED]), model.encode_texts([f"a photo of {label}" for label in LABELS])
    ).max(), abs=1e-5)  # fmt: skip


def test_labels_that_another_thread_changes_meanwhile_are_those_of_the_next_answer(
    colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = ZeroShotClassifier(load(colour_bundle), LABELS)
    probabilities = Scoring.probabilities

    def change_meanwhile(*arguments: Any) -> Probabilities:
        classifier.set_labels(["green", "red"])  # what the other thread does
        return probabilities(*arguments)

    monkeypatch.setattr(Scoring, "probabilities", change_meanwhile)
    first, second = (classifier.classify([RED])[0] for _ in range(2))
    assert [prediction.label for prediction in first] == ["red", "blue", "green"]
    assert [prediction.label for prediction in second] == ["red", "green"]


def test_a_single_label_is_answered_also_if_its_cosine_is_negative(colour_bundle: Path) -> None:
    classifier = ZeroShotClassifier(load(colour_bundle), "red")
    embeddings = -classifier.encoder.encode_images([RED])
    assert classifier.similarities(embeddings)[0, 0] < -0.9
    assert classifier.classify_embeddings(embeddings) == [[("red", 1.0)]]


def test_only_a_batch_of_images_is_in_memory(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, size, alive = load(colour_bundle), (31, 7), list[int]()
    encode = encoder.encode_images

    def count_and_encode(images: Sequence[Image.Image]) -> np.ndarray:
        alive.append(sum(type(thing) is Image.Image and thing.size == size for thing in gc.get_objects()))
        return encode(images)

    monkeypatch.setattr(encoder, "encode_images", count_and_encode)
    answers = ZeroShotClassifier(encoder, LABELS).classify((Image.new("RGB", size, "red") for _ in range(100)), top=1)
    assert [answer[0].label for answer in answers] == ["red"] * 100
    assert max(alive) < 2 * BATCH_SIZE


def test_a_text_is_one_text_and_not_its_characters(colour_bundle: Path) -> None:
    encoder = load(colour_bundle)
    np.testing.assert_array_equal(encoder.encode_texts("red"), encoder.encode_texts(["red"]))
    np.testing.assert_array_equal(encoder.tokenize("red"), encoder.tokenize(["red"]))
    assert ZeroShotClassifier(encoder, "red").labels == ("red",)
    classifier = ZeroShotClassifier(encoder, ["red"], templates="{}")
    np.testing.assert_allclose(classifier.similarities(encoder.encode_texts(["red"])), [[1]], atol=1e-6)


@pytest.fixture
def bundle_with_bank(colour_bundle: Path) -> Path:
    write_labels(colour_bundle, LabelBank(("red", "blue"), np.asarray([[1, 0, 0], [0, 0, 1]], dtype=np.float32)))
    rewrite(colour_bundle)
    return colour_bundle


def test_labels_of_the_bank_keep_their_own_rows_in_any_order(bundle_with_bank: Path) -> None:
    for labels in (["red", "blue"], ["blue", "red"]):
        classifier = ZeroShotClassifier(load(bundle_with_bank), labels)
        assert classifier.labels == tuple(labels)  # the columns of `probabilities`
        assert classifier.probabilities([RED]).argmax() == labels.index("red")
        (predictions,) = classifier.classify([RED])
        assert predictions[0].label == "red"
        assert predictions[0].probability > 0.99


def test_labels_in_the_bank_need_no_text_tower_unless_with_other_templates(bundle_with_bank: Path) -> None:
    for labels, templates in ((["blue", "green"], None), (["blue"], "a drawing of {}")):
        encoder = load(bundle_with_bank)
        classifier = ZeroShotClassifier(encoder)
        assert classifier.classify([RED], top=1)[0][0].label == "red"
        classifier.set_labels(["blue"])
        assert not {"_text_session", "_tokenizer"} & vars(encoder).keys()
        ZeroShotClassifier(encoder, labels, templates=templates)
        assert "_text_session" in vars(encoder)


def test_embeddings_of_any_length_give_the_probabilities_of_unit_ones(colour_bundle: Path) -> None:
    model = Model(load(colour_bundle))
    classifier = ZeroShotClassifier(model, LABELS)
    rows = model.encode_images([RED, GREY])
    expected = classifier.classify_embeddings(rows, top=3)
    for scaled in (7 * rows, 1e30 * rows, (0.01 * rows).astype(np.float16), 7 * rows.astype(np.float64), rows.tolist()):
        for answer, own in zip(classifier.classify_embeddings(scaled, top=3), expected, strict=True):
            assert [label for label, _ in answer] == [label for label, _ in own]
            assert [p for _, p in answer] == pytest.approx([p for _, p in own], abs=2e-2)
    np.testing.assert_allclose(classifier.similarities(7 * rows), classifier.similarities(rows), atol=1e-6)
    (single,) = classifier.classify_embeddings(model.encode_images(RED), top=3)
    assert single == expected[0]
    assert classifier.classify_embeddings(rows[:0]) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows * [[1], [0], [1]],
        lambda rows: rows * [[1], [1], [np.nan]],
        lambda rows: rows[:, :2],
        lambda rows: "photo.jpg",
    ],
)
def test_embeddings_that_are_none_are_refused(colour_bundle: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    model = Model(load(colour_bundle))
    with pytest.raises(InputError):
        ZeroShotClassifier(model, LABELS).classify_embeddings(change(model.encode_images([RED, GREY, RED])))
