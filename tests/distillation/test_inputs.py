"""What a run says of inputs that are not those that it began with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from clip_rd_edge.bundle.runs import INPUTS_FILE
from clip_rd_edge.distillation.config import RunConfig, load_recipe
from clip_rd_edge.distillation.inputs import RunInputs, check_inputs
from clip_rd_edge.errors import UsageError
from clip_rd_edge.utils.files import write_text
from clip_rd_edge.utils.structs import to_json, to_yaml


def test_the_former_data_are_quoted_as_windows_s_shells_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clip_rd_edge.utils.text.os", SimpleNamespace(name="nt"))
    config = RunConfig(recipe_name="clip", recipe=load_recipe("clip"), data="other.csv", student="resnet18")
    began = RunInputs(pairs=24, left_out=0, pairs_sha256="1", teacher_sha256=None)
    (tmp_path / INPUTS_FILE).write_bytes(to_json(began))
    write_text(tmp_path / "config.yaml", to_yaml(msgspec.structs.replace(config, data=r"C:\my data\{0..1}.tar")))
    write_text(tmp_path / "student" / "open_clip_model.safetensors", "")
    setup = cast(Any, SimpleNamespace(teacher_names=(), stored=None, pairs=SimpleNamespace(name="other.csv")))
    with pytest.raises(UsageError) as refusal:
        check_inputs(tmp_path, msgspec.structs.replace(began, pairs_sha256="2"), config, setup, accept_changes=False)
    assert refusal.value.hint.startswith(r'name those that it began with: data "C:\my data\{0..1}.tar", or')
