"""What an export for another package's format refuses, whether or not that package is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_rd_edge.bundle.formats import Format
from clip_rd_edge.errors import MissingExtraError, UsageError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.plan import ExportRequest
from clip_rd_edge.installation import install_command
from clip_rd_edge.models.clip import ClipModel


@pytest.mark.parametrize(
    ("format", "need", "extra"),
    [
        ("coreml", "Core ML needs the package 'coremltools'", "coreml"),
        ("executorch", "ExecuTorch needs the package 'executorch'", "executorch"),
        ("litert", "LiteRT needs the package 'litert-torch'", "litert-torch"),
    ],
)
def test_an_export_without_the_converter_says_what_to_install(
    student: ClipModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Format, need: str, extra: str
) -> None:
    module = "litert_towers" if format == "litert" else format
    monkeypatch.setattr(f"clip_rd_edge.exporting.formats.{module}.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=f"Exporting for {need}") as raised:
        export_bundle(student, tmp_path / "bundle", ExportRequest(format=format))
    assert raised.value.hint == install_command(extra)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ExportRequest(format="coreml", preprocess_in_graph=True), "in_graph .* Core ML"),
        (ExportRequest(format="coreml", precision="int8"), "int8"),
        (ExportRequest(format="executorch", preprocess_in_graph=True), "in_graph .* ExecuTorch"),
        (ExportRequest(format="executorch", precision="int8", fallback="fp16"), "fp16 does not work with ExecuTorch"),
        (ExportRequest(format="executorch", precision="fp16"), "fp16"),
        (ExportRequest(format="litert", preprocess_in_graph=True), "in_graph .* LiteRT"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    student: ClipModel, tmp_path: Path, request_: ExportRequest, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export_bundle(student, tmp_path / "bundle", request_)
