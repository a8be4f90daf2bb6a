"""Verify intact and damaged bundles; their towers are a few nodes, made without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from PIL import Image
from support import VNNI_ALONE, CommandLine, rewrite

from clip_rd_edge.bundle.labels import LabelBank, write_labels
from clip_rd_edge.bundle.reference import Reference, read_reference, reference_images, write_reference
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.runtime.backends import onnxruntime
from clip_rd_edge.runtime.backends.onnxruntime import OrtEncoder
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import Check, verify_bundle


@pytest.fixture
def bundle(colour_bundle: Path) -> Path:
    """The bundle of colours with labels of its own."""
    write_labels(colour_bundle, LabelBank(("a", "b"), np.eye(2, 3, dtype=np.float32)))
    rewrite(colour_bundle)
    return colour_bundle


def _failed(checks: list[Check]) -> dict[str, str]:
    return {check.what: check.detail for check in checks if not check.passed}


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_an_intact_bundle_passes(bundle: Path) -> None:
    checks = verify_bundle(bundle)
    assert [check.what for check in checks] == [
        *("manifest.json", "image.onnx", "labels.npz", "text.onnx", "tokenizer.json"),
        *("image tower", "text tower", "labels", "answers"),
    ]
    assert not _failed(checks)
    assert "not compared: the bundle has no reference embeddings" in checks[-1].detail


@pytest.mark.parametrize(
    ("file", "tower"),
    [
        ("image.onnx", "image tower"),
        ("text.onnx", "text tower"),
        ("tokenizer.json", "text tower"),
        ("labels.npz", "labels"),
    ],
)
def test_a_flipped_byte_is_detected_and_its_tower_is_not_run(bundle: Path, file: str, tower: str) -> None:
    _flip_a_byte(bundle / file)
    failed = _failed(verify_bundle(bundle))
    assert set(failed) == {file, tower}
    assert "SHA-256 differs" in failed[file]
    assert failed[tower] == f"not run because of {file}"


def test_a_flipped_byte_anywhere_in_the_manifest_is_detected(bundle: Path) -> None:
    path = bundle / "manifest.json"
    intact = path.read_bytes()
    for position in (*range(0, len(intact), 61), len(intact) - 1):
        content = bytearray(intact)
        content[position] ^= 1
        path.write_bytes(content)
        try:
            failed = _failed(verify_bundle(bundle))
        except (ConfigError, InputError):
            continue  # no longer a valid manifest
        assert "manifest.json" in failed, (position, intact[position - 20 : position + 20])


def test_embeddings_that_are_not_normalised_are_detected(bundle: Path) -> None:
    model = onnx.load(bundle / "image.onnx")
    model.graph.node[-1].op_type = "Exp"
    onnx.save(model, bundle / "image.onnx")
    rewrite(bundle)
    failed = _failed(verify_bundle(bundle))
    assert set(failed) == {"image tower"}
    assert "a norm that differs from 1 by" in failed["image tower"]


def test_a_model_that_cannot_run_is_detected(bundle: Path) -> None:
    (bundle / "text.onnx").write_bytes(b"\x08\x05")  # of a version alone
    rewrite(bundle)
    failed = _failed(verify_bundle(bundle))
    assert set(failed) == {"text tower"}
    assert "cannot run" in failed["text tower"]


def test_the_command_says_what_failed(bundle: Path, command_line: CommandLine) -> None:
    code, out, _ = command_line("verify", bundle)
    assert (code, out.count(" ok ")) == (0, 9)
    _flip_a_byte(bundle / "text.onnx")
    code, out, _ = command_line("verify", bundle, "--json")
    assert code == 1
    assert [check["what"] for check in json.loads(out) if not check["passed"]] == ["text.onnx", "text tower"]
    assert command_line("verify", bundle / "nothing")[:2] == (2, "")


@pytest.fixture
def answering(colour_bundle: Path) -> Path:
    """The bundle of colours with reference embeddings."""
    encoder, images = load(colour_bundle), reference_images((8, 8))
    texts = ("red", "green", "blue", "yellow", "red green", "red blue", "green blue", "red red blue")
    rows = encoder.encode_texts(texts), encoder.encode_images([Image.fromarray(image) for image in images])
    write_reference(colour_bundle, Reference(texts, encoder.tokenize(texts), images, *rows))
    rewrite(colour_bundle)
    return colour_bundle


def test_the_answers_are_compared_and_what_gave_them_is_named(answering: Path) -> None:
    checks = {check.what: check for check in verify_bundle(answering)}
    assert not _failed(list(checks.values()))
    assert "answers" not in checks
    for name in ("image tower", "text tower"):
        check = checks[name]
        assert (check.runtime, check.device) == ("onnxruntime", "cpu")
        assert check.agreement is not None
        assert check.agreement > 0.99999
        assert check.detail.endswith("at least 0.9999 expected; onnxruntime on cpu")


def test_one_changed_weight_is_detected_even_if_the_manifest_matches(answering: Path) -> None:
    model = onnx.load(answering / "text.onnx")
    weight = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
    values = numpy_helper.to_array(weight).copy()
    values.flat[-1] += 1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, answering / "text.onnx")
    rewrite(answering)
    failed = _failed(verify_bundle(answering))
    assert set(failed) == {"text tower"}
    assert "an answer differs from the exporter's by" in failed["text tower"]


class _Drifting:
    """A session whose answers are those of another one, with some noise."""

    def __init__(self, session: Any, noise: float) -> None:
        self.session, self.noise = session, noise

    def run(self, names: object, feed: object) -> list[np.ndarray]:
        (rows,) = self.session.run(names, feed)
        rows = rows + self.noise * np.random.default_rng(0).standard_normal(rows.shape)
        return [(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)]


@pytest.mark.parametrize(
    ("name", "precision", "tolerated", "wrong"), [("image", "fp32", 1e-6, 1e-3), ("text", "int8 static", 1e-3, 0.1)]
)
def test_a_runtime_that_drifts_is_detected_by_the_precisions_limit(
    answering: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str, tolerated: float, wrong: float
) -> None:
    rewrite(answering, **{name: {"precision": precision}})
    open_tower = OrtEncoder.open_tower
    for noise, expected in ((tolerated, set()), (wrong, {f"{name} tower"})):
        monkeypatch.setattr(
            OrtEncoder,
            "open_tower",
            lambda self, tower, noise=noise: _Drifting(open_tower(self, tower), noise * (tower.file == f"{name}.onnx")),
        )
        assert set(_failed(verify_bundle(answering))) == expected


def test_a_tower_whose_answers_are_all_alike_is_judged_by_what_they_differ_from_the_exporters(
    answering: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less their mean, its answers are rounding alone; so is what verify finds, and no fault."""
    reference = read_reference(answering)
    assert reference is not None
    alike = np.broadcast_to(reference.image_embeddings[0], reference.image_embeddings.shape)
    for noise, expected in ((1e-7, set()), (1e-5, {"image tower"})):
        off = np.random.default_rng(0).standard_normal(alike.shape).astype(np.float32)
        write_reference(answering, msgspec.structs.replace(reference, image_embeddings=alike + noise * off))
        rewrite(answering)
        monkeypatch.setattr(BundleEncoder, "encode_images", lambda self, images: alike)
        assert set(_failed(verify_bundle(answering))) == expected


