"""Teachers from a classifier and a sentence encoder, with tiny random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from text_towers import bert_clip, roberta_clip
from torch import nn

import clip_rd_edge as edge
from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.models.classifiers import load_classifier, load_in_order
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.stitch import load_sentence_encoder, solve_projection
from clip_rd_edge.models.students import student_config
from clip_rd_edge.models.text_weights import build_with_text_tower_of

NAMES = ["a red gear", "a green bolt", "nut; a blue nut", "washer"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of sentence-transformers, of a random encoder with 24 dimensions."""
    folder = tmp_path_factory.mktemp("of bert") / "encoder"
    bert_clip(folder)
    return folder


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return path


def random_classifier(path: Path, model: torch.nn.Module) -> Path:
    """Save the weights of a classifier whose batch statistics are not those of a new model."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                value.copy_(torch.rand_like(value) + 0.5)
    torch.save(model.state_dict(), path)
    return path


def test_open_clip_alone_gives_the_same_embeddings(encoder: Path, names: Path, tmp_path: Path) -> None:
    weights = random_classifier(tmp_path / "w.pth", timm.create_model("test_resnet", num_classes=4))
    folder = edge.stitch(
        "test_resnet", tmp_path / "teacher", names=names, text=str(encoder), pretrained=weights, image_size=64
    )
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 70, 3), dtype=np.uint8))
    loaded = edge.load(folder)
    with torch.no_grad():
        pixels = preprocess(image)[None]
        assert pixels.shape == (1, 3, 64, 64)
        image_embedding = model.eval().encode_image(pixels, normalize=True)[0].numpy()
        text_embedding = model.encode_text(tokenizer(["a red cat"]), normalize=True)[0].numpy()
    np.testing.assert_allclose(loaded.encode_images(image), image_embedding, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_texts("a red cat"), text_embedding, atol=1e-5)
    classifier = load_classifier("test_resnet", pretrained=str(weights))
    weight = classifier.head.weight.detach()
    projected = classifier.features(pixels) @ solve_projection(weight, _class_embeddings(loaded)).T
    expected = torch.nn.functional.normalize(projected, dim=-1)[0].numpy()
    np.testing.assert_allclose(image_embedding, expected, atol=1e-4)
    assert model.logit_scale.exp().item() == pytest.approx(20)


def test_a_student_can_keep_a_text_tower_of_hugging_face(encoder: Path, names: Path, tmp_path: Path) -> None:
    weights = random_classifier(tmp_path / "w.pth", timm.create_model("test_resnet", num_classes=4))
    folder = edge.stitch("test_resnet", tmp_path / "teacher", names=names, text=str(encoder), pretrained=weights)
    teacher = load_clip(str(folder))
    config = student_config("test_vit", embedding_size=teacher.embedding_size, image_size=160, text="tiny")
    student = build_with_text_tower_of(teacher, config, name="student")
    save_clip(tmp_path / "student", student, provenance={})
    shutil.rmtree(folder)  # the student has all that it needs
    kept = edge.load(tmp_path / "student")
    expected = TorchEncoder(teacher).encode_texts(["a red cat", "a blue nut"])
    np.testing.assert_allclose(kept.encode_texts(["a red cat", "a blue nut"]), expected, atol=1e-5)


def _class_embeddings(model: edge.Model) -> torch.Tensor:
    means = [model.encode_texts([name.strip() for name in line.split(";")]).mean(axis=0) for line in NAMES]
    return torch.nn.functional.normalize(torch.from_numpy(np.stack(means)), dim=-1)


def test_the_projection_is_the_ridge_regression_from_names_to_weights() -> None:
    """That is least squares with rows √λ · 1 added, where λ is the ridge times the mean eigenvalue of TᵀT."""
    rng = np.random.default_rng(0)
    weight, names = rng.standard_normal((9, 5)), rng.standard_normal((9, 4)) * [1, 2, 3, 4] + 1
    w, t = weight - weight.mean(0), names - names.mean(0)
    penalty = np.sqrt(0.3 * np.linalg.eigvalsh(t.T @ t).mean()) * np.eye(4)
    expected = np.linalg.lstsq(np.vstack([t, penalty]), np.vstack([w, np.zeros((4, 5))]), rcond=None)[0]
    actual = solve_projection(torch.from_numpy(weight), torch.from_numpy(names), ridge=0.3)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_tensors_are_loaded_in_their_order_where_the_last_part_of_their_names_agrees() -> None:
    own, theirs = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    torch.manual_seed(0)
    published = {f"net.{name}": torch.randn(value.shape) for name, value in theirs.state_dict().items() if value.ndim}
    load_in_order(own, published, source="a file")  # without num_batches_tracked
    loaded = {f"net.{name}": value for name, value in own.state_dict().items() if value.ndim}
    assert all(torch.equal(loaded[name], published[name]) for name in published)
    order = list(published)
    order[2], order[3] = order[3], order[2]  # weight and bias of the norm, which have one shape
    for names in (order, list(published)[:-1]):
        with pytest.raises(ConfigError):
            load_in_order(own, {name: published[name] for name in names}, source="a file")


def test_images_are_prepared_as_the_weights_expect(encoder: Path, names: Path, tmp_path: Path) -> None:
    """Mean and size of these weights are not those of timm's default weights for the architecture."""
    spec = "tf_efficientnet_b0.ap_in1k"
    weights = random_classifier(tmp_path / "w.pth", timm.create_model("tf_efficientnet_b0", num_classes=4))
    classifier = load_classifier(spec, pretrained=str(weights))
    assert classifier.preprocessing.size == (224, 224)
    folder = edge.stitch(spec, tmp_path / "teacher", names=names, text=str(encoder), pretrained=weights, image_size=64)
    prepared = load_clip(str(folder)).preprocessing
    assert (prepared.size, prepared.mean[0]) == ((64, 64), 0.5)
    assert prepared.std == classifier.preprocessing.std


