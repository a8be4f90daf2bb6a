"""Failures have the same exit code with --json as without, and stdout then holds JSON or nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("classify B broken.png --labels red green", 2),
        ("classify B broken.png pictures/red.png --labels red green", 2),
        ("classify nothing pictures/red.png --labels red green", 2),
        ("search nothing red", 2),
        ("evaluate B --task nothing", 2),
        ("verify nothing", 2),
        ("verify B", 1),
        ("export nothing -o o", 2),
        ("benchmark --compare nothing nothing", 2),
    ],
)
def test_a_failure_has_its_exit_code_with_json_too(
    command: str,
    code: int,
    colour_bundle: Path,
    colour_images: Path,
    command_line: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = colour_bundle.parent
    monkeypatch.chdir(folder)
    (folder / "broken.png").write_bytes(b"no image")
    words = [{"B": str(colour_bundle)}.get(word, word) for word in shlex.split(command)]
    words = [word.replace("pictures", str(colour_images)) for word in words]
    if command == "verify B":
        (colour_bundle / "image.onnx").write_bytes(b"damaged")
    assert command_line(*words)[0] == code
    json_code, output, _ = command_line(*words, "--json")
    assert json_code == code
    for line in output.splitlines():
        json.loads(line)