@pytest.mark.parametrize(
    ("precision", "rounding", "lowest"),
    [("int8 static", 0.999, "0.99"), ("int8 static", 0.96, "0.94"), ("fp32", 0.5, "0.9999")],
)
def test_answers_in_int8_may_differ_by_half_again_what_rounding_does_to_the_tower(
    answering: Path, precision: str, rounding: float, lowest: str
) -> None:
    reference = read_reference(answering)
    assert reference is not None
    write_reference(answering, msgspec.structs.replace(reference, image_rounding=rounding))
    rewrite(answering, image={"precision": precision})
    checks = {check.what: check.detail for check in verify_bundle(answering)}
    assert f"at least {lowest} expected" in checks["image tower"]
    assert "at least 0.9999 expected" in checks["text tower"]


@pytest.mark.parametrize(
    ("sets", "lacking", "failing"),
    [
        (("x86-64-vnni", "aarch64"), True, {"image tower"}),
        (("x86-64-vnni", "aarch64"), False, set()),
        (("x86-64", "x86-64-vnni", "aarch64", "wasm32"), True, set()),
    ],
)
def test_a_processor_that_saturates_the_towers_int8_fails_whatever_it_answers(
    answering: Path, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...], lacking: bool, failing: set[str]
) -> None:
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: lacking)
    rewrite(answering, image={"instruction_sets": sets})
    failed = _failed(verify_bundle(answering))
    assert set(failed) == failing
    if failing:
        assert "its INT8 holds for x86-64-vnni and aarch64, and this processor has no VNNI" in failed["image tower"]


