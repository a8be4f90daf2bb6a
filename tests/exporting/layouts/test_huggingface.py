from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
from PIL import Image
from support import NOT_ADAPTED, pad_with_another_id
from text_towers import clip_that_reads_signs
from tokenizers import Tokenizer
from transformers import AutoConfig, CLIPImageProcessor, PreTrainedTokenizerFast

from clip_rd_edge.bundle.outputs import require_output
from clip_rd_edge.exporting.bundle import export_layout
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats import Converted
from clip_rd_edge.exporting.layouts.huggingface import (
    _preprocessor_config,
    write_huggingface,
)
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.settings.deploying import Export

HUB = Plan(layout="huggingface")
CLIENTS = Path(__file__).parent / "clients"
PROMPTS = ("a photo of a {}.", *(f"view <{i}> of a {{}}" for i in range(5)))
HARD_TEXTS = [
    "",
    "a",
    "A Photo of a RED house!",
    "it's the dog's 2nd bone, isn't it?",
    " many   words\n " * 12,
    "naïve café 猫 👩‍🚀",
    "one o’clock, “quoted” ﬁve",
    "x_y-z; (w) #5",
    "\ufeffa\x00 \x1b[31;1mred\x1b[0m c\x7fat\u206a\x1f isnʼt",
]


@pytest.fixture(scope="module")
def exported(
    student: ClipModel, calibration: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Converted]:
    """The student's folder for the hub in all precisions, and what INT8 was chosen from."""
    output = tmp_path_factory.mktemp("hub") / "student"
    model = tmp_path_factory.mktemp("model") / "student"
    own = dataclasses.replace(student, templates=PROMPTS, labels=("red", "blue"))
    save_clip(model, own, provenance={"recipe": "clip-rd", "data": "pairs.csv", "configuration": {"quantize": None}})
    plan = Plan(layout="huggingface", precision="int8", fallback="fp32", search_minutes=0, provenance=NOT_ADAPTED)
    return output, export_layout(load_clip(str(model)), Export(model, output), plan, samples=calibration)


@pytest.fixture(scope="module")
def folder(exported: tuple[Path, Converted]) -> Path:
    return exported[0]


