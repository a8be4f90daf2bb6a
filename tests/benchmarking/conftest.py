"""A numpy encoder that knows some colours, and tasks of coloured squares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from clip_rd_edge.benchmarking.results import Results
from clip_rd_edge.benchmarking.run import run_suite
from clip_rd_edge.benchmarking.suite import Role, Suite, SuiteRow
from clip_rd_edge.bundle.encoder import Description, Embeddings, normalise
from clip_rd_edge.bundle.preprocess import Preprocessing, preprocess
from clip_rd_edge.data.tasks import RetrievalTask, ZeroShotTask

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
PREPROCESSING = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class ColourEncoder:
    """Embeds an image as its mean colour, and the name of a known colour as that colour; other texts as noise."""

    def __init__(
        self, known: Sequence[str] = tuple(COLOURS), *, name: str = "colours", precision: str = "fp32"
    ) -> None:
        self.known = set(known)
        self.name = name
        self.precision = precision
        self.batches: list[int] = []

    def describe(self) -> Description:
        return Description(
            name=self.name,
            runtime="numpy",
            precision=self.precision,
            embedding_size=3,
            preprocessing=PREPROCESSING,
            logit_scale=10.0,
            parameters=1_000 * len(self.known),
            size_bytes=1_000_000 * len(self.known),
        )

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        self.batches.append(len(images))
        return self.encode_pixels(np.stack([preprocess(image, PREPROCESSING) for image in images]))

    def encode_pixels(self, pixels: np.ndarray) -> Embeddings:
        return normalise(pixels.mean(axis=(2, 3)))

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        return normalise(np.stack([self._embed(text) for text in texts]))

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray([[len(text)] for text in texts], dtype=np.int64)

    def encode_ids(self, ids: np.ndarray) -> Embeddings:
        return normalise(np.repeat(ids, 3, axis=1).astype(np.float32))

    def _embed(self, text: str) -> np.ndarray:
        if text in self.known:
            return np.asarray(COLOURS[text], dtype=np.float32) / 127.5 - 1
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        return np.random.default_rng(seed).normal(size=3)


@pytest.fixture
def make_encoder() -> Callable[..., ColourEncoder]:
    """Return the encoder's class: `make_encoder(known, name=…)`."""
    return ColourEncoder


@pytest.fixture
def squares(tmp_path: Path) -> dict[str, Path]:
    """Image files of one square per colour, by colour."""
    folder = tmp_path / "squares"
    folder.mkdir()
    paths = {}
    for name, colour in COLOURS.items():
        paths[name] = folder / f"{name}.png"
        Image.new("RGB", (16, 12), colour).save(paths[name])
    return paths


@pytest.fixture
def colour_task(squares: dict[str, Path]) -> ZeroShotTask:
    """Classify each square by its colour."""
    return ZeroShotTask(
        name="colours", images=tuple(squares.values()), targets=tuple(range(len(squares))), labels=tuple(squares)
    )


@pytest.fixture
def colour_retrieval(squares: dict[str, Path]) -> RetrievalTask:
    """Retrieve each square by the name of its colour; red has a second caption, which describes blue."""
    return RetrievalTask(
        name="colours, retrieval",
        images=tuple(squares.values()),
        captions=(*squares, "blue"),
        caption_images=(*range(len(squares)), 0),
    )


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """A suite with all five roles and a task of two squares per colour; the models are empty folders."""
    return make_suite(tmp_path / "models")


def make_suite(root: Path) -> Suite:
    roles: tuple[tuple[str, str, Role], ...] = (
        ("Teacher", "teacher", "teacher"),
        ("Alone", "alone", "baseline"),
        ("Student", "student", "student"),
        ("FP32", "fp32", "exported"),
        ("INT8", "int8", "quantised"),
    )
    for _, model, _ in roles:
        (root / model).mkdir(parents=True)
    for name, colour in COLOURS.items():
        folder = root / "task" / name
        folder.mkdir(parents=True)
        for edge in (16, 24):
            Image.new("RGB", (edge, 12), colour).save(folder / f"{edge}.png")
    (root / "task" / "zeroshot_classification_templates.txt").write_text("{c}\n")
    rows = tuple(SuiteRow(label=label, model=model, role=role) for label, model, role in roles)
    return Suite(name="colours", rows=rows, tasks=("task",), root=str(root), rounds=5)


@pytest.fixture
def open_fake() -> Callable[[str], ColourEncoder]:
    """Return a function that opens the suite's models by the names of their folders."""
    return open_colours


def open_colours(spec: str) -> ColourEncoder:
    colours = tuple(COLOURS)
    known = {"teacher": colours, "alone": colours[:2], "student": colours[:4], "fp32": colours[:4], "int8": colours[:3]}
    name = Path(spec).name
    return ColourEncoder(known[name], name=name, precision="int8" if name == "int8" else "fp32")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of the suite, measured once, as if on a quiet machine; they are immutable."""
    measured = run_suite(make_suite(tmp_path_factory.mktemp("colours") / "models"), open_colours)
    return replace(measured, other_load=0.0)
