"""Not a test: whole processes side by side, in turn: `classify` of one picture with the labels of the bundle's bank,
the same answer by open_clip and torch eager, and `--help`. Prints JSON: seconds, peak memory, ratios.

python benchmarks/scripts/processes.py quickstart/bundles/int8 quickstart/student/student photo.jpg > processes.json
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
# As users have it: Python keeps what it compiles.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
PACKAGES = ("onnxruntime", "torch", "open_clip_torch", "numpy", "pillow")


@dataclass
class Command:
    """A command, what its processes took, and what the last one said."""

    arguments: list[str]
    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    output: str = ""

    def run(self) -> None:
        """Run it once more, from start to exit."""
        began = time.perf_counter()
        process = subprocess.Popen(
            self.arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT
        )
        assert process.stdout is not None
        self.output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        self.seconds.append(time.perf_counter() - began)
        process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"error: {' '.join(self.arguments)} ended with {process.returncode}")
        self.peak_mb.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)

    def measured(self) -> dict[str, Any]:
        """Medians, and between which the others lie."""
        return {
            "command": " ".join(self.arguments),
            "seconds_p50": round(statistics.median(self.seconds), 3),
            "seconds": [round(each, 3) for each in sorted(self.seconds)],
            "peak_mb_p50": round(statistics.median(self.peak_mb), 1),
        }

    def best_label(self) -> str:
        """The first label of the JSON line that it printed."""
        return str(json.loads(self.output)["predictions"][0]["label"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("student", help="the open_clip folder that the bundle was exported from")
    parser.add_argument("picture")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    ours = [sys.executable, "-m", "clip_rd_edge"]
    theirs = [sys.executable, str(REFERENCE), given.student, given.bundle, given.picture]
    commands = {
        "classify": Command([*ours, "classify", given.bundle, given.picture, "--json"]),
        "torch, labels from the bank": Command(theirs),
        "torch, labels embedded": Command([*theirs, "--embed-labels"]),
        "--help": Command([*ours, "--help"]),
        "python alone": Command([sys.executable, "-c", "pass"]),
    }
    for command in commands.values():
        command.run()  # what lies in no file cache yet is read
        command.seconds.clear()
        command.peak_mb.clear()
    for _ in range(given.rounds):
        for command in commands.values():
            command.run()
    classify, *torch_ways = list(commands.values())[:3]
    ratios = {
        name: {
            "times_faster": round(median_ratio(command.seconds, classify.seconds), 2),
            "times_less_memory": round(median_ratio(command.peak_mb, classify.peak_mb), 2),
            "same_answer": command.best_label() == classify.best_label(),
        }
        for name, command in zip(list(commands)[1:3], torch_ways, strict=True)
    }
    found = {
        "machine": machine_name(),
        "packages": {package: version(package) for package in PACKAGES},
        "rounds": given.rounds,
        "processes": {name: command.measured() for name, command in commands.items()},
        "classify_against": ratios,
    }
    print(json.dumps(found, indent=2))


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over the rounds, within each of which the machine was as fast for both."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


if __name__ == "__main__":
    main()
