"""Teachers as users have them: by checkpoint file, by folder, and from the hub's cache without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch

from clip_rd_edge.errors import InputError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import load_clip, preprocessing_of

ARCHITECTURE = "ViT-B-16"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An open_clip folder of real size with random weights, and one of its weights to know it by."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": open_clip.get_model_config(ARCHITECTURE), "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder, model.visual.proj.detach().clone()


def check(clip: ClipModel, known: torch.Tensor) -> None:
    assert torch.equal(clip.model.get_parameter("visual.proj"), known)
    assert clip.embedding_size == 512
    assert clip.preprocessing == preprocessing_of(clip.model)
    assert clip.preprocessing.size == (224, 224)
    assert clip.tokenizer(["a cat"]).shape == (1, 77)


@pytest.mark.slow
def test_by_file(checkpoint: tuple[Path, torch.Tensor]) -> None:
    folder, known = checkpoint
    check(load_clip(ARCHITECTURE, pretrained=str(folder / "open_clip_pytorch_model.bin")), known)


@pytest.mark.slow
def test_by_local_dir(checkpoint: tuple[Path, torch.Tensor]) -> None:
    folder, known = checkpoint
    check(load_clip(f"local-dir:{folder}"), known)


@pytest.mark.slow
def test_from_the_hubs_cache_offline(
    checkpoint: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, known = checkpoint
    revision = "0" * 40
    repository = tmp_path / "models--someone--some-clip"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check(load_clip("hf-hub:someone/some-clip"), known)


def test_a_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf-hub:someone/none could not be fetched") as error:
        load_clip("hf-hub:someone/none")
    assert "\n" not in str(error.value)
    assert "local-dir" in error.value.hint


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("open_clip:ViT-B-32", "openai", "The model ViT-B-32 with the weights 'openai' could not be fetched"),
        (
            "xlm-roberta-base-ViT-B-32",
            "laion5b_s13b_b90k",
            "The model xlm-roberta-base-ViT-B-32 with the text tower xlm-roberta-base and the weights",
        ),
    ],
)
def test_without_a_network_what_is_missing_is_named_at_once(
    name: str, pretrained: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unknown(*_: object) -> None:
        raise OSError("Name or service not known")

    for proxy in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"{expected}.*the hub cannot be reached") as error:
        load_clip(name, pretrained=pretrained)
    assert "local-dir:PATH" in error.value.hint
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # only within


@pytest.mark.slow
def test_a_siglip_whose_tokenizer_is_not_here_is_one_sentence_and_its_folder_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    folder = tmp_path / "siglip"
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-SigLIP")
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match=r"The tokenizer of ViT-B-16-SigLIP \(timm/ViT-B-16-SigLIP\) could not be"):
        load_clip("open_clip:ViT-B-16-SigLIP", pretrained=str(folder / "open_clip_pytorch_model.bin"))
    # With the tokenizer's files beside the weights, as the hub has them, no network is needed.
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": model.visual.preprocess_cfg})
    )
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "a"]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    clip = load_clip(str(folder))
    assert clip.tokenizer(["a cat"])[0, :5].tolist() == [2, 6, 5, 3, 0]
    assert clip.context_length == 64
