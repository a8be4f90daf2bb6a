from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from clip_rd_edge.bundle import labels as label_bank
from clip_rd_edge.bundle.labels import (
    LabelBank,
    LabelPrecision,
    Templates,
    imagenet_templates,
    parse_templates,
    read_labels,
    write_labels,
)
from clip_rd_edge.bundle.manifest import LABELS
from clip_rd_edge.errors import ConfigError, InputError

NAMES = ("naïve café", "猫", *map(str, range(48)))


@pytest.mark.parametrize(("precision", "error"), [("fp32", 0), ("fp16", 5e-4), ("int8", 0.6 / 127)])
def test_a_label_bank_keeps_names_and_embeddings(tmp_path: Path, precision: LabelPrecision, error: float) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    rows *= np.geomspace(1, 0.01, 50)[:, None].astype(np.float32)  # very different norms
    rows[-1] = 0
    write_labels(tmp_path, LabelBank(NAMES, rows), precision=precision)
    bank = read_labels(tmp_path)
    assert bank is not None
    assert bank.names == NAMES
    assert bank.embeddings.dtype == np.float32
    assert (np.abs(bank.embeddings - rows) <= error * np.abs(rows).max(axis=1, keepdims=True)).all()
    norms = [np.linalg.norm(matrix, axis=1) for matrix in (bank.embeddings, rows)]
    np.testing.assert_allclose(*norms, rtol=2e-4 if precision == "fp16" else 1e-6)


@pytest.mark.parametrize(
    "arrays",
    [
        {"names": np.asarray(["a"])},
        {"names": np.asarray(["a"]), "levels": np.zeros((1, 2), np.int8)},
        {"names": np.asarray(["a"]), "levels": np.zeros((1, 2), np.int8), "scales": np.zeros((2, 1), np.float32)},
        {"names": np.asarray(["a"]), "levels": np.zeros((1, 2), np.int8), "scales": np.asarray([["a"]])},
        {"names": np.asarray(["a"]), "embeddings": np.zeros((2, 2))},
        {"names": np.asarray(["a"]), "embeddings": np.full((1, 2), np.nan)},
        {"names": np.asarray([], str), "embeddings": np.zeros((0, 2))},
    ],
)
def test_a_damaged_label_bank_is_refused(tmp_path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    np.savez(tmp_path / LABELS, **arrays)
    with pytest.raises(ConfigError, match=r"labels\.npz"):
        read_labels(tmp_path)


@pytest.mark.parametrize("names", [["a"] * 17, ["a"] * 15 + ["b" * 20]])
def test_labels_that_no_reader_would_open_are_refused(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_bank, "MAX_BYTES", 16 * 16 * 4)
    with pytest.raises(InputError):
        label_bank.require_readable(names, 16, "fp32")
    label_bank.require_readable(["a"] * 16, 16, "fp32")
    label_bank.require_readable(["a"] * 16, 4 * 16, "int8")
    with pytest.raises(InputError):
        label_bank.require_readable(["a"] * 17, 2 * 16, "fp16")


def test_clips_templates_are_those_of_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    assert imagenet_templates().prompts == tuple(fill("{}") for fill in open_clip.OPENAI_IMAGENET_TEMPLATES)


def test_templates_are_given_as_they_are_by_name_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a {c}\n\nthe {}\n")
    assert parse_templates(["imagenet"]) is imagenet_templates()
    assert parse_templates(["{}", str(file)]) == Templates(("{}", "a {c}", "the {}"), "given")
    assert parse_templates(["{}", "imagenet"]).prompts == ("{}", *imagenet_templates().prompts)


@pytest.mark.parametrize("word", ["imagnet", "templatez.txt", "templates.txt", "empty.txt"])
def test_what_is_no_template_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    (tmp_path / "templates.txt").write_text("a {}\nthe\n")
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        parse_templates([word])
