"""What an export writes, by its options: each target's plan, and what is refused before anything is read."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import tiny_clip

import clip_rd_edge as edge
from clip_rd_edge.bundle.formats import FORMATS, format_named, format_of
from clip_rd_edge.errors import UsageError
from clip_rd_edge.exporting import plan as plans
from clip_rd_edge.exporting.plan import Plan, plan_exports, read_target, target_guide, target_names
from clip_rd_edge.models.load import save_clip
from clip_rd_edge.settings.deploying import Export
from clip_rd_edge.utils.paths import shipped_path

CORE = ("format", "precision", "target", "weight_bits")


def plan(**options: Any) -> Plan:
    (planned,) = plan_exports(Export("model", "bundle", **options))
    return planned


@pytest.mark.parametrize("name", target_names())
def test_every_device_file_is_valid_and_has_a_guide(name: str) -> None:
    device, guide = read_target(name), target_guide(name)
    assert guide.startswith(f"# {device.title}\n")
    assert "**Tested:**" in guide
    for text in (guide, device.install, *device.needs):  # not on PyPI yet: from a clone
        assert not re.search(r"pip install.*clip-rd-edge", text)
    assert f"| [{name}]({name}/README.md) |" in (shipped_path("export") / "README.md").read_text()
    for precision in device.profile.precisions if name != "rtx" else ():
        assert plan(target=name, precision=precision).precision == precision
        assert precision in format_named(device.profile.format).precisions


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("onnx", "fp32", "", 7)),
        ({"target": "cpu-x86"}, ("onnx", "int8", "cpu-x86", 7)),
        ({"target": "cpu-arm", "precision": "fp32"}, ("onnx", "fp32", "cpu-arm", 8)),
        ({"target": "openvino", "precision": "bf16"}, ("openvino", "bf16", "openvino", 7)),
        ({"target": "sm89", "format": "trt"}, ("trt", "fp16", "sm89", 7)),
        ({"target": "jetson-orin"}, ("trt", "fp16", "jetson-orin", 7)),
        ({"target": "browser"}, ("onnx", "fp32", "browser", 7)),
    ],
)
def test_a_target_sets_format_and_precision(options: dict[str, Any], expected: tuple[object, ...]) -> None:
    assert tuple(getattr(plan(**options), name) for name in CORE) == expected


def test_weights_that_some_processors_saturate_are_for_targets_that_none_of_them_is_of_and_in_bundles_alone() -> None:
    with_8_bits = {name for name in target_names() if read_target(name).profile.weight_bits == 8}
    assert with_8_bits == {"cpu-arm", "android", "cpu-x86-vnni"}
    for target in with_8_bits:
        bits = [plan(target=target, layout=layout).weight_bits for layout in ("bundle", "huggingface", "immich")]
        assert bits == [8, 7, 7]


@pytest.mark.parametrize(
    ("capability", "jetson", "rtx", "target"),
    [
        ("", "", True, "nvidia-gpu"),
        ("8.9", "", True, "sm89"),
        ("8.9", "", False, "nvidia-gpu"),
        ("9.0", "", True, "nvidia-gpu"),
        ("", "jetson-orin", False, "jetson-orin"),
    ],
)
def test_engines_without_a_target_are_for_the_gpu_here_or_build_themselves(
    capability: str, jetson: str, rtx: bool, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "cuda_capability", lambda: capability)
    monkeypatch.setattr(plans, "jetson_name", lambda: jetson)
    monkeypatch.setattr(plans, "find_spec", lambda name: object() if rtx else None)
    planned = plan(format="trt")
    assert (planned.format, planned.precision, planned.target) == ("trt", "fp16", target)
    assert "device" not in planned.provenance


INT8 = {"precision": "int8"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layout": "huggingface", "format": "openvino"}, "layout"),
    ({"layout": "immich", "target": "browser"}, "layout"),
    ({"target": "browser", "format": "openvino"}, "format"),
    ({"target": "browser", "preprocess_in_graph": True}, "preprocess_in_graph"),
    ({"as_name": "ViT-B-32__openai"}, "as_name"),
    ({"report": "results"}, "report"),
    ({"via": "torch-tensorrt"}, "via"),
    ({"via": "torch-tensorrt", "target": "sm86", **INT8}, "via"),
    ({"target": "sm86", "max_loss": 1.0, **INT8}, "max_loss"),
    ({"target": "openvino", "fallback": "fp16", **INT8}, "fallback"),
    ({"target": "sm86", "format": "onnx"}, "format"),
    ({"target": "cpu-x86", "precision": "bf16"}, "precision"),
    ({"format": "openvino", "precision": "fp16"}, "precision"),
    ({"format": "coreml", **INT8}, "precision"),
    ({"target": "sm99"}, "target"),
    ({"target": "cpu-x86,browser"}, "target"),
    ({"target": "cpu-x86,cpu-arm", "layout": "huggingface"}, "target"),
    ({"format": "tflite"}, "format"),
    ({"precision": "int4"}, "precision"),
    *(({"layout": layout, name: value}, name) for layout in ("huggingface", "immich") for name, value in
      {"labels": ["cat"], "text_tower": False, "preprocess_in_graph": True}.items()),
    *(({"format": name, "preprocess_in_graph": True}, "preprocess_in_graph") for name in FORMATS if name not in
      ("onnx", "openvino")),
    *(({**INT8, name: value}, name) for name, value in
      (("min_agreement", float("nan")), ("min_agreement", -0.1), ("min_agreement", "0.9"), ("max_loss", 101.0))),
    *(({**others, name: value}, name) for others in ({}, {"precision": "fp16"}, {"target": "sm86,coreml"})
      for name, value in {"min_agreement": 0.9, "max_loss": 1, "fallback": "fp16"}.items()),
]  # fmt: skip


@pytest.mark.parametrize(("options", "option"), REFUSED)
def test_options_that_do_not_go_together_are_refused_with_the_one_to_change(
    options: dict[str, Any], option: str
) -> None:
    with pytest.raises(UsageError) as refusal:
        plan(**options)
    assert refusal.value.option == option


def test_a_limit_of_int8_holds_for_both_towers_and_only_for_targets_in_it() -> None:
    budget = plan(**INT8, min_agreement=0.9, max_loss=2.0).budget
    assert (budget.image, budget.text, budget.max_loss) == (0.9, 0.9, 2)
    both = plan_exports(Export("model", "bundles", target="cpu-x86,sm86", min_agreement=0.9))
    assert [planned.precision for planned in both] == ["int8", "fp16"]


def test_a_bundle_can_become_a_page_alone(colour_bundle: Path, tmp_path: Path) -> None:
    assert plan_exports(Export(colour_bundle, tmp_path, target="browser"))[0].layout == "browser"
    with pytest.raises(UsageError):
        plan_exports(Export(colour_bundle, tmp_path))
    for option, value in {"pretrained": "openai", "precision": "fp16", "text_tower": False}.items():
        with pytest.raises(UsageError) as refusal:
            plan_exports(Export(colour_bundle, tmp_path, target="browser", **{option: value}))
        assert refusal.value.option == option


@pytest.fixture
def own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format of examples/own_format.py, as an installed package has it."""
    package = tmp_path / "packages"
    metadata = package / "own_format-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-format\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[clip_rd_edge.formats]\npt2 = own_format:PT2\n")
    example = Path(__file__).parents[2] / "examples" / "own_format.py"
    (package / "own_format.py").write_text(example.read_text())
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.delitem(sys.modules, "own_format", raising=False)


@pytest.mark.usefixtures("own_format")
def test_a_format_of_another_package_is_exported_and_run(tmp_path: Path) -> None:
    save_clip(tmp_path / "model", tiny_clip(), provenance={})
    image = Image.new("RGB", (60, 50), "red")
    bundle = edge.export(tmp_path / "model", tmp_path / "bundle", format="pt2", labels=["red", "blue"])
    assert bundle.manifest.target == "pt2"
    assert {"image.pt2", "text.pt2"} < set(bundle.manifest.files)
    assert all(check.passed for check in edge.verify(bundle))
    ours, expected = (edge.load(each) for each in (bundle, tmp_path / "model"))
    np.testing.assert_allclose(ours.encode_images(image), expected.encode_images(image), atol=1e-5)
    np.testing.assert_allclose(ours.encode_texts("red"), expected.encode_texts("red"), atol=1e-5)
    assert {label for label, _ in ours.classify(image)} == {"red", "blue"}
    assert format_of("pt2").title == "torch.export"
    with pytest.raises(UsageError, match="pt2"):
        plan(format="pt")
    with pytest.raises(UsageError):
        plan(format="pt2", precision="int8")
