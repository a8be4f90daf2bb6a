"""Teachers loaded from a checkpoint file, a folder, and the hub's cache without a network."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from support import share_in_threads

from clip_rd_edge.errors import ConfigError, InputError, UsageError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.load import (
    _quiet_open_clip,
    load_clip,
    preprocessing_of,
    require_model,
    save_clip,
)
from clip_rd_edge.models.own_parts import NO_STRANGERS, StrangeFileError
from clip_rd_edge.models.students import build_student, student_config

ARCHITECTURE = "ViT-B-16"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An open_clip folder of a full-size model with random weights, and one of its parameters for comparison."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": open_clip.get_model_config(ARCHITECTURE), "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder, model.visual.proj.detach().clone()


def tiny() -> ClipModel:
    config = student_config("test_resnet", embedding_size=8, image_size=32, text="64x1", context_length=8)
    return build_student(config, name="tiny")


def check(clip: ClipModel, projection: torch.Tensor) -> None:
    assert torch.equal(clip.model.get_parameter("visual.proj"), projection)
    assert clip.embedding_size == 512
    assert clip.preprocessing == preprocessing_of(clip.model)
    assert clip.preprocessing.size == (224, 224)
    assert clip.tokenizer(["a cat"]).shape == (1, 77)


def test_a_model_trained_with_random_interpolation_is_evaluated_as_open_clip_does(tmp_path: Path) -> None:
    save_clip(tmp_path / "model", tiny(), provenance={})
    path = tmp_path / "model/open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"]["interpolation"] = "random"
    path.write_text(json.dumps(config))
    assert load_clip(f"local-dir:{tmp_path / 'model'}").preprocessing.interpolation == "bicubic"


@pytest.mark.slow
def test_a_teacher_is_loaded_from_a_checkpoint_file(checkpoint: tuple[Path, torch.Tensor]) -> None:
    folder, projection = checkpoint
    check(load_clip(ARCHITECTURE, pretrained=str(folder / "open_clip_pytorch_model.bin")), projection)


@pytest.mark.slow
def test_a_teacher_is_loaded_from_a_local_dir(checkpoint: tuple[Path, torch.Tensor]) -> None:
    folder, projection = checkpoint
    check(load_clip(f"local-dir:{folder}"), projection)


@pytest.mark.slow
def test_a_teacher_is_loaded_offline_from_the_hubs_cache(
    checkpoint: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, projection = checkpoint
    revision = "0" * 40
    repository = tmp_path / "models--someone--some-clip"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check(load_clip("hf-hub:someone/some-clip"), projection)


def test_what_a_model_records_is_utf_8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text = Path.write_text

    def as_on_windows(path: Path, text: str, encoding: str | None = None, **options: Any) -> int:
        return write_text(path, text, encoding=encoding or "cp1252", **options)

    monkeypatch.setattr(Path, "write_text", as_on_windows)
    save_clip(tmp_path / "model", tiny(), provenance={"data": "データ/Müller.csv"})
    assert json.loads((tmp_path / "model" / "distillation.json").read_bytes())["data"] == "データ/Müller.csv"


@pytest.mark.parametrize("model", ["tiny", "local-dir:tiny", "open_clip:tiny", "hf-hub:a/b", "ViT-B-32@openai"])
def test_other_weights_than_its_own_are_refused_for_a_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_clip(Path("tiny"), tiny(), provenance={})
    for load in (load_clip, require_model):
        with pytest.raises(UsageError, match=r"has weights of its own; pretrained, 'best\.pt', is for an architecture"):
            load(model, pretrained="best.pt")


def test_a_failed_download_is_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf-hub:someone/none could not be fetched") as error:
        load_clip("hf-hub:someone/none")
    assert "\n" not in str(error.value)
    assert "local-dir" in error.value.hint


def test_a_package_that_is_missing_is_to_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")

    monkeypatch.setattr(open_clip, "create_model", fail)
    save_clip(tmp_path / "tiny", tiny(), provenance={})
    with pytest.raises(ConfigError, match="could not be loaded: No module named 'safetensors'") as raised:
        load_clip(str(tmp_path / "tiny"))
    assert raised.value.hint == "pip install safetensors"


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_model_that_needs_docstrings_is_not_blamed_where_python_leaves_them_out(
    level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("No `Args` or `Parameters` section is found in the docstring")

    save_clip(tmp_path / "tiny", tiny(), provenance={})
    monkeypatch.setattr(open_clip, "create_model", fail)
    monkeypatch.setattr("clip_rd_edge.models.load.sys", SimpleNamespace(flags=SimpleNamespace(optimize=level)))
    with pytest.raises(ConfigError, match="could not be loaded: No `Args`") as raised:
        load_clip(str(tmp_path / "tiny"))
    assert ("unset PYTHONOPTIMIZE" in raised.value.hint) == (level == 2)


def test_the_warning_that_older_tokenizers_give_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    get_tokenizer = open_clip.get_tokenizer

    def warn_and_get(*arguments: Any, **options: Any) -> object:
        warnings.warn("`clean_up_tokenization_spaces` was not set.", FutureWarning, stacklevel=1)
        return get_tokenizer(*arguments, **options)

    monkeypatch.setattr(open_clip, "get_tokenizer", warn_and_get)
    save_clip(tmp_path / "tiny", tiny(), provenance={})
    load_clip(str(tmp_path / "tiny"))
    assert [str(warning.message) for warning in recwarn if "clean_up" in str(warning.message)] == []


@pytest.mark.parametrize("level", [logging.WARNING, logging.DEBUG])
def test_loading_is_quiet_and_leaves_the_applications_logging_as_it_was(
    level: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "level", level)
    monkeypatch.setattr(root, "handlers", [])  # as in an application that configures nothing
    with pytest.raises(InputError):
        load_clip("ViT-B-32", pretrained=None)
    save_clip(tmp_path / "tiny", tiny(), provenance={})
    load_clip(str(tmp_path / "tiny"))
    assert (root.level, root.handlers) == (level, [])
    assert capfd.readouterr().err == ""


def test_another_thread_of_the_application_logs_while_a_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    get_tokenizer = open_clip.get_tokenizer

    def log_and_get(*arguments: Any, **options: Any) -> object:
        thread = threading.Thread(target=lambda: logging.getLogger("application").error("payment failed"))
        thread.start()
        thread.join()
        return get_tokenizer(*arguments, **options)

    monkeypatch.setattr(open_clip, "get_tokenizer", log_and_get)
    save_clip(tmp_path / "tiny", tiny(), provenance={})
    caplog.clear()
    load_clip(str(tmp_path / "tiny"))
    assert caplog.messages == ["payment failed"]


def test_threads_that_load_at_once_leave_the_applications_warnings_as_they_were() -> None:
    """The second one finds the filter that the first one has set, and must not restore that."""
    before = [*warnings.filters]
    assert share_in_threads(_quiet_open_clip, lambda: len(warnings.filters)) == len(before) + 1
    assert warnings.filters == before


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
def test_missing_parts_are_reported_without_delay_if_there_is_no_network(
    name: str, pretrained: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise OSError("Name or service not known")

    for proxy in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr("socket.getaddrinfo", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"{expected}.*the hub cannot be reached") as error:
        load_clip(name, pretrained=pretrained)
    assert "local-dir:PATH" in error.value.hint
    assert not huggingface_hub.constants.HF_HUB_OFFLINE  # restored afterwards


@pytest.mark.slow
def test_a_missing_siglip_tokenizer_is_reported_and_a_complete_folder_loads(
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
    # With the tokenizer files beside the weights, as on the hub, no network is needed.
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": model.visual.preprocess_cfg})
    )
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "a"]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    clip = load_clip(str(folder))
    assert clip.tokenizer(["a cat"])[0, :5].tolist() == [2, 6, 5, 3, 0]
    assert clip.context_length == 64


def test_a_warning_of_the_hub_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    program = """
import logging
from huggingface_hub.utils import logging as hub_logging
from clip_rd_edge.models.load import _quiet_open_clip
with _quiet_open_clip():
    logging.info("open_clip says what it does")
    hub_logging.get_logger("huggingface_hub.http").warning("Retrying in 1s")
assert not logging.getLogger().handlers
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert capfd.readouterr().err == "Retrying in 1s\n"


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
    clip = tiny()
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
    with pytest.raises(ConfigError, match=r"Python code that came with it \(auto_map\), which is never run"):
        load_clip(f"local-dir:{folder}")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["layers", "many-wide", "width", "vocabulary", "text-number"])
def test_a_configuration_of_a_model_that_nobody_has_takes_no_memory(name: str, tmp_path: Path) -> None:
    """`layers` once built layers until the memory was full."""
    shutil.copy(Path(__file__).parents[1] / "corpus" / "teachers" / f"{name}.json", tmp_path / "open_clip_config.json")
    with pytest.raises(ConfigError, match=r"no such model exists|expected at most|is no object"):
        load_clip(f"local-dir:{tmp_path}")


def test_the_bundles_in_a_folder_that_is_no_model_are_named(colour_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(colour_bundle, tmp_path / "bundles" / "int8")
    with pytest.raises(InputError, match="bundles holds no model") as refusal:
        load_clip(str(tmp_path / "bundles"))
    assert refusal.value.hint == f"there are bundles in it: {tmp_path / 'bundles' / 'int8'}"
