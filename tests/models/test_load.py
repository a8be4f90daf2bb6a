"""Teachers loaded from a checkpoint file, a folder, and the hub's cache without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from support import share_in_threads, tiny_clip

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.hub import NO_STRANGERS, StrangeFileError
from clip_rd_edge.models.load import load_clip, save_clip


def test_a_model_trained_with_random_interpolation_is_evaluated_as_open_clip_does(tmp_path: Path) -> None:
    save_clip(tmp_path, tiny_clip(), provenance={})
    path = tmp_path / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"]["interpolation"] = "random"
    path.write_text(json.dumps(config))
    assert load_clip(f"local-dir:{tmp_path}").preprocessing.interpolation == "bicubic"


def test_a_thread_that_has_loaded_its_model_lets_no_python_code_into_that_of_another() -> None:
    from transformers import dynamic_module_utils as modules

    before = modules.get_class_in_module

    def code_is_refused() -> bool:
        with pytest.raises(StrangeFileError):
            modules.get_class_in_module("Model", "module")
        return True

    assert share_in_threads(lambda: NO_STRANGERS, code_is_refused)
    assert modules.get_class_in_module is before


def test_weights_with_a_tag_are_run_with_the_activation_that_they_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = {"layers": 1, "width": 64}
    config = {
        "embed_dim": 8,
        "vision_cfg": {**tower, "head_width": 64, "patch_size": 8, "image_size": 16},
        "text_cfg": {**tower, "context_length": 8, "vocab_size": 49408, "heads": 1},
    }
    path = tmp_path / "weights.pt"
    torch.save(open_clip.CLIP(**config, quick_gelu=True).state_dict(), path)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    tags = {"openai": {"file": str(path), "quick_gelu": True}, "laion": {"file": str(path)}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)

    clip = load_clip("tiny@openai")
    save_clip(tmp_path / "copy", clip, provenance={})
    for model in (clip, load_clip(str(tmp_path / "copy"))):
        kinds = [type(module).__name__ for module in model.model.modules()]
        assert (kinds.count("QuickGELU"), kinds.count("GELU")) == (2, 0)
    assert "QuickGELU" not in {type(module).__name__ for module in load_clip("tiny@laion").model.modules()}


CODE = """
from pathlib import Path
from types import SimpleNamespace
Path({marker!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Config(PretrainedConfig):
    model_type = "evil"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("part", ["text tower", "tokenizer", "tokenizer that trusts itself"])
def test_python_code_in_a_model_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    folder, marker = tmp_path / "teacher", tmp_path / "was run"
    clip = tiny_clip()
    save_clip(folder, clip, provenance={})
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    text = config["model_cfg"]["text_cfg"]
    if part == "text tower":
        text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
        (folder / "config.json").write_text(
            json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}})
        )
    else:
        text |= {"hf_tokenizer_name": str(folder)}
        tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        if part != "tokenizer":
            text["tokenizer_kwargs"] = {"trust_remote_code": True}
    path.write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail("asked on stdin"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ConfigError):
        load_clip(f"local-dir:{folder}")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["layers", "many-wide", "width", "vocabulary", "text-number"])
def test_a_configuration_of_a_model_that_nobody_has_takes_no_memory(name: str, tmp_path: Path) -> None:
    """`layers` once built layers until the memory was full."""
    shutil.copy(Path(__file__).parents[1] / "corpus" / "teachers" / f"{name}.json", tmp_path / "open_clip_config.json")
    with pytest.raises(ConfigError):
        load_clip(f"local-dir:{tmp_path}")
