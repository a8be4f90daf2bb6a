"""Shared fixtures: small images, a table of pairs, tiny random models and bundles."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from support import COLOURS, write_pairs

# Towers here are tiny: threads would wait for one another longer than they work. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The servers of the tests are on this machine, which a proxy does not reach.
for variable in ("no_proxy", "NO_PROXY"):
    os.environ[variable] = ",".join(["localhost", "127.0.0.1", *filter(None, [os.environ.get(variable)])])
# What a terminal shows is compared as it is without colours that the environment wants, and not on a dumb terminal.
for variable in ("FORCE_COLOR", "TERM"):
    os.environ.pop(variable, None)
# A shell's job in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from clip_rd_edge.exporting.calibration import CalibrationSet, Samples
    from clip_rd_edge.models.clip import ClipModel

IMAGE_SIZE, CONTEXT_LENGTH = 32, 16
WORDS = ["a", "red", "green", "blue", "cat", "dog", "house", "tree", "under", "photo", "drawing", "small"]


@pytest.fixture(autouse=True)
def label_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate label cache for each test; its folder does not exist yet."""
    folder = tmp_path_factory.getbasetemp() / "labels" / uuid.uuid4().hex
    monkeypatch.setattr("clip_rd_edge.runtime.labels.label_cache_folder", lambda: folder)
    return folder


@pytest.fixture(autouse=True)
def _kept_searches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches for INT8 are remembered within a test alone."""
    folder = tmp_path_factory.getbasetemp() / "int8" / uuid.uuid4().hex
    monkeypatch.setattr("clip_rd_edge.exporting.int8.trials.outcome_folder", lambda: folder)


@pytest.fixture(autouse=True)
def marks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate memory of intact files for each test; its folder does not exist yet."""
    folder = tmp_path_factory.getbasetemp() / "intact" / uuid.uuid4().hex
    monkeypatch.setattr("clip_rd_edge.bundle.manifest.marks_folder", lambda: folder)
    return folder


@pytest.fixture
def plots() -> None:
    """Have runs draw their plots."""


@pytest.fixture(autouse=True)
def _no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny runs write empty plots, which would take longer than their training, unless a test asks for them."""
    metrics = sys.modules.get("clip_rd_edge.distillation.metrics")
    if metrics is not None and "plots" not in request.fixturenames:
        monkeypatch.setattr(metrics, "_figure", _empty_figure)


@contextmanager
def _empty_figure(path: Path, count: int, title: str, **_: object) -> Iterator[list[MagicMock]]:
    yield [MagicMock() for _ in range(count)]
    Image.new("RGB", (1, 1)).save(path)


@pytest.fixture
def hang_up() -> Iterator[None]:
    """SIGHUP acts as in a terminal, in the test and in what it starts; under nohup, both would ignore it."""
    number: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none
    before = None if number is None else signal.signal(number, signal.SIG_DFL)
    yield
    if number is not None:
        signal.signal(number, before)


@pytest.fixture
def pairs_csv(tmp_path: Path) -> Path:
    """A CSV in open_clip's format: 24 noisy images in four colours, with captions."""
    return write_pairs(tmp_path)


