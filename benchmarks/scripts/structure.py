"""How much of the package a command goes through: files entered, and the deepest call below the command.

    python benchmarks/scripts/structure.py quickstart      # a finished quickstart's folder; some minutes

A file counts when one of its functions is called, module level aside. Depth counts frames of the package alone, from
the command's function on, in any thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image

import clip_rd_edge
from clip_rd_edge.benchmarking.formatting import markdown_table
from clip_rd_edge.cli.main import cli

PACKAGE = str(Path(clip_rd_edge.__file__).parent)


class Tracer:
    """Follows calls into the package."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.deepest: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(PACKAGE) or frame.f_code.co_name == "<module>":
            return
        self.files.add(path)
        stack: list[str] = []
        current: FrameType | None = frame
        while current is not None:
            name, file = current.f_code.co_name, current.f_code.co_filename
            if file.startswith(PACKAGE) and not name.startswith("<"):
                if name == "command" and "/cli/" in file:
                    break
                stack.append(f"{Path(file).stem}.{name}")
            current = current.f_back
        if current is not None and len(stack) > len(self.deepest):
            self.deepest = stack[::-1]


def trace(arguments: Sequence[str | Path]) -> Tracer:
    """Run a command in this process and follow it."""
    tracer = Tracer()
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    try:
        cli.main(args=list(map(str, arguments)), prog_name="clip-rd-edge", standalone_mode=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return tracer


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the files and frames that commands go through.")
    parser.add_argument("quickstart", type=Path)
    folder = parser.parse_args().quickstart.resolve()
    rows = [["command", "files entered", "deepest call, frames", ""]]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        suite = out / "suite.yaml"
        suite.write_text(
            f"name: s\nroot: {folder}\nrounds: 2\ntasks: ['emoji:unseen-style']\nrows:\n"
            "- {label: A, role: student, model: student}\n- {label: B, role: exported, model: bundles/fp32}\n"
        )
        image = out / "image.png"
        Image.new("RGB", (96, 64), "red").save(image)
        commands: dict[str, list[str | Path]] = {
            "export --precision int8": ["export", folder / "student", "--precision", "int8", "-o", out / "bundle"],
            "distill": [
                "distill", "--data", "emoji", "--teacher", folder / "teacher", "--student", "resnet10t", "--steps", "3",
                "--batch-size", "8", "--image-size", "64", "--text", "tiny", "--workers", "0", "-o", out / "run",
            ],
            "classify": ["classify", folder / "bundles/int8", image, "--labels", "a cat", "a dog"],
            "benchmark": ["benchmark", suite, "-o", out / "report"],
        }  # fmt: skip
        for name, arguments in commands.items():
            tracer = trace(arguments)
            rows.append([name, str(len(tracer.files)), str(len(tracer.deepest)), " → ".join(tracer.deepest)])
    print(markdown_table(rows, left=(0, 3)))


if __name__ == "__main__":
    main()
