"""A bundle's graph that names another file, or operators of others, is refused before a runtime opens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper
from support import rewrite

from clip_rd_edge.bundle.formats import require_self_contained
from clip_rd_edge.bundle.manifest import Manifest, read_manifest, write_manifest
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.runtime.backends.one_input import CoreMlEncoder
from clip_rd_edge.runtime.backends.onnxruntime import OrtEncoder
from clip_rd_edge.runtime.load import load

ELSEWHERE = "../../../../../../etc/passwd"
OWN = "image.onnx.data"
PIXELS = np.ones((1, 3, 8, 8), np.float32)


def external(*locations: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    for key, value in [*(("location", location) for location in locations), ("offset", "0"), ("length", "12")]:
        tensor.external_data.add(key=key, value=value)
    return tensor


def sparse() -> SparseTensorProto:
    return SparseTensorProto(values=external(ELSEWHERE), dims=[3])


def graph(*initializers: TensorProto) -> GraphProto:
    return helper.make_graph([], "g", [], [], initializer=initializers)


def holds_weights(name: str = "Constant", **attributes: Any) -> NodeProto:
    return helper.make_node(name, ["x"], ["w"], **attributes)


def has_nodes(*nodes: NodeProto, functions: Sequence[onnx.FunctionProto] = ()) -> ModelProto:
    return helper.make_model(helper.make_graph(nodes, "g", [], []), functions=functions)


def function(**options: Any) -> onnx.FunctionProto:
    nodes = [holds_weights(value=external(ELSEWHERE))] if not options else []
    return helper.make_function("local", "F", [], ["w"], nodes, [helper.make_opsetid("", 17)], **options)


def training(place: str) -> ModelProto:
    model = helper.make_model(graph())
    getattr(model.training_info.add(), place).CopyFrom(graph(external(ELSEWHERE)))
    return model


ATTACKS: dict[str, Callable[[], ModelProto]] = {
    "parent": lambda: helper.make_model(graph(external(ELSEWHERE))),
    "absolute": lambda: helper.make_model(graph(external("/etc/passwd"))),
    "another file of the bundle": lambda: helper.make_model(graph(external("text.onnx"))),
    "not normalised": lambda: helper.make_model(graph(external(f"sub/../{OWN}"))),
    "another case": lambda: helper.make_model(graph(external(OWN.upper()))),
    "NUL": lambda: helper.make_model(graph(external(f"{OWN}\0"))),
    "an address in memory": lambda: helper.make_model(graph(external("*/_ORT_MEM_ADDR_/*"))),
    "first of two": lambda: helper.make_model(graph(external(ELSEWHERE, OWN))),
    "last of two": lambda: helper.make_model(graph(external(OWN, ELSEWHERE))),
    "sparse initializer": lambda: helper.make_model(helper.make_graph([], "g", [], [], sparse_initializer=[sparse()])),
    "attribute": lambda: has_nodes(holds_weights(value=external(ELSEWHERE))),
    "list in an attribute": lambda: has_nodes(holds_weights(values=[external(OWN), external(ELSEWHERE)])),
    "sparse attribute": lambda: has_nodes(holds_weights(sparse_value=sparse())),
    "branch": lambda: has_nodes(holds_weights("If", then_branch=graph(), else_branch=graph(external(ELSEWHERE)))),
    "branch of a branch": lambda: has_nodes(
        holds_weights("Loop", body=has_nodes(holds_weights("If", then_branch=graph(external(ELSEWHERE)))).graph)
    ),
    "list of graphs": lambda: has_nodes(holds_weights("Scan", bodies=[graph(), graph(external(ELSEWHERE))])),
    "function": lambda: has_nodes(functions=[function()]),
    "default of a function": lambda: has_nodes(
        functions=[function(attribute_protos=[helper.make_attribute("value", external(ELSEWHERE))])]
    ),
    "initialization": lambda: training("initialization"),
    "algorithm": lambda: training("algorithm"),
    "domain": lambda: has_nodes(helper.make_node("Op", [], ["w"], domain="com.example")),
    "domain in a branch": lambda: has_nodes(
        holds_weights("If", then_branch=has_nodes(helper.make_node("Op", [], ["w"], domain="com.example")).graph)
    ),
    "reads files": lambda: has_nodes(helper.make_node("EPContext", [], ["w"], domain="com.microsoft", embed_mode=0)),
}


def manifest_for(bundle: Path, file: str) -> Manifest:
    """Return a bundle's manifest with another file for the image tower."""
    manifest = msgspec.json.decode((bundle / "manifest.json").read_bytes(), type=Manifest)
    return msgspec.structs.replace(manifest, image=msgspec.structs.replace(manifest.image, file=file))


