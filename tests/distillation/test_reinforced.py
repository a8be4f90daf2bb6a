"""Stores in MobileCLIP's format, made by hand from its documentation, are read and trained on."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from reinforced_shards import (
    AUGMENTATIONS,
    PAIRS,
    SIZE,
    SYNTHETIC,
    WIDTHS,
    augmentations,
    describe_teachers,
    units,
    write_shard,
)
from tiny_runs import tiny_run, weights
from torchvision.transforms import autoaugment

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.runs import read_metrics
from clip_rd_edge.data.load import load_pairs
from clip_rd_edge.data.order import View
from clip_rd_edge.data.webdataset import parse_sources
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.reinforced import (
    OPERATIONS,
    Reinforced,
    ReinforcedDataset,
    StoredTeachers,
    augment,
    read_sample,
)
from clip_rd_edge.distillation.run import run_distillation
from clip_rd_edge.errors import InputError
from clip_rd_edge.models.load import training_facts
from clip_rd_edge.utils.structs import read_json

PREPROCESSING = Preprocessing(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
Store = Callable[..., str]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Write a shard, with changes to the files of its samples, and return its path."""
    monkeypatch.setenv("CLIP_RD_EDGE_CACHE", str(tmp_path / "cache"))

    def write(kind: str = "first", change: Callable[[int, dict[str, bytes]], None] = lambda *_: None) -> str:
        return write_shard(tmp_path / f"{kind}.tar", kind, change)

    return write


@pytest.fixture
def teachers(tmp_path: Path) -> Path:
    return describe_teachers(tmp_path / "teachers.json")


@pytest.fixture
def stored(teachers: Path) -> StoredTeachers:
    return read_json(teachers, StoredTeachers)


def open_store(source: str) -> Reinforced:
    return Reinforced(source, parse_sources(source))


@pytest.mark.parametrize("kind", ["first", "second", "torch"])
def test_a_store_is_read_as_documented(kind: str, store: Store, stored: StoredTeachers) -> None:
    pairs = open_store(store(kind))
    assert (len(pairs), list(pairs.problems.examples)) == (PAIRS, [])
    for number in (0, 7):
        sample = read_sample(pairs, number, stored)
        assert [list(a[:4]) for a in sample.augmentations] == [crop for crop, _ in augmentations(number)]
        assert sample.augmentations[2].operations == ()
        expected = [(OPERATIONS[op], magnitude) for op, magnitude in augmentations(number)[0][1]]
        assert list(sample.augmentations[0].operations) == expected
        assert list(sample.own) == [(f"own {number}", 0)]
        assert list(sample.synthetic) == [(f"synthetic {number} 0", 1), (f"synthetic {number} 1", 2)]
        tolerance = 2**-8 if kind == "torch" else 2**-11  # bfloat16, float16
        np.testing.assert_allclose(sample.image_embeddings, units(AUGMENTATIONS, number), atol=tolerance)
        np.testing.assert_allclose(sample.text_embeddings, units(1 + SYNTHETIC, 100 + number), atol=tolerance)


@pytest.mark.parametrize("keys", [("syn_text", "long_text"), ("long_text", "syn_text")])
def test_each_caption_has_its_own_embedding_in_whatever_order_the_keys_come(
    keys: tuple[str, str], store: Store, stored: StoredTeachers
) -> None:
    texts = units(1 + SYNTHETIC, 1), units(3, 2)  # of the own and of syn_text in one array, and of long_text
    captions = {"syn_text": ["a", "b"], "long_text": ["c", "d", "e"]}

    def change(_: int, files: dict[str, bytes]) -> None:
        files["npz"] = npz(image_emb=units(AUGMENTATIONS, 0), text_emb=texts[0], long_text_emb=texts[1])
        files["syn.json"] = json.dumps({key: captions[key] for key in keys}).encode()

    sample = read_sample(open_store(store(change=change)), 0, stored)
    expected = dict(zip(["own 0", "a", "b", "c", "d", "e"], np.concatenate(texts), strict=True))
    assert {caption for caption, _ in [*sample.own, *sample.synthetic]} == set(expected)
    for caption, row in [*sample.own, *sample.synthetic]:
        np.testing.assert_allclose(sample.text_embeddings[row], expected[caption], atol=2**-11)


@pytest.mark.parametrize("apart", [True, False])
def test_a_blank_caption_leaves_those_after_it_their_embeddings(
    store: Store, stored: StoredTeachers, *, apart: bool
) -> None:
    texts = units(4, 1)
    arrays = {"text_emb": texts[:1], "syn_text_emb": texts[1:]} if apart else {"text_emb": texts}

    def change(_: int, files: dict[str, bytes]) -> None:
        files["npz"] = npz(image_emb=units(AUGMENTATIONS, 0), **arrays)
        files["syn.json"] = json.dumps({"syn_text": ["a", " \n", " b"]}).encode()

    sample = read_sample(open_store(store(change=change)), 0, stored)
    assert [caption for caption, _ in sample.synthetic] == ["a", "b"]
    for (_, row), expected in zip([*sample.own, *sample.synthetic], texts[[0, 1, 3]], strict=True):
        np.testing.assert_allclose(sample.text_embeddings[row], expected, atol=2**-11)


def test_shards_without_reinforcements_are_left_out_and_usable_as_others(store: Store) -> None:
    def change(number: int, files: dict[str, bytes]) -> None:
        files.pop("npz" if number == 3 else "paug.json" if number == 4 else "syn.json" if number == 5 else "url.txt")

    source = store(change=change)
    pairs = open_store(source)
    assert len(pairs) == PAIRS - 2
    assert "0003 has no embeddings (.npz, .pth.gz)" in pairs.problems.examples[0]
    assert "0004 has no augmentations (.paug.json)" in pairs.problems.examples[1]
    assert pairs.synthetic_captions(3) == {}
    assert len(load_pairs(source)) == PAIRS


