from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from clip_rd_edge.bundle import labels as label_bank
from clip_rd_edge.bundle.labels import read_labels
from clip_rd_edge.bundle.manifest import LABELS, read_manifest, write_manifest
from clip_rd_edge.runtime import labels as labels_module
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.labels import label_set_key, write_label_bank
from clip_rd_edge.runtime.load import load


@pytest.mark.parametrize(
    ("tower", "array", "dtype"),
    [
        ("fp32", "embeddings", np.float32),
        ("fp16", "embeddings", np.float16),
        ("bf16", "embeddings", np.float16),
        ("int8 dynamic with token embeddings, per-channel", "levels", np.int8),
    ],
)
def test_a_label_bank_is_stored_in_the_precision_of_the_text_tower(
    colour_bundle: Path, tower: str, array: str, dtype: type
) -> None:
    manifest = read_manifest(colour_bundle)
    text = msgspec.structs.replace(manifest.text, precision=tower)
    write_label_bank(colour_bundle, msgspec.structs.replace(manifest, text=text), ["red", "blue", "red"])
    with np.load(colour_bundle / LABELS) as arrays:
        assert arrays[array].dtype == dtype
    bank = read_labels(colour_bundle)
    assert bank is not None
    assert bank.names == ("red", "blue")
    np.testing.assert_allclose(bank.embeddings, load(colour_bundle).encode_texts(["red", "blue"]), atol=0.5 / 127)


Run = Callable[..., tuple[int, str, str]]
NAMES = ["red", "green", "blue"]
NOISE = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))]


def text_tower_loaded(encoder: BundleEncoder) -> bool:
    return bool({"_text_session", "_tokenizer"} & vars(encoder).keys())


def classifier(bundle: Path, labels: list[str] = NAMES, **rest: object) -> ZeroShotClassifier:
    return ZeroShotClassifier(load(bundle), labels, **rest)  # type: ignore[arg-type]


def test_cached_labels_need_no_text_tower(colour_bundle: Path, label_cache: Path) -> None:
    first = classifier(colour_bundle)
    second = classifier(colour_bundle)
    assert text_tower_loaded(first.encoder)  # type: ignore[arg-type]
    assert not text_tower_loaded(second.encoder)  # type: ignore[arg-type]
    np.testing.assert_array_equal(second.probabilities(NOISE), first.probabilities(NOISE))
    second.set_labels([*NAMES, "yellow"])
    assert text_tower_loaded(second.encoder)  # type: ignore[arg-type]
    third = classifier(colour_bundle, [*NAMES, "yellow"])
    assert not text_tower_loaded(third.encoder)  # type: ignore[arg-type]
    np.testing.assert_array_equal(third.probabilities(NOISE), second.probabilities(NOISE))
    assert len(list(label_cache.iterdir())) == 2


def test_the_cache_key_covers_everything_that_embeddings_depend_on(colour_bundle: Path, label_cache: Path) -> None:
    classifier(colour_bundle)
    assert text_tower_loaded(classifier(colour_bundle, NAMES[::-1]).encoder)  # type: ignore[arg-type]
    other = classifier(colour_bundle, templates=["a drawing of {}"])
    assert text_tower_loaded(other.encoder)  # type: ignore[arg-type]
    for file in ("text.onnx", "tokenizer.json"):
        with (colour_bundle / file).open("ab") as stream:
            stream.write(b"\x3a\x00" if file == "text.onnx" else b"\n")
        write_manifest(colour_bundle, read_manifest(colour_bundle))
        assert text_tower_loaded(classifier(colour_bundle).encoder)  # type: ignore[arg-type]
    assert len(list(label_cache.iterdir())) == 5


@pytest.mark.parametrize("damage", [b"", b"x" * 200, None])
def test_damaged_cache_files_are_ignored_and_rewritten(
    colour_bundle: Path, label_cache: Path, damage: bytes | None
) -> None:
    expected = classifier(colour_bundle).probabilities(NOISE)
    (file,) = label_cache.iterdir()
    intact = file.read_bytes()
    # The last byte belongs to the embeddings: only the digest detects the change.
    file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]) if damage is None else damage)
    np.testing.assert_array_equal(classifier(colour_bundle).probabilities(NOISE), expected)
    assert file.read_bytes() == intact


