from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support import tiny_clip

from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.models.names import preset_names
from clip_rd_edge.models.students import build_student, init_image_tower, student_config, with_image_of


def tiny(name: str, size: int = 64, width: int = 32):  # type: ignore[no-untyped-def]
    config = student_config(name, embedding_size=width, image_size=size, text="tiny", context_length=16)
    return build_student(config, name=name)


@pytest.mark.parametrize("name", [*preset_names(), "levit_128s", "tf_efficientnet_b0"])
def test_images_are_normalised_as_timms_weights_expect(name: str) -> None:
    config = student_config(name, embedding_size=8)
    trunk = config["model_cfg"]["vision_cfg"].get("timm_model_name")
    published = timm.get_pretrained_cfg(trunk) if trunk else None
    mean = published.mean if published else open_clip.OPENAI_DATASET_MEAN
    std = published.std if published else open_clip.OPENAI_DATASET_STD
    assert (config["preprocess_cfg"]["mean"], config["preprocess_cfg"]["std"]) == (list(mean), list(std))


FAST = ("resnet10t", "vit_tiny_16")
PRESETS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in preset_names()]


@pytest.mark.parametrize("name", PRESETS)
def test_open_clip_loads_a_saved_student(tmp_path: Path, name: str) -> None:
    clip = tiny(name, 224 if name == "swin_tiny" else 64)  # the only size that swin_tiny supports
    pixels = torch.rand(4, 3, *clip.preprocessing.size, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=1e-3)
    clip.model.encode_image(pixels).square().sum().backward()
    optimizer.step()
    save_clip(tmp_path / "student", clip, provenance={})
    input_image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 70, 3), dtype=np.uint8))
    encoder = TorchEncoder(clip)

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'student'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'student'}")
    model.eval()
    with torch.no_grad():
        image = model.encode_image(transform(input_image)[None], normalize=True).numpy()
        text = model.encode_text(tokenizer(["a cat"]), normalize=True).numpy()
    np.testing.assert_allclose(image, encoder.encode_images([input_image]), atol=1e-6)
    np.testing.assert_allclose(text, encoder.encode_texts(["a cat"]), atol=1e-6)


def test_an_unsupported_image_size_is_refused_with_the_one_that_the_tower_is_made_for() -> None:
    config = student_config("levit_128s", embedding_size=8, image_size=64, text="64x1", context_length=8)
    with pytest.raises(ConfigError) as error:
        build_student(config, name="r4")
    assert "image_size 224" in error.value.hint


def saved(path: Path, state: dict[str, torch.Tensor]) -> str:
    save_file(state, str(path))
    return str(path)


@pytest.mark.parametrize("classes", [10, 0])
def test_an_image_trunk_is_initialised_from_a_timm_file_with_any_classifier(tmp_path: Path, classes: int) -> None:
    torch.manual_seed(5)
    published = timm.create_model("test_resnet", num_classes=classes).state_dict()
    student = tiny_clip()
    init_image_tower(student, saved(tmp_path / "weights.safetensors", published))
    trunk = student.model.get_submodule("visual.trunk").state_dict()
    assert trunk.keys() == published.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, published[name]) for name, value in trunk.items())


VIT = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 8}


def test_image_weights_that_do_not_match_are_refused(tmp_path: Path) -> None:
    other = saved(tmp_path / "vit.safetensors", timm.create_model("test_vit").state_dict())
    with pytest.raises(ConfigError):
        init_image_tower(tiny_clip(), other)


def own_student(path: Path, content: object, *, encoding: str = "utf-8") -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)
    return str(path)


def test_a_students_file_says_how_images_are_prepared_and_which_activation_it_has(tmp_path: Path) -> None:
    preprocessing = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    content = {"vision_cfg": {**VIT, "image_size": 32}, "preprocess_cfg": preprocessing, "quick_gelu": True}
    path = own_student(tmp_path / "own.json", content, encoding="utf-8-sig")
    config = student_config(path, embedding_size=8, image_size=32, text="64x1", context_length=8)
    clip = build_student(config, name="own")
    assert (clip.preprocessing.interpolation, clip.preprocessing.resize_mode) == ("bilinear", "squash")
    assert "QuickGELU" in {type(module).__name__ for module in clip.model.get_submodule("visual").modules()}
    with pytest.raises(ConfigError) as error:
        student_config(path, embedding_size=8)
    assert "image_size 32" in error.value.hint


def test_a_student_sees_images_as_the_teacher_of_its_image_tower_does_but_for_their_size() -> None:
    changes = {"resize_mode": "longest", "fill_color": 114, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3)}
    teacher = tiny_clip()
    seen = msgspec.structs.replace(teacher.preprocessing, **changes)
    own = student_config("test_resnet", embedding_size=8, image_size=48, text="64x1", context_length=8)
    config = with_image_of(own, replace(teacher, preprocessing=seen))
    actual = msgspec.convert(config["preprocess_cfg"], Preprocessing)
    assert actual == msgspec.structs.replace(seen, size=(48, 48))


def test_weights_are_not_asked_for_again_and_again_where_the_hub_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("not here")

    student, asked = tiny_clip(), []
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: asked.append(constants.HF_HUB_OFFLINE) or unreachable())
    with pytest.raises(InputError):
        init_image_tower(student, "timm")
    assert asked == [True]


def test_a_trunk_with_another_activation_is_named_built_and_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tiny("mobilevit_xxs_relu")
    save_clip(tmp_path / "student", clip, provenance={})
    weights = timm.create_model("mobilevit_xxs").state_dict()
    save_file(weights, str(tmp_path / "timm.safetensors"))
    monkeypatch.delitem(timm.models._registry._model_entrypoints, "mobilevit_xxs_relu")  # as in another process

    loaded = load_clip(str(tmp_path / "student"))

    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    clip.model.eval()
    torch.testing.assert_close(loaded.model.encode_image(pixels), clip.model.encode_image(pixels))
    assert not any(isinstance(module, torch.nn.SiLU) for module in loaded.model.get_submodule("visual").modules())
    init_image_tower(loaded, str(tmp_path / "timm.safetensors"))
    stem = loaded.model.get_submodule("visual.trunk").state_dict()["stem.conv.weight"]
    torch.testing.assert_close(stem, weights["stem.conv.weight"])

    with pytest.raises(ConfigError):
        student_config("swin_tiny_patch4_window7_224_relu", embedding_size=8)
