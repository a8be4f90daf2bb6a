"""How much room the packages that run a bundle take here: clip-rd-edge's own and what they ask for, extras aside."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import cache_from_source
from pathlib import Path

import msgspec


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a package takes on disk.

    Attributes:
        size_bytes: all its files, the compiled ones, too.
        compiled_bytes: those of them that Python made of its sources, and makes again when they are missing.
    """

    package: str
    size_bytes: int
    compiled_bytes: int


def footprints(package: str) -> list[Footprint]:
    """The package and all that it needs, greatest first; what is not installed takes no room."""
    found: dict[str, Footprint] = {}
    wanted = [package]
    while wanted:
        name = wanted.pop()
        if name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # asked for on another system or another Python only
        found[name] = _footprint(name, installed)
        wanted += _needs(installed)
    return sorted(found.values(), key=lambda each: (-each.size_bytes, each.package))


def _needs(installed: Distribution) -> list[str]:
    """Names of the packages that it asks for whatever extras are wanted, as PEP 503 writes them."""
    names = []
    for line in installed.requires or []:
        requirement, _, marker = line.partition(";")
        if "extra" not in marker and (match := re.match(r"[\w.-]+", requirement)):
            names.append(re.sub(r"[-_.]+", "-", match[0]).lower())
    return names


def _footprint(name: str, installed: Distribution) -> Footprint:
    # pip lists what it compiled itself, and not what was compiled when it was first imported: looked for in both cases.
    files = [Path(str(file.locate())) for file in installed.files or [] if file.suffix != ".pyc"]
    compiled = sum(_size(Path(cache_from_source(str(file)))) for file in files if file.suffix == ".py")
    return Footprint(package=name, size_bytes=sum(map(_size, files)) + compiled, compiled_bytes=compiled)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
