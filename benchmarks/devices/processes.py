"""Compare whole processes, in turn, and print their times, peak memory and ratios as JSON.

The processes are `classify` of one image with the labels of the bundle's bank, the same answer with open_clip and eager
torch, and `--help`.

python -m benchmarks.devices.processes quickstart/bundles/int8 quickstart/student/student photo.jpg > processes.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clip_rd_edge.utils.host import machine_name

REFERENCE = Path(__file__).with_name("classify_with_torch.py")
# As on a user's machine, where Python caches its bytecode.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
PACKAGES = ("onnxruntime", "torch", "open_clip_torch", "numpy", "pillow")


@dataclass
class Command:
    """A command with the measurements of its processes, and the output of the last one."""

    arguments: list[str]
    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    output: str = ""

    def run(self) -> None:
        """Run the command once more and measure it from start to exit."""
        start = time.perf_counter()
        process = subprocess.Popen(
            self.arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
        )
        assert process.stdout is not None
        self.output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        self.seconds.append(time.perf_counter() - start)
        process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"error: {' '.join(self.arguments)} exited with code {process.returncode}")
        self.peak_mb.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)

    def summary(self) -> dict[str, Any]:
        """Return the medians, and all times in ascending order."""
        return {
            "command": " ".join(self.arguments),
            "seconds_p50": round(statistics.median(self.seconds), 3),
            "seconds": [round(duration, 3) for duration in sorted(self.seconds)],
            "peak_mb_p50": round(statistics.median(self.peak_mb), 1),
        }

    def top_label(self) -> str:
        """Return the first label of the last JSON output."""
        return str(json.loads(self.output)["predictions"][0]["label"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("student", help="the open_clip folder that the bundle was exported from")
    parser.add_argument("image")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    ours = [sys.executable, "-m", "clip_rd_edge"]
    reference = [sys.executable, str(REFERENCE), args.student, args.bundle, args.image]
    commands = {
        "classify": Command([*ours, "classify", args.bundle, args.image, "--json"]),
        "torch, labels from the bank": Command(reference),
        "torch, labels embedded": Command([*reference, "--embed-labels"]),
        "--help": Command([*ours, "--help"]),
        "python alone": Command([sys.executable, "-c", "pass"]),
    }
    for command in commands.values():
        command.run()  # fills the file cache
        command.seconds.clear()
        command.peak_mb.clear()
    for _ in range(args.rounds):
        for command in commands.values():
            command.run()
    classify, *torch_commands = list(commands.values())[:3]
    ratios = {
        name: {
            "times_faster": round(median_ratio(command.seconds, classify.seconds), 2),
            "times_less_memory": round(median_ratio(command.peak_mb, classify.peak_mb), 2),
            "same_answer": command.top_label() == classify.top_label(),
        }
        for name, command in zip(list(commands)[1:3], torch_commands, strict=True)
    }
    results = {
        "machine": machine_name(),
        "packages": {package: version(package) for package in PACKAGES},
        "rounds": args.rounds,
        "processes": {name: command.summary() for name, command in commands.items()},
        "classify_against": ratios,
    }
    print(json.dumps(results, indent=2))


def median_ratio(reference: list[float], ours: list[float]) -> float:
    """Return the median of the ratios by round; within a round, the machine was equally fast for both."""
    return statistics.median(theirs / own for theirs, own in zip(reference, ours, strict=True))


if __name__ == "__main__":
    main()