@cache
def _load(folder: Path) -> tuple[Any, Any, Any]:
    """Load the folder with open_clip; return model, preprocessing and tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def _expected(folder: Path, images: list[Image.Image], texts: list[str]) -> tuple[Any, Any]:
    model, preprocess, tokenizer = _load(folder)
    pixels = torch.stack([preprocess(image) for image in images])
    return (
        model.encode_image(pixels, normalize=True).numpy(),
        model.encode_text(tokenizer(texts), normalize=True).numpy(),
    )


def test_the_folder_has_the_files_of_all_clients(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    models = {f"onnx/{name}{suffix}.onnx" for name in ("vision_model", "text_model", "model")
              for suffix in ("", "_fp16", "_int8", "_quantized")}  # fmt: skip
    configs = {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    card = {"open_clip_config.json", "open_clip_model.safetensors", "README.md", "distillation.json"}
    assert names == models | configs | card


def test_the_models_own_prompts_and_labels_are_kept_and_nothing_else_of_its_training(folder: Path) -> None:
    assert "view &lt;0> of a {}" in (folder / "README.md").read_text()
    record = json.loads((folder / "distillation.json").read_text())
    assert record == {"templates": list(PROMPTS), "labels": ["red", "blue"]}
    loaded = load_clip(str(folder))
    assert (loaded.templates, loaded.labels) == (PROMPTS, ("red", "blue"))
    require_output(folder, "export", overwrite=True)


@pytest.mark.parametrize(("suffix", "least"), [("", 0.99999), ("_fp16", 0.99), ("_int8", 0.99)])
def test_texts_of_any_length_get_open_clips_ids_and_embeddings_however_they_are_padded_or_cut(
    folder: Path, suffix: str, least: float
) -> None:
    model, _, tokenize = _load(folder)
    ids = tokenize(HARD_TEXTS)
    with torch.no_grad():
        expected = model.encode_text(ids, normalize=True).numpy()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = open_session(str(folder / "onnx" / f"text_model{suffix}.onnx"))
    for text, row, embedding in zip(HARD_TEXTS, ids.numpy(), expected, strict=True):
        words, own = row[: int(row.argmax()) + 1].tolist(), tokenizer.encode(text).ids
        assert [*own[: len(words) - 1], own[-1]] == words
        padded = [[*words, *[pad_id] * padding] for padding in (1, 30) for pad_id in (0, 5, int(ids.max()))]
        for given in (own, own[:16], words, *padded):
            (output,) = session.run(["text_embeds"], {"input_ids": np.asarray([given])})
            assert float(output[0] @ embedding) > least


def test_the_folder_has_the_scale_and_the_padding_of_its_model(colour_bundle: Path, tmp_path: Path) -> None:
    """As transformers reads them: the scale, here 20, as its logarithm, and a padding id that is not 0."""
    pad_id = pad_with_another_id(colour_bundle)
    write_huggingface({"fp32": colour_bundle}, tmp_path)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert np.exp(config.logit_scale_init_value) == pytest.approx(20)
    assert (config.pad_token_id, tokenizer.pad_token_id) == (pad_id, pad_id)
    ids = tokenizer(["red", "green red", "blue"], padding=True)["input_ids"]
    colours = np.eye(3, dtype=np.float32)
    feed = {"input_ids": np.asarray(ids), "pixel_values": np.tile(colours[:, :, None, None], (8, 8))}
    names = ["text_embeds", "logits_per_text"]
    embeddings, logits = open_session(str(tmp_path / "onnx" / "model.onnx")).run(names, feed)
    expected = np.asarray([[1, 0, 0], [0.5**0.5, 0.5**0.5, 0], [0, 0, 1]])
    np.testing.assert_allclose(embeddings, expected, atol=1e-6)
    np.testing.assert_allclose(logits, 20 * expected, atol=1e-5)


@pytest.mark.parametrize("suffix", ["", "_int8"])
def test_the_joined_model_gives_the_logits_of_all_pairs(folder: Path, suffix: str) -> None:
    onnx.checker.check_model(onnx.load(folder / "onnx" / f"model{suffix}.onnx"), full_check=True)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((3, 3, 32, 32)).astype(np.float32)
    ids = np.asarray([[49406, 320, 49407, 0], [49406, 49407, 0, 0]])
    names = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    session = open_session(str(folder / "onnx" / f"model{suffix}.onnx"))
    assert [output.name for output in session.get_outputs()] == names
    per_image, per_text, text, image = session.run(None, {"input_ids": ids, "pixel_values": pixels})
    scale = float(_load(folder)[0].logit_scale.exp())
    np.testing.assert_allclose(per_image, scale * image @ text.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(per_text, per_image.T)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_transformers_preprocesses_images_as_open_clip_does(folder: Path, tmp_path: Path, mode: str) -> None:
    """But for the filter: images are given in the sizes that need none."""
    hub = shutil.copytree(folder, tmp_path / "hub")
    config = json.loads((hub / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["resize_mode"] = mode
    (hub / "open_clip_config.json").write_text(json.dumps(config))
    preprocessing = load_clip(str(hub)).preprocessing
    (hub / "preprocessor_config.json").write_text(json.dumps(_preprocessor_config(preprocessing)))
    processor, preprocess = CLIPImageProcessor.from_pretrained(hub), _load(hub)[1]
    for size in [(32, 32), *([(48, 32)] if mode == "shortest" else [])]:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        pixels = processor(image, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(pixels[0], preprocess(image).numpy(), atol=1e-5)
    if mode == "squash":
        assert processor(image.resize((48, 32)), return_tensors="np")["pixel_values"].shape == (1, 3, 32, 32)
        assert not processor.do_center_crop


# Text towers that are models of transformers.


@pytest.fixture(scope="module", params=["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def hugging_face_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for the hub of a model whose text tower is one of transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    export_layout(clip_that_reads_signs(request.param, folder / "encoder"), Export("model", folder / "hub"), HUB)
    shutil.rmtree(folder / "encoder")  # the export needs none of its files
    return folder / "hub"


def test_one_folder_has_the_configuration_of_clip_and_of_its_text_tower(hugging_face_folder: Path) -> None:
    config = json.loads((hugging_face_folder / "config.json").read_text())
    assert (config["model_type"], config["configuration_files"]) == ("clip", ["config.4.0.0.json"])
    model = _load(hugging_face_folder)[0]
    assert model.text.config.to_dict() == AutoConfig.from_pretrained(hugging_face_folder).to_dict()
    assert model.text.config.model_type in ("bert", "xlm-roberta")
    assert config["pad_token_id"] == model.text.config.pad_token_id
    require_output(hugging_face_folder, "export", overwrite=True)  # the folder is known as an earlier export


def test_texts_get_the_embeddings_of_a_text_tower_of_transformers(hugging_face_folder: Path) -> None:
    model, _, tokenize = _load(hugging_face_folder)
    texts = [*HARD_TEXTS, "Ein Überfluß an 猫と犬 🚀", "[PAD] red <pad> cat", "red cat dog " * 20]
    ids = tokenize(texts)
    with torch.no_grad():
        expected = model.encode_text(ids, normalize=True).numpy()
    assert len(np.unique(expected.round(4), axis=0)) > 9
    tokenizer = Tokenizer.from_file(str(hugging_face_folder / "tokenizer.json"))
    session = open_session(str(hugging_face_folder / "onnx" / "text_model.onnx"))
    assert [given.name for given in session.get_inputs()] == ["input_ids"]
    pad_id, length = model.text.config.pad_token_id, ids.shape[1]
    for text, row, embedding in zip(texts, ids.tolist(), expected, strict=True):
        words = tokenizer.encode(text).ids
        for cut in (words, words[:length]):  # transformers.js cuts off the last token, too
            padded = [*cut[:length], *[pad_id] * (length - len(cut))]
            assert padded[:-1] == row[:-1]
            for padding in (0, 1, 30):
                (output,) = session.run(["text_embeds"], {"input_ids": np.asarray([[*cut, *[pad_id] * padding]])})
                np.testing.assert_allclose(output[0], embedding, atol=1e-5)


@torch.no_grad()
def test_open_clip_loads_the_folder_from_the_hub(
    hugging_face_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repository = "0" * 40, tmp_path / "hub" / "models--me--my-clip"  # as the hub's client stores it
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    published = shutil.copytree(hugging_face_folder, repository / "snapshots" / commit)
    config = json.loads((published / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), "me/my-clip")
    (published / "open_clip_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = open_clip.create_model("hf-hub:me/my-clip").eval()
    found = model.encode_text(open_clip.get_tokenizer("hf-hub:me/my-clip")(HARD_TEXTS), normalize=True)
    expected = _expected(hugging_face_folder, [Image.new("RGB", (64, 64))], HARD_TEXTS)[1]
    np.testing.assert_allclose(found, expected, atol=1e-6)


# What the clients compute, with their own preprocessing.


@pytest.fixture(scope="module")
def request_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images and 100 texts; the images are smooth like photographs, of many sizes and shapes."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    images = [str(folder / f"{index}.png") for index in range(100)]
    for path in images:
        cells = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(cells).resize(tuple(rng.integers(40, 700, 2)), Image.Resampling.BICUBIC).save(path)
    colours, things = ["red", "green", "blue", "small", "wooden"], ["cat", "dog", "house", "tree", "bicycle", "cup"]
    texts = [f"a photo of a {colour} {thing}" for colour in colours for thing in things]
    texts = (HARD_TEXTS + texts + [f"{text}, number {index}" for index, text in enumerate(texts * 3)])[:100]
    request = folder / "request.json"
    request.write_text(json.dumps({"images": images, "texts": texts, "dtype": "fp32"}))
    return request


@pytest.fixture(scope="module", params=["clip", "bert", "roberta"])
def clip_folder(
    request: pytest.FixtureRequest, make_student: Callable[..., ClipModel], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a student for images of 224 pixels, with open_clip's own text tower or one of transformers."""
    folder = tmp_path_factory.mktemp("hub")
    clip = (
        make_student(image_size=224)
        if request.param == "clip"
        else clip_that_reads_signs(request.param, folder / "encoder", image_size=224)
    )
    export_layout(clip, Export("model", folder / "large"), HUB)
    return folder / "large"


