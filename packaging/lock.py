"""Resolve what this repository's own commands install, for every supported Python and system, into requirements.lock.

    make lock              # what pyproject.toml asks for now; a version that still fits stays
    make lock UPGRADE=1    # the newest of everything
    python packaging/lock.py --latest -o FILE   # for this Python and system alone; --lowest: see make test-lowest

Both of the first print what changed, and renew the table of licences. Users who install the package by pip get what the
ranges in pyproject.toml allow; the lock is for clones.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.markers import Marker

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
INSTALLED = ("train", "emoji", "dev", "docs")  # extras of `make install`
# Extras that `make dist` installs, each by itself: in minutes, on any machine. The others need a GPU, or gigabytes.
CHECKED = ("demo", "serve", "camera", "remote", "wandb")
TOOLS = ("editables", "hatchling", "pip")  # with which `make install` installs
RELEASE_TOOLS = ("build", "twine", "uv")  # of `make dist` and `make lock`
# Extras whose lowest versions are tested. `emoji`, which hardly has a range, would bring the newest transformers.
_LOWEST_OF = ("train", "demo", "serve", "remote", "parquet")
_SUPPORTED = [
    {"sys_platform": system, "python_version": f"3.{minor}", "python_full_version": f"3.{minor}.9"}
    for system in ("linux", "darwin", "win32")
    for minor in range(10, 15)
]

_HEADER = """\
# What `make install`, `make test` and `make docs` install, with every file's hash; `make lock` renews it.
# pip install --no-deps --require-hashes -r requirements.lock
# Without an NVIDIA GPU, make first takes PyTorch's builds for CPUs of these versions, whose index offers no hashes that
# could stand here: their files have other names and bytes than PyPI's of the same version.
"""
_CUDA = """
# CUDA: what PyPI's torch for Linux brings, and its builds for CPUs do not.
"""
_RELEASE = """
# Release: what else `make dist` and `make lock` install.
"""
_BLOCK = re.compile(r"^([a-z0-9][^=\s]*)==(\S+)(?: ; (.+?))? \\\n((?:[ ].*\n)+)", re.MULTILINE)


class Pin(NamedTuple):
    """A version of a package in a lock."""

    name: str
    version: str
    marker: str  # where it is installed; empty for everywhere
    parents: tuple[str, ...]  # packages that require it; with a space in its name: pyproject.toml
    text: str

    @property
    def is_of_cuda(self) -> bool:
        return self.name.startswith(("nvidia-", "cuda-")) or self.name == "triton"


def read_lock(text: str | None = None) -> list[Pin]:
    """Return the pins of requirements.lock, or of its content."""
    content = LOCK.read_text(encoding="utf-8") if text is None else text
    return [
        Pin(match[1], match[2], match[3] or "", tuple(re.findall(r"^ +#(?: via|  ) (\S.*)$", match[4], re.M)), match[0])
        for match in _BLOCK.finditer(content)
    ]


def reached(pins: Sequence[Pin], roots: Iterable[str]) -> set[str]:
    """Return the names of these packages and of all that they require, directly or through others."""
    children: dict[str, set[str]] = {}
    for pin in pins:
        for parent in pin.parents:
            children.setdefault(parent, set()).add(pin.name)
    found, pending = set[str](), set(roots)
    while pending:
        found.add(name := pending.pop())
        pending |= children.get(name, set()) - found
    return found


def constraints(pins: Sequence[Pin]) -> str:
    """Return the versions alone, as pip takes them with --constraint: beside hashes, it would ask for all hashes."""
    return "".join(f"{pin.name}=={pin.version}{f' ; {pin.marker}' if pin.marker else ''}\n" for pin in pins)


def resolve(options: Sequence[str], *, extras: Sequence[str], known: str = "", pinned: str = "") -> str:
    """Return uv's resolution of the extras and the tools.

    Args:
        known: a lock, whose versions stay where they fit.
        pinned: constraints.
    """
    with tempfile.TemporaryDirectory() as name:
        output, constraint = Path(name, "lock"), Path(name, "constraints")
        output.write_text(known, encoding="utf-8")
        constraint.write_text(pinned, encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--generate-hashes"]
        command += [*options, "--constraints", str(constraint), "--output-file", str(output)]
        command += [f"--extra={extra}" for extra in extras]
        tools = "\n".join((*TOOLS, *RELEASE_TOOLS))
        subprocess.run([*command, "pyproject.toml", "-"], cwd=ROOT, input=tools, text=True, check=True)
        return output.read_text(encoding="utf-8")


def arranged(text: str) -> str:
    """Return a resolution in the three parts of requirements.lock."""
    from licences import canonical, requirements

    pins = [pin for pin in read_lock(text) if not pin.marker or any(map(Marker(pin.marker).evaluate, _SUPPORTED))]
    direct = requirements()
    roots = {canonical(line.name) for extra in ("-", *INSTALLED) for line in direct[extra]}
    installed = reached(pins, roots | set(TOOLS))
    parts = ["", "", ""]
    for pin in pins:
        parts[1 if pin.is_of_cuda else 0 if pin.name in installed else 2] += pin.text
    return _HEADER + parts[0] + _CUDA + parts[1] + _RELEASE + parts[2]


def changes(old: Sequence[Pin], new: Sequence[Pin]) -> list[str]:
    """Return a line for each package whose versions differ."""
    before, after = ({(pin.name, pin.version, pin.marker) for pin in pins} for pins in (old, new))
    gone, come = sorted(before - after), sorted(after - before)

    def shown(pins: list[tuple[str, str, str]], name: str) -> str:
        return (
            ", ".join(f"{version} {marker}".strip() for found, version, marker in pins if found == name) or "not there"
        )

    names = sorted({name for name, _, _ in gone + come})
    return [f"{name}: {shown(gone, name)} → {shown(come, name)}" for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions, also where the old ones fit")
    parser.add_argument("--latest", action="store_true", help="the newest versions, for this Python and system alone")
    parser.add_argument("--lowest", action="store_true", help="the lowest that pyproject.toml allows, for the same")
    parser.add_argument("-o", "--output", type=Path, default=LOCK)
    args = parser.parse_args()
    extras = (*INSTALLED, *CHECKED)
    if args.latest or args.lowest:
        here = ["--no-config", "--python", sys.executable]
        pinned = ""
        if args.lowest:  # of what users install; the tools that check it stay new
            lowest = read_lock(resolve([*here, "--resolution", "lowest-direct"], extras=_LOWEST_OF))
            direct = [pin for pin in lowest if any("pyproject.toml" in parent for parent in pin.parents)]
            pinned = constraints(direct)
            print(pinned, end="")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(arranged(resolve(here, extras=extras, pinned=pinned)), encoding="utf-8")
        return 0
    import licences

    old = LOCK.read_text(encoding="utf-8") if LOCK.is_file() else ""
    new = arranged(
        resolve(["--universal", "--python-version", "3.10"], extras=extras, known="" if args.upgrade else old)
    )
    if new != old:
        args.output.write_text(new, encoding="utf-8")
    print("\n".join(changes(read_lock(old), read_lock(new))) or "requirements.lock has not changed")
    return licences.renew(read_lock(new))


if __name__ == "__main__":
    sys.exit(main())
