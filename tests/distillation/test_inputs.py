"""What a run is made from is known by its content when it is resumed; what has changed is refused or accepted."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import timm
import torch
from support import Watch, save_tiny_teacher
from text_towers import bert_clip
from tiny_runs import stop_at, tiny_run

from clip_rd_edge.bundle.runs import RUN_CONFIG_FILE, STUDENT_FOLDER, WEIGHTS_FILE
from clip_rd_edge.distillation.config import RunConfig
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.run import check_folder, run_distillation
from clip_rd_edge.distillation.setup import RunInputs, check_inputs, inputs_of, load_setup, record_inputs
from clip_rd_edge.errors import UsageError
from clip_rd_edge.models.load import load_clip, save_clip
from clip_rd_edge.utils.structs import to_yaml


def write_student(folder: Path, mean: float = 0.5) -> None:
    vision = {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"}
    content = {"vision_cfg": vision, "preprocess_cfg": {"mean": [mean] * 3, "std": [0.5] * 3}}
    (folder / "student.json").write_text(json.dumps(content))


def write_weights(folder: Path) -> None:
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), folder / "image.pth")


def run_in(folder: Path, **changes: Any) -> RunConfig:
    """Return a run all of whose inputs are files of a folder."""
    names = {"data": "pairs.csv", "teacher": "teacher", "text": "texts", "pretrained_image": "image.pth"}
    paths = {name: str(folder / file) for name, file in {**names, "student": "student.json"}.items()}
    return tiny_run("clip-rd", {"steps": 2, "batch_size": 6}, checkpoint_every=1, **{**paths, **changes})


@pytest.fixture
def folder(pairs_csv: Path, tmp_path: Path) -> Path:
    save_tiny_teacher(tmp_path / "teacher")
    save_tiny_teacher(tmp_path / "texts", seed=2)
    write_student(tmp_path)
    write_weights(tmp_path)
    return tmp_path


def inputs(config: RunConfig) -> RunInputs:
    return inputs_of(config, load_setup(config, name="student", processes=Processes()))


def caption(folder: Path) -> None:
    table = folder / "pairs.csv"
    table.write_text(table.read_text().replace("number 7", "number 8"))


def teacher_weight(folder: Path) -> None:
    clip = load_clip(str(folder / "teacher"))
    with torch.no_grad():
        next(iter(clip.model.parameters())).view(-1)[0] += 1e-3
    save_clip(folder / "teacher", clip, provenance={})


def teacher_mean(folder: Path) -> None:
    path = folder / "teacher" / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["preprocess_cfg"]["mean"] = [0.25, 0.25, 0.25]
    path.write_text(json.dumps(content))


def text_tower(folder: Path) -> None:
    shutil.rmtree(folder / "texts")
    save_tiny_teacher(folder / "texts", seed=3)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (caption, {"pairs_sha256"}),
        (teacher_weight, {"teacher_sha256"}),
        (teacher_mean, {"teacher_sha256"}),
        (text_tower, {"text_sha256"}),
        (lambda folder: write_student(folder, mean=0.1), {"student_file_sha256", "form_sha256"}),
        (write_weights, {"image_weights_sha256"}),
    ],
)
def test_each_input_is_known_by_its_content_wherever_it_lies(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, change: Callable[[Path], None], fields: set[str]
) -> None:
    before, moved = inputs(run_in(folder)), tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.copytree(folder, moved)
    assert inputs(run_in(moved)) == before
    change(moved)
    after = inputs(run_in(moved))
    assert {name for name in RunInputs.__struct_fields__ if getattr(after, name) != getattr(before, name)} == fields


def test_tokens_in_another_order_are_another_form_of_the_student(folder: Path, tmp_path: Path) -> None:
    """As no weight tells it."""
    shutil.rmtree(tmp_path / "teacher")
    save_clip(tmp_path / "teacher", bert_clip(tmp_path / "encoder", image_size=48), provenance={})
    config = run_in(folder, text="teacher", freeze_text=True, student="test_resnet", pretrained_image=None)
    before, path = inputs(config), tmp_path / "teacher" / "tokenizer.json"
    content = path.read_text()
    gear, bolt = (re.findall(rf'"{word}": *(\d+)', content)[0] for word in ("gear", "bolt"))
    content = re.sub(r'("gear": *)\d+', rf"\g<1>{bolt}", content)
    path.write_text(re.sub(r'("bolt": *)\d+', rf"\g<1>{gear}", content))
    assert inputs(config).form_sha256 != before.form_sha256


@pytest.mark.parametrize("name", [name for name in RunInputs.__struct_fields__ if name.endswith("sha256")])
def test_only_what_the_weights_of_a_checkpoint_do_not_belong_to_can_be_changed(tmp_path: Path, name: str) -> None:
    fields = {field: "0" * 64 for field in RunInputs.__struct_fields__ if field.endswith("sha256")}
    values: dict[str, Any] = {**fields, "teacher_sha256": ("0" * 64,), "terms_sha256": {"mine": "0" * 64}}
    began = RunInputs(samples="24 pairs", left_out=0, **values)
    value = msgspec.json.decode(msgspec.json.encode(values[name]).replace(b"0", b"1"), type=type(values[name]))
    setup: Any = SimpleNamespace(pairs=SimpleNamespace(name="pairs.csv"), teacher_names=["teacher"])
    record_inputs(tmp_path, began)
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)

    def is_accepted(*, accept_changes: bool) -> bool:
        try:
            check_inputs(
                tmp_path, msgspec.structs.replace(began, **{name: value}), setup, accept_changes=accept_changes
            )
        except UsageError:
            return False
        return True

    belongs = name in ("form_sha256", "text_sha256", "student_file_sha256")
    assert [is_accepted(accept_changes=accept) for accept in (False, True)] == [False, not belongs]
    (tmp_path / STUDENT_FOLDER).mkdir()
    (tmp_path / STUDENT_FOLDER / WEIGHTS_FILE).touch()
    assert not is_accepted(accept_changes=True)  # of a finished run


def test_weights_to_start_from_are_known_by_a_file_alone_and_not_needed_again(folder: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", run_in(folder)
    with pytest.raises(MemoryError):
        run_distillation(config, run, resume=False, reporter=Watch(on_step=stop_at(2)))
    assert (run / RUN_CONFIG_FILE).read_text() == to_yaml(config)
    shutil.copy(folder / "image.pth", folder / "moved.pth")
    moved = msgspec.structs.replace(config, pretrained_image=str(folder / "moved.pth"))
    assert check_folder(moved, run, resume=True)[1] == "moved"
    with pytest.raises(UsageError):
        check_folder(msgspec.structs.replace(config, pretrained_image="timm"), run, resume=True)
    (folder / "image.pth").unlink()
    run_distillation(config, run, resume=True)
