from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from clip_rd_edge.errors import ClipRdEdgeError
from clip_rd_edge.exporting.bundle import write_fp32
from clip_rd_edge.exporting.parity import agreement, embed
from clip_rd_edge.exporting.towers import export_image_tower
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.runtime.backends.onnxruntime import open_session


def test_branches_that_only_training_needs_are_merged(make_student: Callable[..., ClipModel], tmp_path: Path) -> None:
    clip = make_student("mobileone_s0")
    pixels = np.random.default_rng(1).standard_normal((8, 3, 32, 32)).astype(np.float32)
    expected = TorchEncoder(clip).encode_pixels(pixels)
    path = export_image_tower(clip, tmp_path)
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "Add"]  # of branches
    assert agreement(expected, embed(open_session(str(path)), pixels)).max_difference <= 1e-4


def test_names_shapes_opset_and_weights_follow_the_contract(fp32_bundle: Path) -> None:
    for name, input_name, output_name in (
        ("image", "pixel_values", "image_embedding"),
        ("text", "input_ids", "text_embedding"),
    ):
        model = onnx.load(fp32_bundle / f"{name}.onnx", load_external_data=False)
        assert [i.name for i in model.graph.input] == [input_name]
        assert [o.name for o in model.graph.output] == [output_name]
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # the batch size is dynamic
        assert model.opset_import[0].version >= 17
        assert not any(tensor.external_data for tensor in model.graph.initializer)
        assert b".py" not in model.SerializeToString()  # no trace of source files and their paths


@pytest.mark.parametrize(("tower", "is_wrong"), [("image", "Equal"), ("text", "Greater")])  # at batch size 1, and above
def test_a_tower_that_is_wrong_at_some_batch_sizes_alone_is_refused(
    tower: str, is_wrong: str, student: ClipModel, fp32_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(fp32_bundle / f"{tower}.onnx")
    graph, output = model.graph, model.graph.output[0].name
    for node in graph.node:
        node.output[:] = ["right" if name == output else name for name in node.output]
    graph.node.extend(
        [
            helper.make_node("Shape", ["right"], ["batch"], start=0, end=1),
            helper.make_node(is_wrong, ["batch", "one"], ["is_wrong"]),
            helper.make_node("Cast", ["is_wrong"], ["error"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["right", "error"], [output]),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.asarray([1]), "one"))
    for name in ("image", "text"):
        monkeypatch.setattr(
            f"clip_rd_edge.exporting.bundle.export_{name}_tower",
            lambda _, folder, name=name: shutil.copy(fp32_bundle / f"{name}.onnx", folder / f"{name}.onnx"),
        )
    monkeypatch.setattr(
        f"clip_rd_edge.exporting.bundle.export_{tower}_tower",
        lambda _, folder: onnx.save(model, folder / f"{tower}.onnx"),
    )
    with pytest.raises(ClipRdEdgeError):
        write_fp32(student, tmp_path)
