"""A bundle is only believed as far as it can be checked: names, numbers, checksums."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import rewrite

from clip_rd_edge.bundle import manifest as contract
from clip_rd_edge.bundle.labels import LabelBank, write_labels
from clip_rd_edge.bundle.manifest import MANIFEST, read_manifest
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle

READERS = (read_manifest, load, verify_bundle)
OUTSIDE = [
    "../x.onnx", "/etc/passwd", "a/../../x.onnx", "..", ".", "", "a//b", "./image.onnx", "C:\\x.onnx", "C:x", "..\\x",
    "a\0b", "image.onnx\n", "\x1b[31mimage.onnx", "manifest.json",
]  # fmt: skip
ABSURD: list[tuple[tuple[str, ...], Any]] = [
    (("preprocessing", "size"), [30_000, 30_000]), (("preprocessing", "size"), [0, 8]),
    (("preprocessing", "size"), [-8, 8]), (("preprocessing", "size"), [8.5, 8]),
    (("preprocessing", "size"), [10**30, 8]),
    (("preprocessing", "std"), [0, 1, 1]), (("preprocessing", "fill_color"), 256),
    (("tokenizer", "context_length"), 10**9), (("tokenizer", "context_length"), 0), (("tokenizer", "pad_id"), -1),
    (("tokenizer", "end_id"), 2**40), (("embedding_size",), -1), (("embedding_size",), 0), (("embedding_size",), 10**9),
    (("logit_scale",), -20), (("logit_scale",), 0), (("logit_scale",), 1e300), (("templates",), []),
    (("templates",), ["{}"] * 1001), (("parameters",), -1), (("format_version",), -1),
]  # fmt: skip


def edit(folder: Path, keys: tuple[str, ...], value: Any) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    target = manifest
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("keys", [("image", "file"), ("text", "file"), ("image", "engine"), ("files",)])
def test_a_name_that_leads_out_of_the_folder_is_refused(colour_bundle: Path, keys: tuple[str, ...], name: str) -> None:
    if keys == ("image", "engine") and name == "":
        return  # no engine
    files = json.loads((colour_bundle / MANIFEST).read_text())["files"]
    edit(colour_bundle, keys, {**files, name: "0" * 64} if keys == ("files",) else name)
    for read in READERS:
        with pytest.raises(ConfigError, match="inside the bundle"):
            read(colour_bundle)


@pytest.mark.parametrize(("keys", "value"), ABSURD)
def test_a_number_that_no_model_has_is_refused(colour_bundle: Path, keys: tuple[str, ...], value: Any) -> None:
    edit(colour_bundle, keys, value)
    with pytest.raises(ConfigError, match=keys[-1]):
        read_manifest(colour_bundle)


@pytest.mark.parametrize(
    "content",
    [b'{"format_version": 1, "name": "\xff"}', b'{"format_version": 1, "a": ' + b'{"a":' * 100_000, b"[" * 100_000,
     b"\xff\xfe", b"", None],
)  # fmt: skip
def test_a_manifest_that_is_damaged_is_to_be_copied_again(colour_bundle: Path, content: bytes | None) -> None:
    whole = (colour_bundle / MANIFEST).read_bytes()
    (colour_bundle / MANIFEST).write_bytes(whole[:100] if content is None else content)
    with pytest.raises(ConfigError) as raised:
        read_manifest(colour_bundle)
    assert "again" in raised.value.hint


@pytest.mark.parametrize("name", ["image.onnx", "text.onnx", "tokenizer.json"])
def test_a_file_without_a_checksum_is_refused(colour_bundle: Path, name: str) -> None:
    files = json.loads((colour_bundle / MANIFEST).read_text())["files"]
    edit(colour_bundle, ("files",), {key: value for key, value in files.items() if key != name})
    for read in READERS:
        with pytest.raises(ConfigError, match=name):
            read(colour_bundle)


def test_a_label_bank_that_the_manifest_does_not_list_is_refused(colour_bundle: Path) -> None:
    write_labels(colour_bundle, LabelBank(("a",), np.eye(1, 3, dtype=np.float32)))
    with pytest.raises(ConfigError, match=r"labels\.npz"):
        ZeroShotClassifier(load(colour_bundle))
    (check,) = [check for check in verify_bundle(colour_bundle) if not check.passed]
    assert check.what == "labels"


@pytest.mark.parametrize(
    "rows", [np.full((2, 3), math.nan), np.asarray([[1, 0, 0], [0, math.inf, 0]]), np.eye(2, 4), np.empty((0, 3))]
)
def test_a_label_bank_that_does_not_fit_is_refused(colour_bundle: Path, rows: np.ndarray) -> None:
    write_labels(colour_bundle, LabelBank(tuple(map(str, range(len(rows)))), rows.astype(np.float32)))
    rewrite(colour_bundle)
    with pytest.raises(ConfigError):
        ZeroShotClassifier(load(colour_bundle))


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("fault", ["nan", "size", "input"])
def test_a_tower_that_computes_no_embeddings_is_an_error_and_no_answer(
    colour_bundle: Path, colour_images: Path, command_line: Callable[..., tuple[int, str, str]], tower: str, fault: str
) -> None:
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(colour_bundle / f"{tower}.onnx")
    changes: dict[str, Any] = {}
    if fault == "nan":
        model.graph.node[-1].output[0] = "before"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(math.nan).reshape(1), "nan"))
        model.graph.node.append(helper.make_node("Mul", ["before", "nan"], ["y"]))
        onnx.save(model, colour_bundle / f"{tower}.onnx")
    elif fault == "size":
        changes = {"embedding_size": 4}
    elif tower == "image":
        changes = {"preprocessing": {"size": (9, 8)}}
    else:
        changes = {"tokenizer": {"context_length": 7}}
    rewrite(colour_bundle, **changes)
    code, output, error = command_line(
        "classify", colour_bundle, colour_images / "red.png", "--labels", "red", "green", "--no-cache"
    )
    assert (code, output) == (2, "")
    assert {"nan": "not finite numbers", "size": "expected (", "input": "does not run on"}[fault] in error


NO_TIME_OF_CHANGE = pytest.mark.skipif(sys.platform == "win32", reason="has no time of change")
FILES = ["image.onnx", "text.onnx", "tokenizer.json", "labels.npz"]


@pytest.fixture
def bundle(colour_bundle: Path) -> Path:
    write_labels(colour_bundle, LabelBank(("red", "blue"), np.asarray([[1, 0, 0], [0, 0, 1]], dtype=np.float32)))
    rewrite(colour_bundle)
    return colour_bundle


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were hashed."""
    names: list[str] = []

    def record(path: Path) -> str:
        names.append(path.name)
        return sha256_of(path)

    sha256_of = contract.sha256_of
    monkeypatch.setattr(contract, "sha256_of", record)
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


def test_labels_that_are_removed_while_a_bundle_is_in_use_are_missed(bundle: Path) -> None:
    encoder = load(bundle)
    (bundle / "labels.npz").unlink()
    with pytest.raises(ConfigError, match=r"labels\.npz"):
        ZeroShotClassifier(encoder)


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


@pytest.mark.parametrize("fault", ["a file", "a name that is too long"])
def test_a_cache_that_cannot_be_used_costs_time_alone(
    bundle: Path, marks: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "a file":
        marks.parent.mkdir(parents=True, exist_ok=True)
        marks.touch()
    else:  # which fails as the home folder of another user does, also for root
        monkeypatch.setattr(contract, "marks_folder", lambda: marks / ("a" * 300))
    use_all(bundle)
    use_all(bundle)
    assert len(hashed) == 2 * len(FILES)