def _answers(folder: Path, request: Path, *command: str | Path) -> dict[str, Any]:
    """Run a client; compare its embeddings with open_clip's, and return what it printed."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    answers: dict[str, Any] = json.loads(result.stdout)
    inputs = json.loads(request.read_text())
    image, text = _expected(folder, [Image.open(path) for path in inputs["images"]], inputs["texts"])
    for expected, name in ((image, "image_embeds"), (text, "text_embeds")):
        cosines = (np.asarray(answers[name]) * expected).sum(axis=1)
        assert len(cosines) == 100
        assert cosines.min() >= 0.999, (name, int(cosines.argmin()), float(cosines.min()))
    return answers


def _installed(*command: str | Path, cwd: Path) -> None:
    """Run an installer; skip the test if it fails, for instance without a network."""
    try:
        subprocess.run([*map(str, command)], cwd=cwd, check=True, capture_output=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{command[0]} cannot install the client: {error}")


@pytest.fixture(scope="module")
def transformers_js(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which transformers.js is installed."""
    folder = tmp_path_factory.mktemp("npm")
    # Without scripts: those of sharp and onnxruntime-node download from elsewhere what npm's packages bring, too.
    _installed("npm", "install", "--ignore-scripts", "@huggingface/transformers@4", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def fastembed_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which fastembed is installed."""
    folder = tmp_path_factory.mktemp("fastembed")
    _installed(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    _installed(python, "-m", "pip", "install", "--quiet", "fastembed>=0.9", cwd=folder)
    return python


@pytest.mark.slow
def test_transformers_js_computes_open_clips_embeddings(
    clip_folder: Path, request_file: Path, transformers_js: Path
) -> None:
    script = CLIENTS / "transformers_js.mjs"
    answers = _answers(clip_folder, request_file, "node", script, transformers_js, clip_folder, request_file)
    image, text = np.asarray(answers["image_embeds"]), np.asarray(answers["text_embeds"])
    scale = float(_load(clip_folder)[0].logit_scale.exp())
    np.testing.assert_allclose(answers["logits_per_image"], scale * image[:1] @ text.T, atol=1e-3)


@pytest.mark.slow
def test_fastembed_computes_open_clips_embeddings(
    clip_folder: Path, request_file: Path, fastembed_python: Path
) -> None:
    _answers(clip_folder, request_file, fastembed_python, CLIENTS / "fastembed_client.py", clip_folder, request_file)