def replace_tower(bundle: Path, content: bytes) -> None:
    (bundle / "image.onnx").write_bytes(content)
    rewrite(bundle)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of the towers that a runtime has opened."""
    names = list[str]()

    def record(encoder: OrtEncoder, tower: Any) -> Any:
        names.append(tower.file)
        return open_tower(encoder, tower)

    open_tower = OrtEncoder.open_tower
    monkeypatch.setattr(OrtEncoder, "open_tower", record)
    return names


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_graph_that_refers_to_anything_else_is_refused_before_a_runtime_opens_it(
    attack: str, colour_bundle: Path, opened: list[str]
) -> None:
    replace_tower(colour_bundle, ATTACKS[attack]().SerializeToString())
    for _ in range(2):  # a file that is refused is not remembered
        with pytest.raises(ConfigError):
            load(colour_bundle).encode_pixels(PIXELS)
    assert opened == []


def test_of_fields_that_are_given_twice_each_counts(tmp_path: Path) -> None:
    path = tmp_path / "image.onnx"
    good = onnx.load(Path("tests/corpus/good/bundle/image.onnx")).SerializeToString()
    for first, second in (
        (good, ATTACKS["parent"]().SerializeToString()),
        (ATTACKS["parent"]().SerializeToString(), good),
    ):
        path.write_bytes(first + second)
        with pytest.raises(ConfigError):
            require_self_contained(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<?xml version='1.0'?><net/>",
        b"\x3a\x05",  # longer than the file
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x3b\x3c",  # a group
        b"\xba\x80\x80\x80\x10\x00",  # field 7, for readers that drop the bits above the 32nd
        b"\x3a",
    ],
)
def test_what_is_not_onnx_is_refused(content: bytes, colour_bundle: Path, opened: list[str]) -> None:
    replace_tower(colour_bundle, content)
    with pytest.raises(ConfigError):
        load(colour_bundle).encode_pixels(PIXELS)
    assert opened == []


def with_weights_of_its_own(bundle: Path) -> None:
    """Put a constant of the image tower into a file of its own, which adds nothing to its answers."""
    path = bundle / "image.onnx"
    model = onnx.load(path)
    weights = external(OWN)
    model.graph.initializer.append(weights)
    model.graph.node[-1].input[0] = "shifted"
    model.graph.node.insert(2, helper.make_node("Add", ["sum", "w"], ["shifted"]))
    (bundle / OWN).write_bytes(np.zeros(3, np.float32).tobytes())
    replace_tower(bundle, model.SerializeToString())


def test_weights_in_a_file_beside_the_graph_are_read(colour_bundle: Path, opened: list[str]) -> None:
    expected = load(colour_bundle).encode_pixels(PIXELS)
    with_weights_of_its_own(colour_bundle)
    assert np.array_equal(load(colour_bundle).encode_pixels(PIXELS), expected)
    assert opened == ["image.onnx"] * 2


def test_weights_in_a_link_are_refused(colour_bundle: Path, tmp_path: Path, opened: list[str]) -> None:
    with_weights_of_its_own(colour_bundle)
    (colour_bundle / OWN).rename(tmp_path / "secret")
    (colour_bundle / OWN).symlink_to(tmp_path / "secret")
    rewrite(colour_bundle)
    with pytest.raises(ConfigError):
        load(colour_bundle).encode_pixels(PIXELS)
    assert opened == []


def test_weights_that_the_manifest_does_not_list_are_refused(colour_bundle: Path, opened: list[str]) -> None:
    with_weights_of_its_own(colour_bundle)
    manifest, weights = read_manifest(colour_bundle), (colour_bundle / OWN).read_bytes()
    (colour_bundle / OWN).unlink()
    write_manifest(colour_bundle, manifest)
    (colour_bundle / OWN).write_bytes(weights)
    with pytest.raises(ConfigError):
        load(colour_bundle).encode_pixels(PIXELS)
    assert opened == []


def test_operators_of_a_function_in_the_file_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "image.onnx"
    calls = helper.make_node("F", [], ["w"], domain="local")
    path.write_bytes(has_nodes(calls, functions=[function(attributes=["value"])]).SerializeToString())
    require_self_contained(path)


@pytest.mark.parametrize("name", ["image.xml", "image.ort", "image.onnx.pb", "image"])
def test_a_name_by_which_a_runtime_takes_the_file_for_another_format_is_refused(
    name: str, colour_bundle: Path, opened: list[str]
) -> None:
    (colour_bundle / "image.onnx").rename(colour_bundle / name)
    write_manifest(colour_bundle, manifest_for(colour_bundle, name))
    with pytest.raises(ConfigError):
        load(colour_bundle).encode_pixels(PIXELS)
    assert opened == []


def test_a_link_in_a_core_ml_package_is_refused(colour_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    package = colour_bundle / "image.mlpackage"
    package.mkdir()
    (package / "Manifest.json").write_text("{}")
    manifest = manifest_for(colour_bundle, package.name)
    manifest = write_manifest(colour_bundle, msgspec.structs.replace(manifest, target="coreml"))
    (package / "weights").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError):
        CoreMlEncoder(colour_bundle, manifest).encode_pixels(PIXELS)
