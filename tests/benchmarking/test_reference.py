from __future__ import annotations

from clip_rd_edge.benchmarking.reference import MODEL, reference_call


def test_the_model_is_what_it_is_said_to_be() -> None:
    import onnx
    from onnx import TensorProto, helper

    tensors = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["N", "K"]), ("w", ["K", "M"]), ("y", ["N", "M"]))
    }
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "reference", [tensors["x"], tensors["w"]], [tensors["y"]])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="")
    assert onnx.load_from_string(MODEL) == made


def test_it_runs_on_the_threads_asked_for() -> None:
    (product,) = reference_call(threads=1)()  # type: ignore[misc]
    assert product.shape == (64, 2048)
