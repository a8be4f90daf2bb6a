"""Build the wheel of the built-in model, for devices without PyTorch: clip-rd-edge-everyday.

python packaging/everyday.py -o dist

Needs `[train,emoji]` and the package build. Once the wheel is installed, `everyday` is its bundle.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from clip_rd_edge import __version__
from clip_rd_edge.api.exporting import NAME, PACKAGE, VERSION, everyday
from clip_rd_edge.cli.console import console_reporter

PROJECT = f"""[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{PACKAGE.replace("_", "-")}"
version = "{VERSION}"
description = "The model `{NAME}` of clip-rd-edge: EfficientNet-Lite0 and MiniLM-L6, joined and quantised."
license = "Apache-2.0"
requires-python = ">=3.10"
dependencies = ["clip-rd-edge>={__version__}"]

[tool.setuptools]
packages = ["{PACKAGE}"]

[tool.setuptools.package-data]
{PACKAGE} = ["{NAME}/**"]
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, type=Path)
    options = parser.parse_args()
    with console_reporter() as reporter:
        bundle = everyday(reporter=reporter)
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / PACKAGE
        package.mkdir()
        (Path(scratch) / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        (package / "__init__.py").write_text(f'"""The bundle `{NAME}` of clip-rd-edge."""\n', encoding="utf-8")
        shutil.copytree(bundle, package / NAME)
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(options.output.resolve()), scratch]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
