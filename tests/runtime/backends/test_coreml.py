from __future__ import annotations

import shutil
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle


class Units(Enum):
    ALL = 0
    CPU_ONLY = 2


class Model:
    """A stand-in for coremltools' model: runs the ONNX file inside the package, and takes what Core ML takes."""

    units: list[Units] = []  # noqa: RUF012 — cleared for each test
    error = 0.0

    def __init__(self, package: str, *, compute_units: Units) -> None:
        self.units.append(compute_units)
        self.session = open_session(str(Path(package) / "Data" / "model.mlmodel"))

    def predict(self, feed: dict[str, Any]) -> dict[str, Any]:
        ((name, row),) = feed.items()
        assert (row.shape[0], row.dtype) in ((1, np.float32), (1, np.int32))
        ids = row.astype(np.int64) if row.dtype == np.int32 else row
        (output,) = self.session.run(None, {name: ids})
        return {self.session.get_outputs()[0].name: output + self.error}


@pytest.fixture
def coreml(monkeypatch: pytest.MonkeyPatch) -> type[Model]:
    """Pretend to have coremltools."""
    module = ModuleType("coremltools")
    module.ComputeUnit, module.models = Units, SimpleNamespace(MLModel=Model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "coremltools", module)
    monkeypatch.setattr(Model, "units", [])
    return Model


@pytest.fixture
def packaged(fp32_bundle: Path, tmp_path: Path) -> Path:
    """A bundle for Core ML, whose packages hold ONNX files."""
    bundle = Path(shutil.copytree(fp32_bundle, tmp_path / "bundle"))
    manifest = read_manifest(bundle)
    towers = {}
    for name, tower in manifest.towers.items():
        data = bundle / f"{name}.mlpackage" / "Data"
        data.mkdir(parents=True)
        shutil.move(bundle / tower.file, data / "model.mlmodel")
        (data.parent / "Manifest.json").write_text("{}")
        towers[name] = msgspec.structs.replace(tower, file=data.parent.name, one_at_a_time=True)
    write_manifest(bundle, manifest.with_towers(towers, target="coreml"))
    return bundle


def test_a_bundle_runs_on_a_mac_and_is_verified(packaged: Path, coreml: type[Model]) -> None:
    assert set(read_manifest(packaged).files_of(read_manifest(packaged).image)) == {
        "image.mlpackage/Data/model.mlmodel",
        "image.mlpackage/Manifest.json",
    }
    checks = verify_bundle(packaged, device="cpu")
    assert [check for check in checks if not check.passed] == []
    assert {(check.runtime, check.device) for check in checks if check.runtime} == {("coreml", "cpu")}
    assert set(coreml.units) == {Units.CPU_ONLY}
    assert load(packaged, device="cpu").describe().device == "cpu"
    assert load(packaged).describe().device == "coreml"
    texts = load(packaged).encode_texts(["red", "blue"])
    assert (texts.shape[0], texts.dtype) == (2, np.float32)
    assert coreml.units[-1] is Units.ALL


def test_a_flipped_byte_in_a_package_is_found(packaged: Path, coreml: type[Model]) -> None:
    file = packaged / "text.mlpackage" / "Data" / "model.mlmodel"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError):
        load(packaged).encode_texts(["red"])
    failed = {check.what for check in verify_bundle(packaged, device="cpu") if not check.passed}
    assert failed == {"text.mlpackage/Data/model.mlmodel", "text tower"}


def test_a_file_that_the_manifest_does_not_list_is_refused(packaged: Path, coreml: type[Model]) -> None:
    (packaged / "image.mlpackage" / "Data" / "weight.bin").write_bytes(b"x")
    with pytest.raises(ConfigError):
        load(packaged).encode_pixels(np.zeros((1, 3, *read_manifest(packaged).preprocessing.size), dtype=np.float32))