@pytest.mark.parametrize(
    ("content", "pooler"),
    [
        ({"pooling_mode": "mean"}, "mean_pooler"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls_last_hidden_state_pooler"),
        ({"pooling_mode": ["mean", "cls"]}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None),
    ],
)
def test_the_pooling_is_that_of_sentence_transformers_in_both_forms(
    content: dict[str, object], pooler: str | None, encoder: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoder, tmp_path / "encoder")
    (tmp_path / "encoder" / "1_Pooling").mkdir()
    file = tmp_path / "encoder" / "1_Pooling" / "config.json"
    file.write_text(json.dumps({"embedding_dimension": 24, "include_prompt": True, **content}))
    if pooler is None:
        with pytest.raises(ConfigError):
            load_sentence_encoder(str(tmp_path / "encoder"))
    else:
        assert load_sentence_encoder(str(tmp_path / "encoder")).text_cfg["hf_pooler_type"] == pooler


@pytest.mark.parametrize(("make", "positions"), [(bert_clip, 20), (roberta_clip, 18)])
def test_a_text_may_be_as_long_as_the_encoder_has_positions(make: Any, positions: int, tmp_path: Path) -> None:
    make(tmp_path / "encoder")  # with max_position_embeddings of 20, two of which are for padding in RoBERTa
    encoder = load_sentence_encoder(str(tmp_path / "encoder"), context_length=77)
    assert encoder.text_cfg["context_length"] == positions
    assert encoder.encode(["a red cat " * 20]).isfinite().all()


@pytest.mark.parametrize(
    ("file", "content"), [("config.json", '{"model_type": "of-next-year"}'), ("modules.json", '[{"name": "0"}]')]
)
def test_damaged_sentence_encoders_are_refused(file: str, content: str, encoder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(encoder, tmp_path / "broken")
    (broken / file).write_text(content)
    with pytest.raises((ConfigError, InputError)):
        load_sentence_encoder(str(broken))
