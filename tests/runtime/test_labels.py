from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image
from support import VNNI_ALONE, rewrite

from clip_rd_edge.bundle.labels import read_labels
from clip_rd_edge.bundle.manifest import LABELS, read_manifest
from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.runtime import labels as labels_module
from clip_rd_edge.runtime.backends.openvino import OpenVinoEncoder
from clip_rd_edge.runtime.classifier import ZeroShotClassifier
from clip_rd_edge.runtime.encoder import BundleEncoder, RunOptions
from clip_rd_edge.runtime.labels import (
    everyday_labels,
    label_names,
    parse_labels,
    read_labels_file,
    read_texts,
    write_label_bank,
)
from clip_rd_edge.runtime.load import load

# Name and content of a label file; each holds the labels "a pig" and "a dog, asleep".
FILES = {
    "labels.txt": "# animals\na pig\n\n#\n  a dog, asleep \n",
    "labels": "\ufeffa pig\r\na dog, asleep\r\n",
    "labels.csv": 'label,count\na pig,3\n"a dog, asleep",4\na pig,5\n',
    "semicolon.csv": "id;Class_Name\n7;a pig\n8;a dog, asleep\n",
    "excel.csv": "\ufeffsep=;\r\nid;label\r\n7;a pig\r\n8;a dog, asleep\r\n",
    "one column.csv": 'a pig\n"a dog, asleep"\n',
    "numbered.csv": 'label,count,class_name\n0,3,a pig\n1,4,"a dog, asleep"\n',
    "labels.tsv": "id\tname\n7\ta pig\n8\ta dog, asleep\n",
    "list.json": '["a pig", "a dog, asleep"]',
    "object.json": '{"version": 1, "labels": ["a pig", "a dog, asleep"]}',
    "id2label.json": '{"id2label": {"10": "a dog, asleep", "2": "a pig"}}',
    "imagenet.json": '{"0": ["n02395406", "a pig"], "1": ["n02084071", "a dog, asleep"]}',
    "coco.json": '{"classes": [{"id": 1, "name": "a pig"}, {"id": 2, "name": "a dog, asleep"}]}',
    "lines.jsonl": '{"id": 7, "Name": "a pig"}\n\n{"id": 8, "Name": "a dog, asleep"}\n',
    "lines.ndjson": '"a pig"\r\n"a dog, asleep"\r\n',
    "yolo.yaml": "path: data\nnames:\n  0: a pig\n  1: a dog, asleep\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_label_file_is_read_by_what_it_is(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    labels = ["a pig", "a dog, asleep"]
    assert parse_labels([str(tmp_path / name)]) == labels
    assert label_names(tmp_path / name) == label_names(str(tmp_path / name)) == labels
    monkeypatch.chdir(tmp_path)
    assert parse_labels(["a cat", f"./{name}", "a cow"]) == ["a cat", *labels, "a cow"]


@pytest.mark.parametrize(
    ("name", "content", "column", "expected"),
    [
        ("pairs.json", '{"name": ["1.jpg", "2.jpg"], "Caption": ["a pig", "b"]}', "Caption", ["a pig", "b"]),
        (
            "table.csv",
            'a,title,"label\n"\n1,"b, c\n\non d, red,\nand e\n",x\n2,f,x',
            "title",
            ["b, c\n\non d, red,\nand e", "f"],
        ),
    ],
)
def test_captions_come_from_the_column_or_key_that_is_asked_for(
    tmp_path: Path, name: str, content: str, column: str, expected: list[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert read_texts(str(tmp_path / name), column) == expected


def test_everyday_is_a_list_of_labels_unless_a_file_has_this_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    everyday = everyday_labels()
    assert label_names("everyday") == parse_labels(["everyday"]) == everyday
    assert len(everyday) == len(set(everyday)) > 200
    assert parse_labels(["everyday", "a torch"]) == [*everyday, "a torch"]
    (tmp_path / "mine.txt").write_text("special\neveryday\n")
    assert parse_labels(["mine.txt", "everyday"]) == ["special", "everyday", *everyday]
    (tmp_path / "everyday").write_text("a pig\n")
    assert parse_labels(["everyday"]) == ["a pig"]


@pytest.mark.parametrize(
    "words",
    [
        ["labelz.txt"], ["a pig", "labelz.txt"], ["labels.tx"], ["./labels"], ["sub/labels.tx"], ["~/no-such-labels"],
        ["C:\\data\\labels"], ["sub/"], ["a pig", "photo.jpg"], ["pig,dog,boat"], ["pig, dog"], ["pig;dog"],
        ["pig|dog"], ["pig\ndog"], ['["pig", "a dog"]'], ["a cat", "['pig']"], ["pig,", "dog,", "boat"],
        ["a cat", "pig,dog"],
    ],
)  # fmt: skip
def test_a_word_that_is_probably_no_label_is_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("labels.txt", "sub/labels.txt", "dog"):
        (tmp_path / name).write_text("a pig\n")
    Image.new("RGB", (9, 9)).save("photo.jpg")
    with pytest.raises(InputError) as raised:
        parse_labels(words)
    assert raised.value.hint
    assert parse_labels(["a pig", "dog"]) == ["a pig", "dog"]


@pytest.mark.parametrize(
    "words",
    [
        ["a pig"], ["a dog, asleep", "a dog, awake"], ["1,000 metres"], ["[unknown]", "{}"], ["~100 people"],
        ["black/white", "U.S.A.", "node.js", "St. Bernard", "#1", "church/indoor", "?", "a" * 5000],
    ],
)  # fmt: skip
def test_unusual_labels_are_taken_as_they_are(words: list[str], tmp_path: Path) -> None:
    assert parse_labels(words) == words
    (tmp_path / "labels.txt").write_text(" a dog \n")  # but for white space around them
    assert parse_labels([" a cat", "a cat ", str(tmp_path / "labels.txt")]) == ["a cat", "a cat", "a dog"]


def test_a_list_in_python_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("not for clients\n")
    labels = ["pig,dog", str(tmp_path / "secret.txt"), "no/such.txt", "everyday"]
    assert label_names(labels) == label_names(tuple(labels)) == label_names(np.array(labels)) == labels
    assert label_names("a pig") == ["a pig"]
    assert label_names(()) == []
    assert label_names(None) is parse_labels([]) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", "# nothing\n"), ("latin.txt", "caf\xe9"), ("utf-16.txt", "\xff\xfea\0\n\0"),
        ("line.txt", "pig, dog, boat\n"), ("lists.txt", "['a pig', 'two pigs']\na cat\n"),
        ("lists.csv", 'file,label\n1.jpg,"[""a pig""]"\n'), ("table.csv", "labl,count\npig,3\n"),
        ("tabs.csv", "id\tlabl\n7\tpig\n"), ("commas.csv", "label\npig\ndog, asleep\n"),
        ("of R.csv", '"label"\n"1","pig"\n'), ("unnamed.csv", "bear\nbear, brown\n"),
        ("lines.csv", 'label\n"a cat\non a mat"\n'),
        ("excel.csv", 'sep=;\nlabel\n"a pig'), ("excel.csv", "sep=;\nlabel;id\npig;1;dog\n"),
        ("sheet.xlsx", "PK\x03\x04\x14\0\xff"), ("labels.txt.gz", "\x1f\x8b\x08"), ("empty.csv", ""),
        ("broken.json", '["a pig",'), ("number.json", "[1, 2]"), ("object.json", '{"a": 1}'),
        ("captions.json", '[["a pig", "two pigs", "pigs"]]'), ("synonyms.json", '{"0": ["tench", "Tinca tinca"]}'),
        ("broken.jsonl", '"a pig"\n"a dog\n'), ("broken.yaml", "names: ["), ("missing.txt", None), ("folder", None),
        ("large.txt", "a" * (1 << 24) + "a"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_an_unreadable_label_file_is_refused(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="latin-1")
    (tmp_path / "folder").mkdir()
    with pytest.raises((InputError, ConfigError)) as raised:
        read_labels_file(tmp_path / name)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("tower", "array", "dtype"),
    [
        ("fp32", "embeddings", np.float32),
        ("bf16", "embeddings", np.float16),
        ("int8 dynamic with token embeddings, per-channel", "levels", np.int8),
    ],
)
def test_a_label_bank_is_stored_in_the_precision_of_the_text_tower(
    colour_bundle: Path, tower: str, array: str, dtype: type
) -> None:
    write_label_bank(colour_bundle, rewrite(colour_bundle, text={"precision": tower}), ["red", "blue", "red"])
    with np.load(colour_bundle / LABELS) as arrays:
        assert arrays[array].dtype == dtype
    bank = read_labels(colour_bundle)
    assert bank is not None
    assert bank.names == ("red", "blue")
    np.testing.assert_allclose(bank.embeddings, load(colour_bundle).encode_texts(["red", "blue"]), atol=0.5 / 127)


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
        rewrite(colour_bundle)
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


def test_a_cache_that_cannot_be_written_is_ignored(colour_bundle: Path, label_cache: Path) -> None:
    label_cache.parent.mkdir(parents=True, exist_ok=True)
    label_cache.write_text("in the way")
    assert classifier(colour_bundle).classify(NOISE)


def test_labels_that_this_processor_embeds_wrongly_are_not_cached(
    colour_bundle: Path, label_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(colour_bundle, text=VNNI_ALONE)
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


def test_the_key_of_text_embeddings_depends_on_precision_runtime_and_device(
    colour_bundle: Path,
) -> None:
    manifest = read_manifest(colour_bundle)
    bf16 = msgspec.structs.replace(manifest, text=msgspec.structs.replace(manifest.text, precision="bf16"))
    encoders = [
        load(colour_bundle, device="cpu"),
        OpenVinoEncoder(colour_bundle, manifest),
        OpenVinoEncoder(colour_bundle, bf16),
        OpenVinoEncoder(colour_bundle, bf16, RunOptions(device="openvino-gpu")),
    ]
    assert len({encoder.text_key for encoder in encoders}) == 4
    assert load(colour_bundle, device="cpu").text_key == encoders[0].text_key
