"""What --force may replace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clip_rd_edge.bundle.outputs import OutputKind, require_output
from clip_rd_edge.errors import UsageError


def refused(path: Path, kind: OutputKind = "export", *, overwrite: bool = True) -> UsageError:
    with pytest.raises(UsageError) as error:
        require_output(path, kind, overwrite=overwrite)
    return error.value


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_an_earlier_bundle_is_replaced_with_force_alone(colour_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(colour_bundle, tmp_path / "bundle")
    write(bundle, "image.engine", "image.engine.sha256", "timing.cache")  # built since
    write(bundle, ".DS_Store", "._image.onnx")  # left there by a Mac
    require_output(bundle, "export", overwrite=True)
    assert "force" in (refused(bundle, overwrite=False).hint or "")
    shutil.copytree(colour_bundle, tmp_path / "targets" / "sm86")
    shutil.copytree(colour_bundle, tmp_path / "targets" / "sm89")
    require_output(tmp_path / "targets", "export", overwrite=True)
    write(tmp_path / "targets" / "sm89", "notes.txt")
    assert "it holds sm89/notes.txt" in str(refused(tmp_path / "targets"))


def test_a_folder_that_was_never_an_output_is_not_replaced_nor_is_force_recommended(tmp_path: Path) -> None:
    pictures = write(tmp_path / "pics", "b.jpg", "a.jpg")
    for overwrite in (True, False):
        error = refused(pictures, overwrite=overwrite)
        assert "not an earlier export: it holds a.jpg" in str(error)
        assert "force" not in (error.hint or "")
    page = write(tmp_path / "page", "index.html", "app.js")  # many web pages have a manifest.json
    (page / "manifest.json").write_text(json.dumps({"name": "shop", "files": {}}))
    assert "not an earlier export" in str(refused(page))
    refused(pictures / "a.jpg")
    assert "not an earlier average" in str(refused(pictures, "average"))


def test_the_other_layouts_are_recognised(colour_bundle: Path, tmp_path: Path) -> None:
    site = write(tmp_path / "site", "index.html", "app.js", "style.css", "sizes.json", "npm/ort.wasm")
    shutil.copytree(colour_bundle, site / "bundle")
    immich = write(tmp_path / "immich", "config.json", "visual/model.onnx", "textual/model.onnx")
    hub = write(tmp_path / "hub", "onnx/model.onnx", "README.md", "preprocessor_config.json", "open_clip_config.json")
    write(hub, "open_clip_model.safetensors", "distillation.json", "tokenizer.json", "onnx/text_model_int8.onnx")
    for folder in (site, immich, hub):
        require_output(folder, "export", overwrite=True)
        write(folder, "holiday.jpg")
        assert "it holds holiday.jpg" in str(refused(folder))


def test_a_trained_student_is_not_replaced_by_an_average(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "open_clip_config.json", "open_clip_model.safetensors", "distillation.json")
    for kind, key in (("average", "average"), ("stitched model", "classifier"), ("trimmed model", "trimmed")):
        (model / "distillation.json").write_text(json.dumps({key: {}}))
        require_output(model, kind, overwrite=True)  # type: ignore[arg-type]
    assert "not an earlier average" in str(refused(model, "average"))
    (model / "distillation.json").write_text(json.dumps({"recipe": {}}))
    assert "not an earlier average" in str(refused(model, "average"))


def test_what_the_output_is_made_from_is_not_replaced(colour_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(colour_bundle, tmp_path / "bundle")
    write(bundle, "labels.npz")
    with pytest.raises(UsageError):
        require_output(bundle, "export", overwrite=True, sources=[bundle / "labels.npz"])
    for empty in (tmp_path / "empty", tmp_path / "new"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        require_output(empty, "export", overwrite=False)
