from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.errors import ConfigError, MissingExtraError, UsageError
from clip_rd_edge.installation import install_command
from clip_rd_edge.runtime.backends.one_input import LiteRtModel, open_litert
from clip_rd_edge.runtime.load import load


def for_litert(bundle: Path) -> Path:
    write_manifest(bundle, msgspec.structs.replace(read_manifest(bundle), target="litert"))
    return bundle


class Interpreter:
    """A stand-in for LiteRT's: its model takes one row of int32 and returns its sum and its type."""

    def get_input_details(self) -> list[dict[str, Any]]:
        return [{"index": 3, "dtype": np.int32}]

    def get_output_details(self) -> list[dict[str, Any]]:
        return [{"index": 7}]

    def get_signature_list(self) -> dict[str, dict[str, list[str]]]:
        return {"serving_default": {"inputs": ["input_ids"], "outputs": ["text_embedding"]}}

    def set_tensor(self, index: int, value: Any) -> None:
        assert (index, value.shape, value.dtype) == (3, (1, 4), np.int32)
        self.sum = value.sum()

    def invoke(self) -> None:
        self.output = np.full((1, 2), self.sum, dtype=np.float32)

    def get_tensor(self, index: int) -> Any:
        assert index == 7
        return self.output.copy()


def test_a_batch_runs_row_by_row_in_the_type_that_the_file_takes() -> None:
    model = LiteRtModel(Interpreter())
    assert [port.name for port in model.get_inputs()] == ["input_ids"]
    (output,) = model.run(None, {"input_ids": np.arange(12, dtype=np.int64).reshape(3, 4)})
    np.testing.assert_array_equal(output, [[6, 6], [22, 22], [38, 38]])


def test_a_missing_package_is_reported_with_its_extra(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    encoder = load(for_litert(colour_bundle))
    with pytest.raises(MissingExtraError) as raised:
        encoder.encode_texts(["red"])
    assert raised.value.hint == install_command("litert")


def test_a_file_that_litert_cannot_read_is_reported_in_one_line(
    colour_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("ai_edge_litert.interpreter")

    def refuse(**options: object) -> None:
        assert options["num_threads"] == 2
        raise ValueError("Model provided has model identifier ' \x08\t',\nshould be 'TFL3'.")

    module.Interpreter = refuse  # type: ignore[attr-defined]
    module.OpResolverType = SimpleNamespace(AUTO=0, BUILTIN_WITHOUT_DEFAULT_DELEGATES=3)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ai_edge_litert", ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", module)
    with pytest.raises(ConfigError):
        open_litert(str(colour_bundle / "image.onnx"), threads=2)
    with pytest.raises(UsageError):
        open_litert(str(colour_bundle / "image.onnx"), threads=0)


def test_devices_and_runtimes_that_do_not_fit_are_refused(colour_bundle: Path) -> None:
    with pytest.raises(UsageError):
        load(colour_bundle, runtime="litert")
    for_litert(colour_bundle)
    with pytest.raises(UsageError):
        load(colour_bundle, device="openvino")
    with pytest.raises(UsageError):
        load(colour_bundle, runtime="openvino")