def test_a_tower_that_this_processor_gets_wrong_answers_by_force_alone(
    answering: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: True)
    rewrite(answering, text=VNNI_ALONE)
    encoder = load(answering)
    for _ in range(2):
        with pytest.raises(UsageError):
            encoder.encode_texts(["red"])
    encoder.encode_pixels(np.ones((1, 3, 8, 8), np.float32))  # in float32
    assert not caplog.records
    forced = load(answering, force=True)
    forced.encode_texts(["red"])
    forced.encode_texts(["blue"])
    assert ["gives wrong answers here" in message for message in caplog.messages] == [True]


def test_wrong_sums_of_int8_are_warned_about_and_fail_whatever_the_weights(
    answering: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reason = "ONNX Runtime 1.23.0 gets sums of INT8 wrong on this processor"
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.wrong_sums", lambda: reason)
    assert not _failed(verify_bundle(answering))  # in float32
    sets = ("x86-64", "x86-64-vnni", "aarch64", "wasm32")
    rewrite(answering, image={"instruction_sets": sets})
    failed = _failed(verify_bundle(answering))
    assert set(failed) == {"image tower"}
    assert reason in failed["image tower"]
    assert [reason in message for message in caplog.messages] == [True]
    encoder = load(answering)
    with pytest.raises(UsageError):
        encoder.require_right(encoder.manifest.image)
    encoder.require_right(encoder.manifest.require_text())


def test_a_device_that_does_not_start_fails(answering: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime.OrtEncoder, "device_for", lambda self, tower: "cuda")
    monkeypatch.setattr(onnxruntime, "_open_on", lambda *_: (None, "no driver"))
    (check,) = (check for check in verify_bundle(answering) if check.what == "text tower")
    assert not check.passed
    assert check.detail.startswith("cuda did not start; ")


def test_a_tokenizer_that_gives_other_ids_is_detected(answering: Path) -> None:
    path = answering / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["green"] = vocabulary["green"], vocabulary["red"]
    path.write_text(json.dumps(content))
    rewrite(answering)
    failed = _failed(verify_bundle(answering))
    assert set(failed) == {"text tower"}
    assert "into other ids here than at the export" in failed["text tower"]


def test_damaged_or_foreign_reference_answers_fail(answering: Path) -> None:
    reference = read_reference(answering)
    assert reference is not None
    for what, changed in (
        ("reference.npz", {"image_embeddings": reference.image_embeddings[:, :-1]}),
        ("text tower", {"ids": reference.ids[:, :-1]}),
        ("text tower", {"texts": (), "ids": reference.ids[:0], "text_embeddings": reference.text_embeddings[:0]}),
    ):
        write_reference(answering, msgspec.structs.replace(reference, **changed))  # type: ignore[arg-type]
        rewrite(answering)
        assert set(_failed(verify_bundle(answering))) == {what}
    (answering / "reference.npz").write_bytes(b"not an archive")
    rewrite(answering)
    assert "could not be read" in _failed(verify_bundle(answering))["reference.npz"]
