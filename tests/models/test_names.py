"""One rule for the names of models, seen against a hub on the loopback that serves random weights under real names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save_file
from support import save_tiny_teacher, tiny_clip
from text_towers import WORDS

import clip_rd_edge as edge
from benchmarks.devices.published import loopback_hub, write_tokenizer
from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.models.load import known_config, load_clip, save_clip
from clip_rd_edge.models.names import ModelName, architectures, is_trained, parse_name
from clip_rd_edge.utils.paths import typed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run, a bundle, a JSON file, and folders that are named as a preset and with an @."""
    monkeypatch.chdir(tmp_path)
    for name in ("run/student", "odd@name"):
        save_clip(tmp_path / name, tiny_clip(), provenance={})
    for name in ("bundle", "resnet18"):
        (tmp_path / name).mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "own.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected", "trained"),
    [
        ("run", ("folder", "run/student"), True),
        ("local-dir:run/student", ("folder", "run/student"), True),
        ("odd@name", ("folder", "odd@name"), True),
        ("local-dir:nowhere", ("folder", "nowhere"), True),
        ("bundle", ("bundle", "bundle"), True),
        ("hf-hub:org/repo@main", ("hub", "hf-hub:org/repo@main"), True),
        ("MobileCLIP2-S0@dfndr2b", ("open_clip", "MobileCLIP2-S0", "dfndr2b"), True),
        ("open_clip:ViT-B-32@w/a@b.pt", ("open_clip", "ViT-B-32", "w/a@b.pt"), True),
        ("open_clip:ViT-B-32", ("open_clip", "ViT-B-32"), False),
        ("resnet18", ("preset", "resnet18"), False),
        ("own.json", ("file", "own.json"), False),
        ("other.json", ("trunk", "other.json"), False),
        ("convnext_base", ("trunk", "convnext_base"), False),  # of timm and of open_clip
        ("", ("trunk", ""), False),
    ],
)
def test_what_a_name_means(text: str, expected: tuple[str, ...], trained: bool, folder: Path) -> None:
    assert parse_name(text) == ModelName(*expected)  # type: ignore[arg-type]
    assert is_trained(text) == trained
    if trained:
        with pytest.raises(UsageError):
            parse_name(text, weights="best.pt")
    else:
        assert parse_name(text, weights="best.pt").weights == "best.pt"


def test_the_names_of_architectures_are_open_clips() -> None:
    assert {*architectures()} == {*open_clip.list_models()}


@pytest.mark.parametrize(
    "name", ["resnet18", "own.json", "bundle", "ViT-B-32", "ViT-B-32@nonsense", "mobilenetv3_small_050"]
)
def test_what_has_no_weights_is_refused_where_they_are_needed(name: str, folder: Path) -> None:
    for load in (load_clip, known_config):
        with pytest.raises((InputError, ConfigError)) as refusal:
            load(typed(name))
        assert "\n" not in str(refusal.value)
        if name.startswith("ViT-B-32"):
            assert "ViT-B-32@TAG, of openai" in refusal.value.hint


def test_a_file_of_weights_has_images_prepared_as_for_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = tiny_architecture()
    del config["text_cfg"]["hf_tokenizer_name"]
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    seen = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"one": seen, "two": seen})
    name = typed(f"tiny@{tmp_path / 'weights.safetensors'}")
    preprocessing = load_clip(name).preprocessing
    assert (preprocessing.mean, preprocessing.std) == ((0, 0, 0), (1, 1, 1))
    assert (preprocessing.interpolation, preprocessing.resize_mode) == ("bilinear", "squash")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"one": seen, "two": {**seen, "std": (2, 2, 2)}})
    assert load_clip(name).preprocessing.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


def test_a_text_tower_at_the_top_level_can_be_loaded_apart_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = tiny_architecture()
    del config["custom_text"], config["text_cfg"]["hf_tokenizer_name"]
    config["text_cfg"]["vocab_size"] = 49408
    torch.manual_seed(1)
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "plain", config)
    student = load_clip(typed(f"plain@{tmp_path / 'weights.safetensors'}"), separate_text=True)
    assert hasattr(student.model, "text")
    save_clip(tmp_path / "student", student, provenance={})
    pixels = torch.randn(2, 3, 16, 16)
    for clip in (student, load_clip(typed(tmp_path / "student"))):
        ids = clip.tokenizer(["a cat", "two"])
        with torch.no_grad():
            torch.testing.assert_close(clip.model.encode_text(ids), model.encode_text(ids))  # type: ignore[operator]
            torch.testing.assert_close(clip.model.encode_image(pixels), model.encode_image(pixels))  # type: ignore[operator]


def tiny_architecture() -> tuple[torch.nn.Module, dict[str, Any]]:
    """An architecture whose text tower reads the tokens of a repository of the hub, with random weights."""
    config: dict[str, Any] = {
        "embed_dim": 16, "custom_text": True,
        "vision_cfg": {"layers": 1, "width": 64, "head_width": 64, "patch_size": 8, "image_size": 16},
        "text_cfg": {
            "context_length": 8, "vocab_size": len(WORDS) + 5, "width": 64, "heads": 1, "layers": 1,
            "hf_tokenizer_name": "timm/tiny-OpenCLIP", "no_causal_mask": True, "pool_type": "last",
        },
    }  # fmt: skip
    torch.manual_seed(0)
    return open_clip.CustomTextCLIP(**{key: value for key, value in config.items() if key != "custom_text"}), config


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a hub with the repository timm/tiny-OpenCLIP, and that repository's folder."""
    files = tmp_path / "hub"
    files.mkdir()
    write_tokenizer(files, WORDS)
    model, config = tiny_architecture()
    save_file(model.state_dict(), files / "open_clip_model.safetensors")
    preprocess_cfg = {"mean": [0.1] * 3, "std": [0.9] * 3, "resize_mode": "squash", "size": 16}
    (files / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess_cfg}))
    with loopback_hub(files) as address:
        yield address, files


def test_a_published_model_is_fine_tuned_exported_and_loaded_from_the_hub(
    hub: tuple[str, Path], pairs_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer, preprocessing and context come along, and differ from the teacher's."""
    address, files = hub
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", tiny_architecture()[1])
    seen = {"mean": (0.1,) * 3, "std": (0.9,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    tags = {"random": {"hf_hub": "timm/tiny-OpenCLIP/", **seen}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    texts = ["red cat", "a dog", "tree"]
    model, of_hub = edge.load("tiny@random"), edge.load("hf-hub:timm/tiny-OpenCLIP")
    rows = model.encode_texts(texts)
    np.testing.assert_allclose(of_hub.encode_texts(texts), rows, atol=1e-6)
    assert of_hub.describe().preprocessing == model.describe().preprocessing
    bundle = edge.export("hf-hub:timm/tiny-OpenCLIP", tmp_path / "bundle")
    np.testing.assert_allclose(edge.load(bundle).encode_texts(texts), rows, atol=1e-4)
    run = edge.distill(
        data=pairs_csv, student="tiny@random", teacher=str(save_tiny_teacher(tmp_path / "teacher")),
        output=tmp_path / "run", steps=1, batch_size=6, precision="fp32", workers=0, learning_rate=1e-9,
    )  # fmt: skip
    tuned = edge.load(run)
    np.testing.assert_allclose(tuned.encode_texts(texts), rows, atol=1e-3)
    assert tuned.describe().preprocessing == model.describe().preprocessing
    assert (tmp_path / "run" / "student" / "tokenizer.json").is_file()
    student, start = (load_file(path / "open_clip_model.safetensors") for path in (tmp_path / "run" / "student", files))
    assert student.keys() == start.keys()
