"""Run a bundle with the oldest and the newest release of every runtime dependency, on each Python that is here.

python -m benchmarks.devices.floors BUNDLE -o benchmarks/results/MACHINE/floors.json \\
    --readme benchmarks/measurements/releases.md

Environments are made in a scratch folder with uv (`pip install uv`), from wheels alone. The oldest releases are the
lowest that pyproject.toml allows and that exist for the Python; pyenv's Pythons are found by themselves. In each
environment, `verify` must pass on the bundle, whose answers it compares with the exporter's, and `classify` answer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import tomllib
from PIL import Image

from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.benchmarking.tables import markdown_table

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
RESOLUTIONS = {"oldest": "lowest-direct", "newest": "highest"}
TIMEOUT_S = 600


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one environment did: versions by package, and an empty `error` if the bundle ran."""

    python: str
    releases: str
    versions: dict[str, str]
    error: str


def interpreters() -> dict[str, Path]:
    """Return the Pythons of PYTHONS that pyenv has, by version."""
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in PYTHONS:
        candidates = sorted(folder.glob(f"{version}.*/bin/python"))
        if candidates:
            found[version] = candidates[-1]
    return found


def run(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run a command and return its stdout; raise RuntimeError with its message if it fails."""
    result = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment
    )
    if result.returncode != 0:
        lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error")] or lines[-1:]
        raise RuntimeError(f"{' '.join(map(str, command[:4]))}: {' '.join(errors) or result.returncode}")
    return result.stdout


def measure(python: Path, version: str, releases: str, bundle: Path, scratch: Path) -> Outcome:
    """Make one environment and run the bundle in it."""
    venv = scratch / f"{version}-{releases}"
    versions: dict[str, str] = {}
    try:
        run("uv", "venv", "--quiet", "--python", python, venv)
        project, resolution = ROOT / "pyproject.toml", RESOLUTIONS[releases]
        run("uv", "pip", "install", "--quiet", "--python", venv / "bin" / "python", "--only-binary", ":all:",
            "--resolution", resolution, "--requirements", project)  # fmt: skip
        installed = json.loads(run("uv", "pip", "list", "--python", venv / "bin" / "python", "--format", "json"))
        names = {re.split(r"[<>=~\[]", line)[0].lower() for line in dependencies()}
        versions = {package["name"]: package["version"] for package in installed if package["name"].lower() in names}
        environment = {"PATH": os.environ["PATH"], "HOME": str(scratch), "PYTHONPATH": str(ROOT)}
        edge = (venv / "bin" / "python", "-W", "error::DeprecationWarning:clip_rd_edge", "-m", "clip_rd_edge")
        run(*edge, "verify", bundle, environment=environment)
        image = scratch / "image.png"
        Image.new("RGB", (80, 60), (200, 40, 30)).save(image)
        answer = run(*edge, "classify", bundle, image, "--labels", "red", "blue", "--json", environment=environment)
        if not json.loads(answer.splitlines()[0]):
            raise RuntimeError("classify gave no answer")
    except (RuntimeError, OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return Outcome(python=version, releases=releases, versions=versions, error=str(error))
    return Outcome(python=version, releases=releases, versions=versions, error="")


def dependencies() -> list[str]:
    """Return the runtime dependencies as pyproject.toml has them."""
    lines: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return lines


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as Markdown."""
    names = sorted({name for outcome in outcomes for name in outcome.versions}, key=str.lower)
    rows = [["Python", "Releases", *names, "Runs"]]
    for outcome in outcomes:
        runs = "yes" if not outcome.error else f"no: {outcome.error}"
        rows.append([outcome.python, outcome.releases, *(outcome.versions.get(name, "") for name in names), runs])
    return markdown_table(rows, left=range(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an ONNX bundle")
    add_output_options(parser, "floors")
    options = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        for version, python in interpreters().items():
            for releases in RESOLUTIONS:
                outcomes.append(measure(python, version, releases, options.bundle.resolve(), Path(scratch)))
                print(outcomes[-1], file=sys.stderr, flush=True)
    publish({**here_and_now(), "outcomes": msgspec.to_builtins(outcomes)}, table(outcomes), options)
    sys.exit(any(outcome.error for outcome in outcomes))


if __name__ == "__main__":
    main()
