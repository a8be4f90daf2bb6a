from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
from support import tiny_clip
from text_towers import bert_clip

from clip_rd_edge.errors import ConfigError
from clip_rd_edge.models.hub import refuse_other_places
from clip_rd_edge.models.load import known_config, load_clip, save_clip
from clip_rd_edge.models.stitch import load_sentence_encoder
from clip_rd_edge.models.students import build_student, require_student, student_config
from clip_rd_edge.utils.paths import typed


def _edit(path: Path, *keys: str, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    inner = content
    for key in keys:
        inner = inner[key]
    inner.update(values)
    path.write_text(json.dumps(content))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A model's folder."""
    save_clip(tmp_path / "theirs", tiny_clip(), provenance={})
    return tmp_path / "theirs"


@pytest.fixture
def with_bert(tmp_path: Path) -> Path:
    """A model's folder with a text tower of transformers."""
    save_clip(tmp_path / "theirs", bert_clip(tmp_path / "bert"), provenance={})
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    ("tower", "values"),
    [
        ("vision_cfg", {"timm_model_name": "hf-hub:evil/trunk"}),
        ("vision_cfg", {"timm_model_name": "local-dir:/srv/trunk"}),
        ("text_cfg", {"hf_model_name": "/srv/text"}),
        ("text_cfg", {"hf_model_name": "../text"}),
        ("text_cfg", {"hf_model_name": "evil/text"}),
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "/dev/zero"}}),
        ("text_cfg", {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"subfolder": "../text"}}),
        ("text_cfg", {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"proxies": {"https": "evil.example"}}}),
        ("text_cfg", {"tokenizer_kwargs": ["bpe_path"]}),
    ],
)
def test_a_configuration_that_leads_away_from_its_folder_is_refused(
    theirs: Path, monkeypatch: pytest.MonkeyPatch, tower: str, values: dict[str, Any]
) -> None:
    for name in ("create_model", "get_tokenizer"):
        monkeypatch.setattr(open_clip, name, lambda *_, **__: pytest.fail("it was followed"))
    _edit(theirs / "open_clip_config.json", "model_cfg", tower, **values)
    for check in (known_config, load_clip):
        with pytest.raises(ConfigError):
            check(typed(theirs))


def test_what_the_models_of_open_clip_and_of_the_hub_name_is_followed(tmp_path: Path) -> None:
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        refuse_other_places(config, name)
        refuse_other_places(config, name, folder=tmp_path)  # as in a copy of such a model
    refuse_other_places(
        {"text_cfg": {"hf_model_name": "microsoft/BiomedNLP-BiomedBERT"}}, "hf-hub:microsoft/BiomedCLIP"
    )
    for key in ("hf_model_name", "hf_tokenizer_name"):
        for place in ("/srv/text", "./text", "text/..", "~/text", "C:/text", "https://evil.example/text", ["text"]):
            with pytest.raises(ConfigError):
                refuse_other_places({"text_cfg": {key: place}}, "hf-hub:evil/model")


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"vocab_file": "/srv/private/vocab.txt"}),
        ("tokenizer_config.json", {"tokenizer_file": "../private/tokenizer.json"}),
        ("config.json", {"attn_implementation": "evil/kernel"}),
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}),
    ],
)
def test_files_of_a_text_tower_that_lead_elsewhere_are_refused(
    with_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, values: dict[str, Any]
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail("asked on stdin"))
    assert load_clip(typed(with_bert)).has_hugging_face_text
    _edit(with_bert / file, **values)
    _edit(tmp_path / "bert" / file, **values)
    with pytest.raises(ConfigError):
        load_clip(typed(with_bert))
    with pytest.raises(ConfigError):
        load_sentence_encoder(typed(tmp_path / "bert"))


def test_a_students_file_names_an_architecture_and_fetches_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "student.json"
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3}
    for name in ("hf-hub:evil/trunk", "local-dir:/srv/trunk"):
        file.write_text(json.dumps({"vision_cfg": {"timm_model_name": name}, "preprocess_cfg": preprocess_cfg}))
        with pytest.raises(ConfigError):
            require_student(str(file))
    vision_cfg = {"timm_model_name": "test_resnet", "timm_model_pretrained": True}
    file.write_text(json.dumps({"vision_cfg": vision_cfg, "preprocess_cfg": preprocess_cfg}))
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("weights were fetched"))
    config = student_config(str(file), embedding_size=8, image_size=32, text="64x1", context_length=8)
    build_student(config, name="student")
