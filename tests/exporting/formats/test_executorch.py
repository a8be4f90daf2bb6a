"""ExecuTorch bundles: made by the real converter where it is installed, in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import require_the_models_answers

from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.int8.trials import Trial
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.backends.one_input import ExecuTorchModel
from clip_rd_edge.runtime.verify import verify_bundle


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
