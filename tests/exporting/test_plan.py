from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clip_rd_edge.cli.output import fold
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.exporting.plan import plan_exports, read_target, target_guide, target_names
from clip_rd_edge.utils.paths import shipped_path

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("name", target_names())
def test_every_device_file_is_valid_and_has_a_guide(name: str) -> None:
    device = read_target(name)
    guide = target_guide(name)
    assert guide.startswith(f"# {device.title}\n")
    assert "**Tested:**" in guide
    for text in (guide, device.install, *device.needs):  # not on PyPI yet: from a clone
        assert not re.search(r"pip install.*clip-rd-edge", text)
    assert f"| [{name}]({name}/README.md) |" in (shipped_path("export") / "README.md").read_text()


def test_an_unknown_device_suggests_near_matches() -> None:
    with pytest.raises(InputError, match="Did you mean 'cpu-arm'"):
        read_target("cpu-arms")


def test_the_devices_command(command_line: Run) -> None:
    code, output, error = command_line("devices")
    assert code == 0
    assert fold(error, 80) == error  # a command that does not fit would get a backslash
    assert all(name in output for name in target_names())
    assert not re.search(r"\b(here|nearby)\b", output)  # a user would take it for the machine that the command runs on
    code, output, _ = command_line("devices", "cpu-arm")
    assert (code, output) == (0, target_guide("cpu-arm"))
    code, output, _ = command_line("devices", "--json")
    assert json.loads(output)["cpu-x86"]["runs"] == "here"
    code, _, error = command_line("devices", "toaster")
    assert code == 2
    assert "No device is named 'toaster'; expected one of android, browser, coreml, cpu-arm" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "huggingface", "format": "openvino"}, "The layout huggingface is ONNX"),
        ({"layout": "immich", "format": "openvino"}, "The layout immich is ONNX"),
        ({"layout": "huggingface", "preprocess_in_graph": True}, "preprocess images"),
        ({"layout": "huggingface", "labels": ["cat"]}, "stores no labels"),
        ({"as_name": "ViT-B-32__openai"}, "as_name is the name of a model of layout immich"),
        ({"report": "results"}, "report is for the model card"),
    ],
)
def test_an_option_that_a_layout_does_not_take_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_exports(options)


@pytest.mark.parametrize("target", ["cpu-x86-vnni", "cpu-arm", "android"])
def test_weights_that_some_processors_saturate_are_in_bundles_alone(target: str) -> None:
    bits = {
        layout: plan.request.weight_bits
        for layout in ("bundle", "huggingface", "immich")
        for plan in plan_exports({"target": target, "layout": layout})
    }
    assert bits == {"bundle": 8, "huggingface": 7, "immich": 7}


@pytest.mark.parametrize(("target", "title"), [("openvino", "OpenVINO"), ("cpu-x86,executorch", "")])
def test_a_fallback_that_the_format_does_not_support_is_refused(target: str, title: str) -> None:
    options: Any = {"target": target, "precision": "int8", "fallback": "fp16"}
    with pytest.raises(UsageError, match=f"fallback fp16 does not work with {title}") as error:
        plan_exports(options)
    assert error.value.hint == "use fallback fp32"
    assert plan_exports({**options, "fallback": "fp32"})[0].request.fallback == "fp32"


@pytest.mark.parametrize(
    ("option", "value", "highest"),
    [
        ("min_agreement", float("nan"), 1), ("min_agreement", -0.1, 1), ("min_agreement", 99.0, 1),
        ("min_agreement", "0.9", 1), ("max_loss", float("nan"), 100), ("max_loss", float("inf"), 100),
        ("max_loss", -5.0, 100),
    ],
)  # fmt: skip
def test_a_limit_of_int8_that_is_out_of_range_or_no_number_is_refused(option: str, value: Any, highest: int) -> None:
    options: Any = {"precision": "int8", option: value}
    with pytest.raises(UsageError) as error:
        plan_exports(options)
    assert option in str(error.value)
    (plan,) = plan_exports({**options, option: np.float32(highest)})
    budget = plan.request.budget
    expected = {"min_agreement": (1, 1, 0.5), "max_loss": (0.99, 0.995, 100)}[option]  # as the guide has the defaults
    assert (budget.image, budget.text, budget.max_loss) == expected


@pytest.mark.parametrize("option", ["calibration", "min_agreement", "max_loss", "fallback"])
def test_an_option_for_int8_needs_a_target_in_int8(option: str) -> None:
    given: Any = {option: {"calibration": "pairs.csv", "fallback": "fp16"}.get(option, 0.9)}
    refused: list[tuple[dict[str, str], str]] = [
        ({}, "fp32"), ({"precision": "fp16"}, "fp16"), ({"target": "sm86"}, "fp16"), ({"target": "sm86,coreml"}, "fp16")
    ]  # fmt: skip
    for others, precision in refused:
        with pytest.raises(UsageError, match=f"{option} is for precision int8, not {precision}"):
            plan_exports({**others, **given})
    plans = plan_exports({"target": "cpu-x86,sm86", **given})
    assert [plan.request.precision for plan in plans] == ["int8", "fp16"]