def test_operations_have_the_numbers_of_torchvision() -> None:
    assert tuple(autoaugment.RandAugment()._augmentation_space(31, (SIZE, SIZE))) == OPERATIONS


def dataset(pairs: Reinforced, stored: StoredTeachers, size: int = 32) -> ReinforcedDataset:
    preprocessing = msgspec.structs.replace(PREPROCESSING, size=(size, size))
    return ReinforcedDataset(pairs, stored, preprocessing, seed=0, views=0, max_bad=0.1)


def test_a_view_joins_an_augmentation_and_a_caption_with_their_own_embeddings(
    store: Store, stored: StoredTeachers
) -> None:
    pairs = open_store(store())
    views = dataset(pairs, stored, SIZE)
    kinds = {"own": 0, "synthetic": 0}
    numbers = set()
    for epoch in range(60):
        view = views[View(epoch, 2)]
        sample = read_sample(pairs, 2, stored)
        assert view.teacher_embeddings is not None
        image, text = view.teacher_embeddings
        (number,) = np.flatnonzero((sample.image_embeddings == image).all(axis=1))
        shown = augment(pairs.read(2).image(), sample.augmentations[number], size=SIZE)
        assert np.array_equal(view.student_pixels, np.asarray(shown))
        row = dict([*sample.own, *sample.synthetic])[view.caption]
        assert np.array_equal(text, sample.text_embeddings[row])
        kinds[view.caption.split()[0]] += 1
        numbers.add(int(number))
    assert numbers == {0, 1, 2}
    assert min(kinds.values()) > 15  # each kind about half of the time
    assert views[View(3, 2)].caption == views[View(3, 2)].caption
    assert dataset(pairs, stored)[View(0, 0)].student_pixels.shape == (32, 32, 3)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/clip-rd-edge-was-run"),)


def malicious() -> bytes:
    content = io.BytesIO()
    torch.save({"image_emb": Malicious(), "text_emb": 0}, content)
    return gzip.compress(content.getvalue())


def npz(**arrays: Any) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("pth.gz", malicious()),
        ("pth.gz", b"no gzip"),
        ("npz", b"no zip"),
        ("npz", npz(image_emb=np.array(["a"]), text_emb=np.zeros(1))),
        ("npz", npz(image_emb=np.array([object()]), text_emb=np.zeros(1))),
        ("npz", npz(image_emb=units(3, 0))),
        ("npz", npz(image_emb=units(3, 0), text_emb=units(2, 0))),
        ("npz", npz(image_emb=0 * units(3, 0), text_emb=units(3, 0))),
        ("npz", npz(image_emb=units(3, 0), text_emb=units(3, 0)[:, :4])),
        ("npz", npz(image_emb=units(3, 0), text_emb=units(1, 0), syn_text_emb=units(1, 0))),
        ("paug.json", b'{"param_aug": [[[0, 0, 9, 9], [[77, 0.5]]]]}'),
        ("paug.json", b'{"param_aug": [[[0, 0, 9, 1e400], null]]}'),
        ("paug.json", b'{"param_aug": []}'),
        ("paug.json", b'{"param_aug": [[[0, 0, 9, 9], [[5, NaN]]]]}'),
        ("syn.json", b'{"syn_text": [3]}'),
        ("syn.json", rb'{"syn_text": ["\ud83d"]}'),
    ],
)
def test_damaged_and_dangerous_samples_are_refused(
    suffix: str, content: bytes, store: Store, stored: StoredTeachers
) -> None:
    def change(number: int, files: dict[str, bytes]) -> None:
        if suffix == "pth.gz":
            files.pop("npz")
        files[suffix] = content

    with pytest.raises(InputError):
        read_sample(open_store(store(change=change)), 0, stored)
    assert not Path("/tmp/clip-rd-edge-was-run").exists()


def test_what_would_unpack_to_too_much_is_refused(
    store: Store, stored: StoredTeachers, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = np.zeros((3, 4_000), np.float32)
    packed = io.BytesIO()
    np.savez_compressed(packed, image_emb=zeros, text_emb=zeros)
    contents = {"first": ("npz", packed.getvalue()), "torch": ("pth.gz", gzip.compress(zeros.tobytes()))}
    for kind, (suffix, content) in contents.items():
        pairs = open_store(store(kind, change=lambda _, files: files.update({suffix: content})))  # noqa: B023
        for limit, message in ((20_000, "it would take|the limit is"), (10, "the limit is 10")):
            monkeypatch.setattr("clip_rd_edge.distillation.reinforced._MAX_BYTES", limit)
            with pytest.raises(InputError, match=message):
                read_sample(pairs, 0, stored)


@pytest.fixture
def config(teachers: Path) -> RunConfig:
    recipe = {"steps": 6, "batch_size": 4, "bank_size": 8}
    return tiny_run("clip-rd-bank", recipe, teacher=f"stored:{teachers}", data="unset.tar", checkpoint_every=2)


def test_a_student_is_trained_on_a_store(config: RunConfig, store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_distillation(msgspec.structs.replace(config, data=store("torch")), run, resume=False)
    assert weights(run / "student")["visual.head.proj.weight"].shape[0] == sum(WIDTHS)
    assert all(line["loss/hrd"] > 0 and line["loss/bank"] > 0 for line in read_metrics(run))
    assert training_facts(str(run / "student"))["teacher"] == "teacher-0, teacher-1"
