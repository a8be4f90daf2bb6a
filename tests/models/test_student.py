from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clip_rd_edge.errors import ConfigError, InputError
from clip_rd_edge.models.checkpoint import save_clip
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.student import build_student, preset_names, student_config


def tiny(name: str, size: int = 64, width: int = 32):  # type: ignore[no-untyped-def]
    config = student_config(name, embedding_size=width, image_size=size, text="tiny", context_length=16)
    return build_student(config, name=name)


FAST = ("resnet10t", "mobilevit_xxs", "vit_tiny_16")
PRESETS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in preset_names()]


@pytest.mark.parametrize("name", PRESETS)
def test_plain_open_clip_loads_what_was_trained_and_saved(tmp_path: Path, name: str) -> None:
    clip = tiny(name, 224 if name == "swin_tiny" else 64)  # swin_tiny takes nothing else
    pixels = torch.rand(4, 3, *clip.preprocessing.size, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=1e-3)
    clip.model.encode_image(pixels).square().sum().backward()
    optimizer.step()
    save_clip(tmp_path / "student", clip, provenance={})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 70, 3), dtype=np.uint8))
    ours = TorchEncoder(clip)

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'student'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'student'}")
    model.eval()
    with torch.no_grad():
        image = model.encode_image(transform(picture)[None], normalize=True).numpy()
        text = model.encode_text(tokenizer(["a cat"]), normalize=True).numpy()
    np.testing.assert_allclose(image, ours.encode_images([picture]), atol=1e-6)
    np.testing.assert_allclose(text, ours.encode_texts(["a cat"]), atol=1e-6)


def test_any_timm_trunk_by_name() -> None:
    assert tiny("test_resnet", 96).embedding_size == 32


@pytest.mark.parametrize(("name", "match"), [("mobilevit_xx", "mobilevit_xxs"), ("resnet81", "resnet18")])
def test_an_unknown_student_has_near_matches(name: str, match: str) -> None:
    with pytest.raises(InputError, match=f"Did you mean .*{match}"):
        tiny(name)


def test_a_trunk_that_does_not_take_the_size() -> None:
    with pytest.raises(ConfigError, match="cannot be built at 64 × 64"):
        tiny("swin_tiny", 64)


def test_a_model_is_loaded_by_folder_run_and_local_dir(tmp_path: Path) -> None:
    save_clip(tmp_path / "run" / "student", tiny("resnet10t"), provenance={})
    for spec in (f"local-dir:{tmp_path}/run/student", f"{tmp_path}/run/student", f"{tmp_path}/run"):
        assert load_clip(spec).name == "run"


def test_an_architecture_by_checkpoint_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("RN50")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
    clip = load_clip("RN50", pretrained=str(tmp_path / "weights.pt"))
    assert torch.equal(clip.model.visual.conv1.weight, model.visual.conv1.weight)


@pytest.mark.parametrize(
    ("spec", "pretrained", "message"),
    [
        ("ViT-B-61", None, "no model 'ViT-B-61'"),
        ("ViT-B-16", None, "named without weights"),
        ("ViT-B-16", "nonsense", "not a known tag or valid file"),
        ("local-dir:/nowhere", None, "does not exist"),
    ],
)
def test_what_cannot_be_loaded_is_said(spec: str, pretrained: str | None, message: str) -> None:
    with pytest.raises((InputError, ConfigError), match=message):
        load_clip(spec, pretrained=pretrained)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    save_clip(tmp_path / "student", tiny("resnet10t"), provenance={})
    weights = tmp_path / "student" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_clip(str(tmp_path / "student"))
