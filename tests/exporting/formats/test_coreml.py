"""Core ML bundles: made by the real converter where it is installed, in an environment of its own; a Mac runs them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clip_rd_edge.bundle.labels import read_labels
from clip_rd_edge.bundle.manifest import read_manifest
from clip_rd_edge.bundle.reference import read_reference
from clip_rd_edge.errors import ClipRdEdgeError, ConfigError
from clip_rd_edge.exporting.bundle import export_bundle
from clip_rd_edge.exporting.formats.coreml import _exported, require_declared
from clip_rd_edge.exporting.plan import Plan, Precision
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.runtime.load import load


def test_the_exported_graph_has_no_alias_which_coremltools_does_not_know() -> None:
    class Aliased(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            same: Tensor = torch.ops.aten.alias.default(rows + 1)
            return same * 2

    program = _exported(Aliased(), torch.zeros(1, 3))
    assert torch.ops.aten.alias.default not in {node.target for node in program.graph.nodes}
    assert program.module()(torch.ones(1, 3)).tolist() == [[4, 4, 4]]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_both_towers_are_packages_with_the_source_bundles_answers_and_labels(
    student: ClipModel, fp32_bundle: Path, tmp_path: Path, precision: Precision
) -> None:
    coremltools = pytest.importorskip("coremltools", reason="needs the extra coreml")
    bundle = tmp_path / "bundle"
    request = Plan(format="coreml", precision=precision, labels=("cat", "dog"))
    export_bundle(student, bundle, request, source=fp32_bundle)
    manifest = read_manifest(bundle)
    assert (manifest.target, manifest.precision, manifest.text.file) == ("coreml", precision, "text.mlpackage")
    expected, found = read_reference(fp32_bundle), read_reference(bundle)
    assert expected is not None
    assert found is not None
    np.testing.assert_array_equal(expected.text_embeddings, found.text_embeddings)
    np.testing.assert_array_equal(expected.image_embeddings, found.image_embeddings)
    bank = read_labels(bundle)
    assert bank is not None
    assert bank.names == ("cat", "dog")
    size = 0
    for tower in manifest.towers.values():
        package = bundle / tower.file
        assert {path.name for path in package.iterdir()} == {"Manifest.json", "Data"}
        spec = coremltools.utils.load_spec(str(package))
        assert spec.WhichOneof("Type") == "mlProgram"
        assert [port.name for port in spec.description.input] == [tower.input_name]
        size += sum(path.stat().st_size for path in package.rglob("weight.bin"))
    expected_bytes = manifest.parameters * (2 if precision == "fp16" else 4)
    assert size == pytest.approx(expected_bytes, rel=0.05)
    with pytest.raises(ConfigError):
        load(bundle).encode_texts(["red"])
    other = msgspec.structs.replace(manifest.text, input_name="tokens")
    with pytest.raises(ClipRdEdgeError):
        require_declared(bundle / "text.mlpackage", other, found.ids, manifest.embedding_size)
