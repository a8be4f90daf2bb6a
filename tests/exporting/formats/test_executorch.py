"""ExecuTorch bundles: made by the real converter where it is installed, in an environment of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from support import require_the_models_answers
from torch import nn

from clip_rd_edge.bundle.manifest import read_manifest, write_manifest
from clip_rd_edge.errors import ConfigError, MissingExtraError, UsageError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.formats.executorch import _in_convolution, _rows, executorch_backend
from clip_rd_edge.exporting.int8.candidates import Float32Tower
from clip_rd_edge.exporting.int8.trials import Trial
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.installation import install_command
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.executorch import ExecuTorchModel, open_executorch
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle


def for_executorch(bundle: Path) -> Path:
    write_manifest(bundle, msgspec.structs.replace(read_manifest(bundle), target="executorch"))
    return bundle


class Method:
    """A stand-in for ExecuTorch's: its program takes one row of int64 and returns its sum twice."""

    def execute(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        (row,) = inputs
        assert (tuple(row.shape), row.dtype) == ((1, 4), torch.int64)
        return [row.sum().to(torch.float32).expand(1, 2)]


def test_a_batch_runs_row_by_row() -> None:
    model = ExecuTorchModel(Method())
    name = model.get_inputs()[0].name
    (output,) = model.run(None, {name: np.arange(12, dtype=np.int64).reshape(3, 4)})
    np.testing.assert_array_equal(output, [[6, 6], [22, 22], [38, 38]])


def test_a_missing_package_is_reported_with_its_extra(colour_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings", None)
    with pytest.raises(MissingExtraError) as raised:
        load(for_executorch(colour_bundle)).encode_texts(["red"])
    assert raised.value.hint == install_command("executorch")


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Put a stand-in for ExecuTorch in place that loads nothing; return the numbers of threads that were set."""
    threads: list[int] = []

    def refuse(program: Any) -> None:
        raise RuntimeError("Failed to load program,\nerror: 0x23")

    runtime = SimpleNamespace(get=lambda: SimpleNamespace(load_program=refuse))

    def reset(count: int) -> None:
        threads.append(count)
        os.write(2, b"[threadpool.cpp:66] Resetting threadpool\n")

    bindings = SimpleNamespace(_unsafe_reset_threadpool=reset, _threadpool_get_thread_count=lambda: 1)
    for name, contents in {
        "executorch": {},
        "executorch.extension": {},
        "executorch.extension.pybindings": {"portable_lib": bindings},
        "executorch.runtime": {"Runtime": runtime},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return threads


def test_a_file_that_executorch_cannot_load_is_reported_in_one_line(
    refusing: list[int], colour_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"^ExecuTorch cannot run .*image\.onnx: Failed to load program, .*0x23\.$"):
        open_executorch(str(colour_bundle / "image.onnx"), threads=2)
    assert refusing == [2]
    assert capfd.readouterr().err == ""  # the pool's message is no user's business
    with pytest.raises(UsageError, match="number of threads is 0; expected 1 to 1,024"):
        open_executorch(str(colour_bundle / "image.onnx"), threads=0)


def test_devices_and_runtimes_that_do_not_fit_are_refused(colour_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"The runtime executorch does not run this bundle, whose files are ONNX\."):
        load(colour_bundle, runtime="executorch")
    for_executorch(colour_bundle)
    with pytest.raises(UsageError, match="has no device 'cuda'"):
        load(colour_bundle, device="cuda")
    with pytest.raises(UsageError, match=r"does not run this bundle, whose files are ExecuTorch\."):
        load(colour_bundle, runtime="onnxruntime")


@pytest.fixture(scope="module")
def executorch_bundle(student: ClipModel, fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's bundle for ExecuTorch in float32."""
    pytest.importorskip("executorch", reason="needs the extra executorch")
    bundle = tmp_path_factory.mktemp("executorch") / "bundle"
    request = Plan(format="executorch", labels=("cat", "dog"))
    export_bundle(student, bundle, request, source=fp32_bundle)
    return bundle


def test_a_float32_bundle_gives_the_models_answers(fp32_bundle: Path, executorch_bundle: Path) -> None:
    require_the_models_answers(executorch_bundle, fp32_bundle, runtime="executorch", suffix=".pte")


def test_inputs_that_ranges_are_measured_on_have_no_stride_of_0() -> None:
    samples = np.random.default_rng(0).random((3, 3, 4, 4), dtype=np.float32)
    rows = _rows(samples)
    assert np.array_equal(torch.cat(rows).numpy(), samples)
    assert {row.stride() for row in rows} == {(48, 16, 4, 1)}  # ExecuTorch refuses 0, which row[None] has


def test_weights_and_relu_belong_to_their_convolution_and_a_product_does_not() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).eval()
    graph = torch.export.export(network, (torch.zeros(1, 3, 1, 1),)).module().graph
    kept = {node.name: _in_convolution(node) for node in graph.nodes if node.op != "output"}
    assert {name for name, inside in kept.items() if not inside} == {"flatten", "linear"}
    assert kept["conv2d"]
    assert kept["relu"]


@pytest.mark.parametrize(
    ("tower", "names"),
    [
        ("image", ["static", "static, matrix products in float", "static in convolutions", "dynamic"]),
        ("text", ["dynamic"]),  # the model's convolutions are those of its image tower
    ],
)
def test_only_a_tower_with_convolutions_is_quantised_statically(
    student: ClipModel, tower: str, names: list[str]
) -> None:
    none = np.zeros((1, 1))
    float32 = Float32Tower(name=tower, model=Path(f"{tower}.pte"), calibrate=none, held_out=none)
    assert [candidate.name for candidate in executorch_backend(student).candidates(float32)] == names


@pytest.mark.slow
def test_int8_is_chosen_by_measurement_among_static_and_dynamic_candidates(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    pytest.importorskip("executorch", reason="needs the extra executorch")
    bundle = tmp_path / "bundle"
    request = Plan(precision="int8", format="executorch", fallback="fp32")
    converted = export_bundle(student, bundle, request, source=fp32_bundle, samples=calibration)
    trials: dict[str, Trial] = {f"{trial.tower} {trial.name}": trial for trial in converted.trials}
    assert {"image static", "image static in convolutions", "text dynamic"} <= set(trials)
    assert trials["image static in convolutions"].centred_cosine > 0.99
    assert trials["image static in convolutions"].size_ratio < 0.4
    assert trials["text dynamic"].centred_cosine > 0.99
    assert all(check.passed for check in verify_bundle(bundle))