@pytest.fixture
def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `clip-rd-edge` in this process and returns exit code, stdout and stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        from clip_rd_edge.cli.main import main

        monkeypatch.setattr(sys, "argv", ["clip-rd-edge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        output = capsys.readouterr()
        return int(exit_.value.code or 0), output.out, output.err

    return run


@pytest.fixture
def colour_bundle(tmp_path: Path) -> Path:
    """A bundle that classifies colours, made without torch: both towers return a normalised (red, green, blue)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from tokenizers import Tokenizer, models, pre_tokenizers

    from clip_rd_edge.bundle.manifest import Manifest, Tower, write_manifest
    from clip_rd_edge.bundle.preprocess import Preprocessing
    from clip_rd_edge.bundle.tokenizer import TokenizerSpec

    folder = tmp_path / "colours"
    folder.mkdir()
    # Rows by token id: padding, unknown word, and the colours. Image pixels are in [0, 1].
    table = np.asarray([[0, 0, 0], [1e-3, 1e-3, 1e-3], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=np.float32)
    node = helper.make_node
    towers = {
        "image": [node("GlobalAveragePool", ["x"], ["mean"]), node("Flatten", ["mean"], ["sum"])],
        "text": [node("Gather", ["table", "x"], ["words"]), node("ReduceSum", ["words", "axes"], ["sum"], keepdims=0)],
    }
    inputs = {
        "image": helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8]),
        "text": helper.make_tensor_value_info("x", TensorProto.INT64, ["N", 6]),
    }
    constants = {
        "image": [],
        "text": [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.asarray([1], np.int64), "axes")],
    }
    for tower, nodes in towers.items():
        nodes.append(node("LpNormalization", ["sum"], ["y"]))
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
        graph = helper.make_graph(nodes, tower, [inputs[tower]], [output], initializer=constants[tower])
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), folder / f"{tower}.onnx")
    words = {"?": 1, "red": 2, "green": 3, "blue": 4, "yellow": 5}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest = Manifest(
        format_version=1,
        name="colours",
        precision="fp32",
        target="onnxruntime",
        embedding_size=3,
        logit_scale=20.0,
        preprocessing=Preprocessing(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        tokenizer=TokenizerSpec(context_length=6),
        image=Tower(file="image.onnx", input_name="x", output_name="y", precision="fp32"),
        text=Tower(file="text.onnx", input_name="x", output_name="y", precision="fp32"),
        templates=("a photo of {}",),
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def colours_without_text(colour_bundle: Path, tmp_path: Path) -> Path:
    """The bundle of colours without its text tower, with the labels red, green and blue."""
    from clip_rd_edge.bundle.labels import LabelBank, write_labels
    from clip_rd_edge.bundle.manifest import read_manifest, write_manifest

    folder = tmp_path / "colours-without-text"
    shutil.copytree(colour_bundle, folder)
    write_labels(folder, LabelBank(("red", "green", "blue"), np.eye(3, dtype=np.float32)))
    for name in ("text.onnx", "tokenizer.json"):
        (folder / name).unlink()
    write_manifest(folder, read_manifest(colour_bundle).without_text())
    return folder


@pytest.fixture
def colour_images(tmp_path: Path) -> Path:
    """A folder of single-colour images: red.png, green.png, blue.jpg, and yellow.webp in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("red.png", "green.png", "blue.jpg", "more/yellow.webp"):
        Image.new("RGB", (40, 30), COLOURS[Path(name).stem]).save(folder / name)
    return folder


@pytest.fixture(scope="session", autouse=True)
def remembered_exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Bundles get the ONNX file of a tower that was exported before, by any worker, which takes torch seconds.

    `exporting.towers` is as it is for tests that call it themselves.
    """
    from clip_rd_edge.exporting import bundle

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder above is that of all workers of this run, and of no other run
        folder = folder.parent
    folder /= "remembered-exports"
    folder.mkdir(exist_ok=True)

    def remembering(export: Callable[[ClipModel, Path], Path]) -> Callable[[ClipModel, Path], Path]:
        def exported(clip: ClipModel, target: Path) -> Path:
            digest = hashlib.sha256(
                f"{export.__name__} {clip.preprocessing} {clip.context_length} {clip.model}".encode()
            )
            for name, tensor in clip.model.state_dict().items():
                digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
            kept = folder / f"{digest.hexdigest()}.onnx"
            path = target / f"{export.__name__.split('_')[1]}.onnx"
            if kept.is_file():
                return Path(shutil.copyfile(kept, path))
            assert export(clip, target) == path
            part = kept.with_suffix(f".{os.getpid()}")
            shutil.copyfile(path, part)
            part.replace(kept)
            return path

        return exported

    with pytest.MonkeyPatch.context() as patch:
        for name in ("export_image_tower", "export_text_tower"):
            patch.setattr(bundle, name, remembering(getattr(bundle, name)))
        yield


@pytest.fixture(scope="session")
def make_student() -> Callable[..., ClipModel]:
    """Return a function that builds a student with the same random weights each time."""

    def make(trunk: str = "resnet10t", image_size: int = IMAGE_SIZE) -> ClipModel:
        import torch

        from clip_rd_edge.models.students import build_student, student_config

        torch.manual_seed(0)
        config = student_config(
            trunk, embedding_size=32, image_size=image_size, text="tiny", context_length=CONTEXT_LENGTH
        )
        return build_student(config, name=trunk)

    return make


@pytest.fixture(scope="session")
def image_tower(
    make_student: Callable[..., ClipModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[ClipModel, Path]]:
    """Return a function that exports a 64-pixel student by its trunk's name, once per trunk; returns model and file."""

    from clip_rd_edge.exporting import bundle

    @cache
    def export(trunk: str) -> tuple[ClipModel, Path]:
        clip = make_student(trunk, image_size=64)
        return clip, bundle.export_image_tower(clip, tmp_path_factory.mktemp(trunk))

    return export


@pytest.fixture(scope="session")
def student(make_student: Callable[..., ClipModel]) -> ClipModel:
    """A resnet10t student for 32-pixel images."""
    return make_student()


@pytest.fixture(scope="session")
def fp32_bundle(student: ClipModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's float32 bundle, shared by all tests: do not change it."""
    from clip_rd_edge.exporting.bundle import export_bundle
    from clip_rd_edge.exporting.plan import Plan

    bundle = tmp_path_factory.mktemp("bundles") / "fp32"
    export_bundle(student, bundle, Plan(precision="fp32", labels=("cat", "dog"), provenance={"model": "tiny"}))
    return bundle


@pytest.fixture(scope="session")
def calibration(student: ClipModel) -> CalibrationSet:
    """Noise images of different brightness, and captions of random words."""
    from clip_rd_edge.exporting.calibration import CalibrationSet, Samples

    rng = np.random.default_rng(0)

    def samples(count: int) -> Samples:
        level = rng.uniform(-1, 1, (count, 3, 1, 1))
        pixels = (level + 0.5 * rng.standard_normal((count, 3, IMAGE_SIZE, IMAGE_SIZE))).astype(np.float32)
        captions = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]
        return Samples(pixels, student.tokenizer(captions).numpy())

    return CalibrationSet("noise", calibrate=samples(32), held_out=samples(24))


@pytest.fixture
def without_more(colour_images: Path) -> Iterator[Path]:
    """Images whose subfolder `more` cannot be read, by anybody: permissions do not stop root."""
    scandir = os.scandir

    def refuse(path: str | os.PathLike[str]) -> object:
        if Path(path).name == "more":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    with pytest.MonkeyPatch.context() as patch:  # one of its own, which ends before pytest removes the folder
        patch.setattr(os, "scandir", refuse)
        yield colour_images
