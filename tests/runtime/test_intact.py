from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.bundle import manifest as intact
from clip_rd_edge.bundle.labels import LabelBank, write_labels
from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError, InputError
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.load import load

NO_TIME_OF_CHANGE = pytest.mark.skipif(sys.platform == "win32", reason="has no time of change")
FILES = ["image.onnx", "text.onnx", "tokenizer.json", "labels.npz"]


@pytest.fixture
def bundle(colour_bundle: Path) -> Path:
    write_labels(colour_bundle, LabelBank(("red", "blue"), np.asarray([[1, 0, 0], [0, 0, 1]], dtype=np.float32)))
    write_manifest(colour_bundle, read_manifest(colour_bundle))
    return colour_bundle


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed."""
    names: list[str] = []

    def record(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    sha256_of = intact.sha256_of
    monkeypatch.setattr(intact, "sha256_of", record)
    return names


def use_all(bundle: Path) -> None:
    classifier = ZeroShotClassifier(load(bundle), ["red", "green", "blue"], cache=False)
    assert classifier.encoder.label_bank is not None  # type: ignore[attr-defined]
    assert classifier.classify([Image.new("RGB", (9, 9), (250, 0, 0))], top=1)[0][0].label == "red"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_each_file_is_hashed_once(bundle: Path, hashed: list[str]) -> None:
    use_all(bundle)
    assert sorted(hashed) == sorted(FILES)
    use_all(bundle)
    assert len(hashed) == len(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_an_error_and_no_answer(bundle: Path, name: str) -> None:
    size = 8 * (bundle / name).stat().st_size
    for bit in range(7, size, size // 9):
        flip(bundle / name, bit)
        with pytest.raises(ConfigError, match=rf"{name} has changed since the export"):
            use_all(bundle)
        flip(bundle / name, bit)
    use_all(bundle)


def test_labels_that_are_removed_while_a_bundle_is_in_use_are_not_taken_for_none(bundle: Path) -> None:
    encoder = load(bundle)
    (bundle / "labels.npz").unlink()
    with pytest.raises(InputError, match=r"incomplete: labels\.npz is missing"):
        ZeroShotClassifier(encoder)


def test_a_flipped_bit_of_the_manifest_is_an_error_and_no_answer(bundle: Path) -> None:
    path = bundle / "manifest.json"
    intact_content = path.read_bytes()
    for bit in range(3, 8 * len(intact_content), 97):
        flip(path, bit)
        with pytest.raises(ClipRdEdgeError):
            use_all(bundle)
        path.write_bytes(intact_content)


@pytest.mark.parametrize("put_back", [False, pytest.param(True, marks=NO_TIME_OF_CHANGE)])
def test_damage_after_the_first_use_is_found_though_its_time_is_put_back(bundle: Path, *, put_back: bool) -> None:
    use_all(bundle)
    stat = (bundle / "image.onnx").stat()
    time.sleep(0.02)  # file systems keep times to some milliseconds
    flip(bundle / "image.onnx", 99)
    if put_back:
        os.utime(bundle / "image.onnx", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ConfigError, match="has changed since the export"):
        use_all(bundle)


def test_a_copy_is_checked_again(bundle: Path, tmp_path: Path, hashed: list[str]) -> None:
    use_all(bundle)
    shutil.copytree(bundle, tmp_path / "copy", copy_function=shutil.copy2)  # keeps the times
    flip(tmp_path / "copy" / "image.onnx", 99)
    stat = (bundle / "image.onnx").stat()
    os.utime(tmp_path / "copy" / "image.onnx", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"image\.onnx has changed"):
        use_all(tmp_path / "copy")


def test_a_cache_that_cannot_be_written_costs_time_alone(bundle: Path, marks: Path, hashed: list[str]) -> None:
    marks.parent.mkdir(parents=True, exist_ok=True)
    marks.write_bytes(b"")  # a file where the folder should be
    use_all(bundle)
    use_all(bundle)
    assert len(hashed) == 2 * len(FILES)


def test_a_cache_that_cannot_be_looked_into_costs_time_alone(
    bundle: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name that is too long fails as the home folder of another user does, also for root.
    monkeypatch.setattr(intact, "marks_folder", lambda: tmp_path / ("a" * 300))
    use_all(bundle)
    assert sorted(hashed) == sorted(FILES)


def test_the_memory_of_intact_files_does_not_grow_without_limit(
    bundle: Path, marks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intact, "_MAX_MARKS", 10)
    manifest = read_manifest(bundle)
    for number in range(40):
        os.utime(bundle / "image.onnx", ns=(number, number))
        intact.require_intact(bundle, manifest, "image.onnx")
    assert len(list(marks.iterdir())) <= 10
