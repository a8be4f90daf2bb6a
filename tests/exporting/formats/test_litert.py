"""LiteRT bundles: made by the real converter where it is installed, in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import require_the_models_answers

import clip_rd_edge as edge
from clip_rd_edge.bundle.manifest import Manifest, read_manifest
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.calibration import CalibrationSet
from clip_rd_edge.exporting.int8.trials import Trial
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.verify import verify_bundle


@pytest.fixture(scope="module")
def litert_bundle(
    student: ClipModel, fp32_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that exports the student for LiteRT in fp32 or fp16."""
    pytest.importorskip("litert_torch", reason="needs the extra litert-torch")
    folder = tmp_path_factory.mktemp("litert")

    def export(precision: str) -> Path:
        bundle = folder / precision
        if not bundle.exists():
            request = Plan(format="litert", precision=precision, labels=("cat", "dog"))  # type: ignore[arg-type]
            export_bundle(student, bundle, request, source=fp32_bundle)
        return bundle

    return export


def test_a_float32_bundle_gives_the_models_answers(
    student: ClipModel, fp32_bundle: Path, litert_bundle: Callable[[str], Path]
) -> None:
    require_the_models_answers(litert_bundle("fp32"), fp32_bundle, runtime="litert", suffix=".tflite")


def test_float16_halves_the_files_and_keeps_the_answers(litert_bundle: Callable[[str], Path]) -> None:
    fp32, fp16 = (litert_bundle(precision) for precision in ("fp32", "fp16"))
    manifest = read_manifest(fp16)
    assert (manifest.precision, manifest.target) == ("fp16", "litert")
    for tower in manifest.towers.values():
        assert (fp16 / tower.file).stat().st_size < 0.65 * (fp32 / tower.file).stat().st_size
        assert tower.measured is not None
        assert 0.999 < tower.measured.centred_cosine < 1
    assert all(check.passed for check in verify_bundle(fp16))


def test_the_example_that_needs_no_clip_rd_edge_gives_the_same_answers(
    litert_bundle: Callable[[str], Path], colour_images: Path
) -> None:
    bundle, image = litert_bundle("fp32"), colour_images / "red.png"
    script = Path(__file__).parents[3] / "export" / "litert" / "classify.py"
    result = subprocess.run([sys.executable, script, bundle, image], capture_output=True, text=True, check=True)
    answers = {name: float(share) for share, name in (line.split("\t") for line in result.stdout.splitlines())}
    expected = edge.load(bundle).classify(image)[0]
    assert answers.keys() == {"cat", "dog"}
    assert answers[expected.label] == pytest.approx(expected.probability, abs=2e-3)


@pytest.mark.slow
def test_int8_is_chosen_by_measurement_among_static_and_dynamic_candidates(
    student: ClipModel, fp32_bundle: Path, calibration: CalibrationSet, tmp_path: Path
) -> None:
    pytest.importorskip("litert_torch", reason="needs the extra litert-torch")
    bundle = tmp_path / "bundle"
    converted = export_bundle(
        student,
        bundle,
        Plan(precision="int8", format="litert", fallback="fp32"),
        source=fp32_bundle,
        samples=calibration,
    )
    trials: dict[str, Trial] = {f"{trial.tower} {trial.name}": trial for trial in converted.trials}
    assert {"image static", "image static in convolutions", "text dynamic", "text weights only"} <= set(trials)
    static = trials["image static in convolutions"]
    assert static.centred_cosine > 0.99, static.verdict
    assert static.size_ratio < 0.4
    assert trials["text dynamic"].centred_cosine > 0.99
    manifest: Manifest = converted.manifest
    assert manifest.target == "litert"
    for tower in manifest.towers.values():
        assert tower.one_at_a_time
        assert not tower.precision.startswith("int8") or "x86-64" in tower.instruction_sets
    assert all(check.passed for check in verify_bundle(bundle))
