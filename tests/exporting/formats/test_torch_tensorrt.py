"""Engines by torch-tensorrt: with a stand-in, and with the real package on a simulated GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.bundle.tokenizer import Tokenizer
from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError, UsageError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.formats import torch_tensorrt as torch_trt
from clip_rd_edge.exporting.formats.tensorrt import TypedTower
from clip_rd_edge.exporting.formats.torch_tensorrt import engine_builder, require_torch_tensorrt
from clip_rd_edge.exporting.parity import hard_inputs
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.load import load
from clip_rd_edge.runtime.verify import verify_bundle


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a GPU of compute capability 8.9; towers stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch_trt, "_GPU", torch.device("cpu"))


class StandIn:
    """A stand-in for the parts of torch-tensorrt that are used: records its inputs instead of building an engine."""

    def __init__(self, *, rtx: bool = True) -> None:
        self.ENABLED_FEATURES = SimpleNamespace(tensorrt_rtx=rtx)
        self.Input = SimpleNamespace
        self.dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=self._convert)
        self.calls: list[tuple[Any, Any]] = []

    def _convert(self, program: torch.export.ExportedProgram, *, arg_inputs: list[Any]) -> bytes:
        (spec,) = arg_inputs
        self.calls.append((program.module(), spec))
        return f"engine {len(self.calls)}".encode()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StandIn]:
    def install_stand_in(**options: Any) -> StandIn:
        module = StandIn(**options)
        monkeypatch.setitem(sys.modules, "torch_tensorrt", module)  # type: ignore[arg-type]
        return module

    return install_stand_in


@pytest.mark.usefixtures("gpu")
def test_engines_are_built_from_both_towers(
    install: Callable[..., StandIn], student: ClipModel, fp32_bundle: Path, tmp_path: Path
) -> None:
    stand_in, bundle = install(), tmp_path / "bundle"
    manifest = export_bundle(
        student,
        bundle,
        Plan(precision="fp16", format="trt", target="sm89", via="torch-tensorrt", labels=("cat", "dog")),
        source=fp32_bundle,
    ).manifest
    assert (manifest.target, manifest.precision) == ("tensorrt-rtx sm89", "fp16")
    assert [(bundle / tower.engine).read_bytes() for tower in (manifest.image, manifest.text)] == [
        b"engine 1",
        b"engine 2",
    ]
    failed = [check.detail for check in verify_bundle(bundle) if not check.passed]
    assert all("engine" in detail for detail in failed), failed  # without TensorRT, the engines themselves do not run
    reference = load(fp32_bundle)
    pixels = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    ids = Tokenizer(bundle / "tokenizer.json", manifest.tokenizer)([f"{i} red cats" for i in range(8)])
    expected = (reference.encode_pixels(pixels), reference.encode_ids(ids))
    for (module, spec), inputs, embeddings in zip(stand_in.calls, (pixels, ids), expected, strict=True):
        shape = inputs.shape[1:]
        assert (spec.min_shape, spec.opt_shape, spec.max_shape) == ((1, *shape), (1, *shape), (8, *shape))
        assert spec.dtype == torch.from_numpy(inputs).dtype
        assert {value.dtype for value in module.parameters()} == {torch.float16}
        for count in (1, 8):  # the batch size is dynamic
            output = module(torch.from_numpy(inputs[:count])).detach()
            assert output.dtype == torch.float32
            np.testing.assert_allclose(output.numpy(), embeddings[:count], atol=5e-3)
    assert next(student.model.parameters()).dtype == torch.float32  # the model is unchanged


@pytest.mark.usefixtures("gpu")
def test_a_tower_that_overflows_float16_is_refused(
    install: Callable[..., StandIn], make_student: Callable[..., ClipModel], fp32_bundle: Path
) -> None:
    stand_in, clip = install(), make_student()
    with torch.no_grad():
        clip.model.visual.head.proj.weight.mul_(1e6)  # type: ignore[union-attr, operator]
    inputs = hard_inputs(fp32_bundle, read_manifest(fp32_bundle))
    build = engine_builder(stand_in, clip, inputs)
    with pytest.raises(ClipRdEdgeError):
        build("image", TypedTower(b"", "fp16"))
    assert build("image", TypedTower(b"", "fp32")) == b"engine 1"


@pytest.mark.usefixtures("gpu")
def test_the_installed_package_must_build_for_the_target_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, install: Callable[..., StandIn]
) -> None:
    install(rtx=True)
    for rtx, target in ((True, "sm86"), (True, "jetson-orin"), (True, "nvidia-gpu"), (False, "sm89")):
        install(rtx=rtx)
        with pytest.raises(UsageError):
            require_torch_tensorrt(target)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingExtraError):
        require_torch_tensorrt("sm89")
