"""The model class of the Python API: what it takes for images, labels and texts, and calls from several threads."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import clip_rd_edge as edge
from clip_rd_edge.errors import InputError
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.model import Model

LABELS = ["red", "green"]


@pytest.fixture
def model(colour_bundle: Path) -> Model:
    return Model(load(colour_bundle, threads=1))


def truncated_image() -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, "BMP")
    return Image.open(io.BytesIO(file.getvalue()[:900]))


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (lambda content: None, ""),
        (lambda content: truncated_image(), "convert"),
        (lambda content: io.BytesIO(content), "PIL.Image.open(file)"),
        (lambda content: [bytearray(content)], "PIL.Image.open(io.BytesIO(content))"),
    ],
)
def test_what_is_no_image_is_refused_with_a_hint_how_to_open_it(
    model: Model, colour_images: Path, given: Callable[[bytes], Any], hint: str
) -> None:
    for call in (model.encode_images, lambda images: model.classify(images, LABELS)):
        images = given((colour_images / "red.png").read_bytes())
        with pytest.raises(InputError) as raised:
            call(images)
        assert hint in raised.value.hint
        if isinstance(images, io.BytesIO):
            assert images.tell() == 0  # and may now be opened


def test_generators_count_as_lists(model: Model, colour_images: Path) -> None:
    red = colour_images / "red.png"
    expected = model.classify(red, LABELS, templates=["a {}"])
    assert model.classify(red, (label for label in LABELS), templates=(text for text in ["a {}"])) == expected
    assert model.encode_texts(label for label in LABELS).shape == (2, 3)
    scores = edge.evaluate(model, (task for task in [colour_images.parent / "photos"]))
    assert scores[0].images == 1


def frames_of_a_camera() -> Iterator[np.ndarray]:
    """Yield a red, a green and a blue image in one buffer, as cv2.VideoCapture.read(buffer) does."""
    buffer = np.zeros((9, 9, 3), dtype=np.uint8)
    for colour in np.eye(3):
        buffer[:] = 250 * colour
        yield buffer


def frames_of_a_decoder() -> Iterator[Image.Image]:
    image = Image.new("RGB", (9, 9))
    for colour in np.eye(3, dtype=int):
        image.paste(tuple(250 * colour), (0, 0, 9, 9))
        yield image


@pytest.mark.parametrize("frames", [frames_of_a_camera, frames_of_a_decoder])
def test_frames_that_share_a_buffer_are_looked_at_one_by_one(model: Model, frames: Callable[[], Iterator[Any]]) -> None:
    labels = ["red", "green", "blue"]
    classifier = edge.ZeroShotClassifier(model, labels)
    for answers in (model.classify(frames(), labels, top=1), classifier.classify(frames(), top=1)):
        assert [answer[0].label for answer in answers] == labels


def test_files_and_other_images_keep_their_order_in_one_iterator(model: Model, colour_images: Path) -> None:
    files = [colour_images / "red.png", str(colour_images / "green.png")]
    images = (*files, Image.new("RGB", (9, 9), (5, 5, 250)), *files)
    labels = ["red", "green", "blue"]
    answers = model.classify(iter(images), labels, top=1)
    assert [answer[0].label for answer in answers] == ["red", "green", "blue", "red", "green"]
    assert model.encode_images(iter(())).shape == (0, 3)


def test_files_of_labels_and_templates_are_read_again_when_they_are_edited(
    model: Model, colour_images: Path, tmp_path: Path
) -> None:
    image, labels, templates = colour_images / "red.png", tmp_path / "labels.txt", tmp_path / "templates.txt"
    for names, prompts in ((LABELS, ["a {}"]), (LABELS, ["a {}", "green {}"]), (["blue", "red"], ["green {}"])):
        labels.write_text("\n".join(names))
        templates.write_text("\n".join(prompts))
        expected = edge.ZeroShotClassifier(model, names, templates=prompts).classify(image)
        assert [model.classify(image, labels, templates=templates)] == expected


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_used_model_can_be_copied_and_sent_to_another_process(
    model: Model, colour_images: Path, twin: Callable[[Model], Model]
) -> None:
    red = colour_images / "red.png"
    expected = model.classify(red, LABELS)
    assert twin(model).classify(red, LABELS) == expected
    assert np.array_equal(twin(model).encode_texts("green"), model.encode_texts("green"))


def test_a_relative_bundle_is_found_from_another_working_folder(
    colour_bundle: Path, colour_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(colour_bundle.parent)
    model = edge.load(colour_bundle.name)
    monkeypatch.chdir(colour_images)
    assert model.classify("red.png", LABELS, top=1)[0].label == "red"


def test_a_thread_answers_with_its_own_labels(model: Model, colour_images: Path) -> None:
    """Another thread asks with other labels between the two steps of choosing a classifier and using it."""
    red = colour_images / "red.png"

    class Interrupted(Model):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_classifier" and value is not None and value[0][0] == tuple(LABELS):
                self.classify(red, ["blue", "yellow"])  # what the other thread does

    answers = Interrupted(model.encoder).classify(red, LABELS)
    assert {answer.label for answer in answers} == set(LABELS)