def test_the_cache_is_limited_and_keeps_recently_used_files(label_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.zeros((4, 8), dtype=np.float32)
    for i, key in enumerate("abc"):
        labels_module.write_label_set(key, rows)
        os.utime(label_cache / key, ns=(i, i))
    size = (label_cache / "a").stat().st_size
    assert labels_module.read_label_set("a", count=4) is not None
    monkeypatch.setattr(labels_module, "MAX_BYTES", 3 * size)
    labels_module.write_label_set("d", rows)
    assert sorted(path.name for path in label_cache.iterdir()) == ["a", "c", "d"]
    labels_module.write_label_set("too large", np.zeros((4 * size, 8), dtype=np.float32))
    assert not (label_cache / "too large").exists()
    assert labels_module.read_label_set("a", count=5) is None  # a different number of labels


def test_as_many_labels_are_cached_as_a_bundle_may_have(label_cache: Path) -> None:
    rows = np.zeros((45_000, 384), dtype=np.float32)
    labels_module.write_label_set("many", rows)
    assert labels_module.read_label_set("many", count=45_000) is not None
    assert labels_module.MAX_BYTES > label_bank.MAX_BYTES


def test_a_cache_that_cannot_be_written_is_ignored(colour_bundle: Path, label_cache: Path) -> None:
    label_cache.parent.mkdir(parents=True, exist_ok=True)
    label_cache.write_text("in the way")
    assert classifier(colour_bundle).classify(NOISE)


def test_the_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()  # the cache folder of the tests
    monkeypatch.delenv("CLIP_RD_EDGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert labels_module.label_cache_folder() == tmp_path / "clip-rd-edge" / "labels"


def test_classify_uses_the_cache_unless_it_is_disabled(
    command_line: Run, colour_bundle: Path, colour_images: Path, label_cache: Path
) -> None:
    command = ("classify", colour_bundle, colour_images / "red.png", "--labels", "red", "blue")
    _, expected, _ = command_line(*command, "--no-cache")
    assert not label_cache.exists()
    assert command_line(*command) == (0, expected, "")
    assert len(list(label_cache.iterdir())) == 1
    assert command_line(*command) == (0, expected, "")


def test_embeddings_of_a_tower_that_fell_back_are_kept_as_those_of_where_it_ran(
    colour_bundle: Path, label_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = msgspec.structs.replace(read_manifest(colour_bundle), target="tensorrt jetson-orin")
    write_manifest(colour_bundle, manifest)  # it has no engine yet
    encoder = load(colour_bundle)
    meant = encoder.text_key
    ZeroShotClassifier(encoder, ["red", "blue"])
    assert encoder.text_key == load(colour_bundle, device="cpu").text_key != meant
    (file,) = label_cache.iterdir()
    assert file.name == label_set_key(encoder.text_key, ["red", "blue"], manifest.templates)


def test_labels_that_this_processor_embeds_wrongly_are_not_cached(
    colour_bundle: Path, label_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_manifest(colour_bundle)
    text = msgspec.structs.replace(manifest.text, instruction_sets=("x86-64-vnni", "aarch64"))
    write_manifest(colour_bundle, msgspec.structs.replace(manifest, text=text))
    for lacking, cached in ((True, 0), (False, 1)):
        monkeypatch.setattr(
            "clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda lacking=lacking: lacking
        )
        ZeroShotClassifier(load(colour_bundle, force=True), ["red", "blue"])
        assert len(list(label_cache.glob("*"))) == cached
    monkeypatch.setattr("clip_rd_edge.runtime.backends.onnxruntime.processor_saturates", lambda: True)
    caplog.clear()
    ZeroShotClassifier(load(colour_bundle, force=True), ["red", "blue"])
    assert "gives wrong answers here" in caplog.text  # and not silently with what another processor has cached


def test_the_key_of_text_embeddings_depends_on_precision_runtime_and_device(colour_bundle: Path) -> None:
    from clip_rd_edge.runtime.backends.openvino import OpenVinoEncoder

    manifest = read_manifest(colour_bundle)
    bf16 = msgspec.structs.replace(manifest, text=msgspec.structs.replace(manifest.text, precision="bf16"))
    encoders = [
        load(colour_bundle, device="cpu"),
        OpenVinoEncoder(colour_bundle, manifest),
        OpenVinoEncoder(colour_bundle, bf16),
        OpenVinoEncoder(colour_bundle, bf16, processor="GPU"),
    ]
    assert len({encoder.text_key for encoder in encoders}) == 4
    assert load(colour_bundle, device="cpu").text_key == encoders[0].text_key
