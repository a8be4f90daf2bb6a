"""The probabilities of a model of SigLIP's kind are open_clip's sigmoid(scale · x · y + bias), everywhere."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.special import expit
from text_towers import siglip_clip

import clip_rd_edge as edge
from clip_rd_edge.benchmarking.accuracy import zero_shot
from clip_rd_edge.bundle.encoder import Calibration, Scoring, usual_limit
from clip_rd_edge.bundle.manifest import MANIFEST, read_manifest
from clip_rd_edge.data.tasks import ZeroShotTask
from clip_rd_edge.errors import ConfigError, NotFiniteError
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load
from clip_rd_edge.serving.demo import ServedBundle
from clip_rd_edge.serving.protocol import PageLabels

LABELS = ["a cat", "two dogs, a red car and a blue sky", "zebra"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with a sigmoid, whose probabilities are neither all 0 nor all 1."""
    folder = tmp_path_factory.mktemp("siglip") / "model"
    save_clip(folder, siglip_clip(), provenance={})
    return folder


@pytest.fixture(scope="module")
def bundle(siglip: Path) -> Path:
    return Path(edge.export(siglip, siglip.parent / "bundle"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def expected(siglip: Path, photo: Path) -> dict[str, float]:
    """By label, from open_clip alone."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{siglip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{siglip}")
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(Image.open(photo).convert("RGB"))[None], normalize=True)
        text = model.encode_text(tokenizer(LABELS), normalize=True)
        rows = torch.sigmoid(model.logit_scale.exp() * image @ text.T + model.logit_bias)[0].tolist()
    assert 0.01 < min(rows) < 0.5 < max(rows) < 0.99
    return dict(zip(LABELS, rows, strict=True))


@pytest.mark.parametrize("kind", ["model", "bundle"])
@pytest.mark.parametrize("labels", [LABELS, LABELS[2:]])
def test_python_and_the_command_line(
    kind: str, labels: list[str], siglip: Path, bundle: Path, photo: Path, expected: dict[str, float], command_line: Any
) -> None:
    answer = edge.load(siglip if kind == "model" else bundle).classify(photo, labels, cache=False)
    assert dict(answer) == pytest.approx({label: expected[label] for label in labels}, abs=1e-5)
    if kind == "bundle":
        code, output, error = command_line("classify", bundle, photo, "--json", "--labels", *labels)
        record = json.loads(output)
        assert (code, "cosine" in record, "single label" in error) == (0, False, False)
        shown = {row["label"]: row["probability"] for row in record["predictions"]}
        assert shown == pytest.approx({label: expected[label] for label in labels}, abs=1e-5)


def test_a_label_by_itself_has_the_probability_of_the_sigmoid(
    bundle: Path, photo: Path, expected: dict[str, float]
) -> None:
    assert dict(edge.load(bundle).classify(photo, LABELS, multi=True, cache=False)) == pytest.approx(expected, abs=1e-5)


def test_the_server_and_the_demo(bundle: Path, photo: Path, expected: dict[str, float]) -> None:
    testclient = pytest.importorskip("starlette.testclient")
    from clip_rd_edge.serving.service import Service, make_app

    image = f"data:image/png;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    with testclient.TestClient(make_app(Service(load(bundle))), base_url="http://127.0.0.1:8766") as client:
        rows = client.post("/classify", json={"image": image, "labels": LABELS}).json()["predictions"]
    assert {row["label"]: row["probability"] for row in rows} == pytest.approx(expected, abs=1e-5)
    shown = asyncio.run(ServedBundle(bundle).classify(photo.read_bytes(), PageLabels(LABELS)))
    assert dict(zip(shown["labels"], shown["probabilities"], strict=True)) == pytest.approx(expected, abs=1e-5)


def test_an_evaluation(siglip: Path, photo: Path, expected: dict[str, float]) -> None:
    task = ZeroShotTask(name="task", images=(photo,), targets=(0,), labels=tuple(LABELS))
    answers = zero_shot(edge.load(siglip).encoder, task)
    assert answers.probabilities == pytest.approx([max(expected.values())], abs=1e-5)


def test_the_graph_of_both_towers_and_its_configuration(siglip: Path, photo: Path, expected: dict[str, float]) -> None:
    folder = Path(edge.export(siglip, siglip.parent / "hub", layout="huggingface"))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "siglip"
    assert "SiglipTextModel.from_pretrained" in (folder / "README.md").read_text()
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    feeds = {
        "pixel_values": preprocess(Image.open(photo).convert("RGB"))[None].numpy(),
        "input_ids": open_clip.get_tokenizer(f"local-dir:{folder}")(LABELS).numpy(),
    }
    logits, transposed, *_ = open_session(str(folder / "onnx" / "model.onnx")).run(None, feeds)
    assert expit(logits[0]) == pytest.approx([expected[label] for label in LABELS], abs=1e-5)
    assert np.array_equal(transposed, logits.T)


def test_only_a_bias_changes_the_manifest_and_unknown_features_are_refused(bundle: Path, colour_bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.format_version, json.loads((bundle / MANIFEST).read_text())["features"]) == (
        3,
        {"logit_bias": pytest.approx(manifest.scoring.bias)},
    )
    assert manifest.without_text().format_version == 3
    assert "features" not in json.loads((colour_bundle / MANIFEST).read_text())
    raw = json.loads((bundle / MANIFEST).read_text())
    for features in ({"unheard_of": 2.0}, {"logit_bias": 1e300}):
        (colour_bundle / MANIFEST).write_text(json.dumps({**raw, "features": features}))
        with pytest.raises(ConfigError):
            read_manifest(colour_bundle)


@pytest.mark.parametrize("bias", [None, -3.5])
def test_probabilities_are_those_of_the_formulas_in_float64(bias: float | None) -> None:
    rng = np.random.default_rng(0)
    images, labels = (rng.standard_normal((count, 8)).astype(np.float32) for count in (5, 7))
    logits = 12.0 * images.astype(np.float64) @ labels.T.astype(np.float64)
    expected = expit(logits + bias) if bias is not None else np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    actual = Scoring(12.0, bias).probabilities(images, labels)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert actual.dtype == np.float32
    extremes = Scoring(1e6, bias).probabilities(np.eye(2, dtype=np.float32), np.array([[1, -1]], np.float32))
    assert np.isfinite(extremes).all()  # and no warning of an overflow
    with pytest.raises(NotFiniteError):
        Scoring(1.0, bias).probabilities(images * np.nan, labels)


@pytest.mark.parametrize("labels", [1, 20, 300])
def test_at_most_the_stated_share_of_known_images_is_refused(labels: int) -> None:
    """Over many calibrations of 100 pairs; other labels match an image as nothing of theirs, some of them well."""
    rng, share = np.random.default_rng(0), []
    for _ in range(200):
        own, others = rng.normal(4, 2, 200), rng.normal(0, 1.5, (200, labels)).max(axis=1)
        calibration = Calibration(slope=1.0, intercept=-3.0, curve=tuple(own[:100]))
        limit = calibration.limit(others[:100].astype(np.float32), 0.05)
        share.append(float((np.maximum(own, others)[100:] < limit).mean()))
    assert 0.03 < np.mean(share) < 0.05 + 3 * np.std(share) / 200**0.5


def test_a_match_is_the_log_of_how_much_likelier_a_label_is_than_a_noun() -> None:
    rng = np.random.default_rng(0)
    images, labels, nouns = (rng.standard_normal((count, 8)).astype(np.float32) for count in (5, 7, 50))
    odds = np.exp(3.0 * images.astype(np.float64) @ labels.T)
    odds /= np.exp(3.0 * images.astype(np.float64) @ nouns.T).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(Scoring(3.0).matches(images, labels, nouns), np.log(odds), atol=1e-4)
    # Of nouns as labels, about as many as stated are above the limit.
    usual = Scoring(3.0).matches(images, nouns, nouns)
    assert ((usual >= usual_limit(usual, labels=20)).sum(axis=1) == 5).all()
