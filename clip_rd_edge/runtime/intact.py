"""Check a bundle's files against the manifest's checksums before they are used, each file once.

Of 72 bundles with one flipped bit, two gave other answers without an error. Hashing costs a second per gigabyte or two,
so a file that was intact is remembered by path, size, inode and times in the user's cache. Whoever changes, copies or
downloads it again changes these: tools may put the modification time back, but none can that of the change (Windows has
none). What decays on the disk changes nothing: `clip-rd-edge verify` hashes every file each time.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from clip_rd_edge.contract.bundle import (
    EXTERNAL_DATA_SUFFIX,
    MANIFEST,
    STAMP_SUFFIX,
    Manifest,
    Tower,
    manifest_is_intact,
)
from clip_rd_edge.contract.formats import format_of
from clip_rd_edge.errors import ConfigError
from clip_rd_edge.utils.files import sha256_of
from clip_rd_edge.utils.paths import cache_home

_MAX_MARKS = 1_000  # files that are remembered
_ONNX = ".onnx"
_HINT = "copy or export the bundle again; clip-rd-edge verify checks every file"


def marks_folder() -> Path:
    """Return the folder with one empty file per file that is known to be intact; it may not exist yet."""
    return cache_home() / "intact"


def require_intact_manifest(folder: Path, manifest: Manifest) -> None:
    """Check a manifest against its own checksum."""
    if manifest.checksum and not manifest_is_intact(folder, manifest):
        raise ConfigError(f"{folder / MANIFEST} has changed since the export: its checksum differs.", hint=_HINT)


def require_intact_tower(folder: Path, manifest: Manifest, tower: Tower) -> None:
    """Check all files of a tower before a runtime opens them: it would read whatever they, or links, lead to."""
    for name in manifest.files_of(tower):
        require_intact(folder, manifest, name)
    weights, package = folder / f"{tower.file}{EXTERNAL_DATA_SUFFIX}", folder / tower.file
    beside = [path for path in (weights, *weights.parents) if folder in path.parents]
    unlisted = [path for path in (*beside, *package.rglob("*")) if not _is_plain(path, folder, manifest)]
    if format_of(manifest.target).is_onnx and package.suffix != _ONNX:  # a runtime takes it for another format
        unlisted.append(package)
    if unlisted:
        raise ConfigError(
            f"{unlisted[0]} is not for a runtime to read: expected a plain file that the manifest lists, and the name "
            "of its format.",
            hint="export the bundle again, or copy it with cp -rL if you trust it",
        )


def _is_plain(path: Path, folder: Path, manifest: Manifest) -> bool:
    """Return whether a path in a bundle is a file that the manifest lists, no file, or absent, and no link."""
    if path.is_symlink():
        return False
    if not manifest.files or path.relative_to(folder).as_posix() in manifest.files or not path.is_file():
        return True
    from clip_rd_edge.contract.outputs import is_left_by_system  # late: hardly any bundle has such a file

    return is_left_by_system(path)


def require_intact(folder: Path, manifest: Manifest, name: str) -> None:
    """Check a file of a bundle, unless it is remembered or the manifest does not have its checksum yet."""
    digest = manifest.files.get(name)
    path = folder / name
    if digest is None or not path.is_file():  # whoever reads a missing file reports it
        return
    if not _has_digest(path, digest):
        raise ConfigError(f"{path} has changed since the export: its SHA-256 differs from the manifest's.", hint=_HINT)


def require_current_engine(folder: Path, manifest: Manifest, tower: Tower, engine: str) -> None:
    """Check that an engine that the device built was built from the bundle's ONNX file.

    A newer bundle that is copied over an older one leaves the older one's engine beside the new ONNX file.

    Args:
        folder, manifest: the bundle.
        tower: the tower, whose manifest entry names no engine.
        engine: name of the engine file; a missing one is reported by whoever opens it.
    """
    path, stamp = folder / engine, folder / f"{engine}{STAMP_SUFFIX}"
    if not path.is_file():
        return
    if not stamp.is_file():
        raise ConfigError(
            f"{path} has no {stamp.name}, so it may have been built from another {tower.file}.",
            hint=f"build it again; if it was built from this one: "
            f"cd {folder} && sha256sum {tower.file} {engine} > {stamp.name}",
        )
    lines = (line.split() for line in stamp.read_text(encoding="utf-8", errors="replace").splitlines())
    digests = {fields[1].removeprefix("*"): fields[0] for fields in lines if len(fields) == 2}
    expected = manifest.files.get(tower.file) or sha256_of(folder / tower.file)
    if digests.get(tower.file) != expected:
        raise ConfigError(f"{path} was built from another {tower.file} than the bundle's.", hint="build it again")
    if not _has_digest(path, digests.get(engine, "")):
        raise ConfigError(f"{path} is not the engine that {stamp.name} was written for.", hint="build it again")


def _has_digest(path: Path, digest: str) -> bool:
    """Return whether a file has a SHA-256, and is self-contained if it is ONNX; one that has and is, is remembered."""
    stat = path.stat()
    times = f"{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
    identity = f"{path.resolve()}\0{stat.st_size}\0{times}\0{stat.st_ino}\0{digest}"
    mark = marks_folder() / hashlib.sha256(os.fsencode(identity)).hexdigest()
    with suppress(OSError):  # a cache in a folder that this user may not enter
        if mark.exists():
            return True
    if sha256_of(path) != digest:
        return False
    if path.suffix == _ONNX:
        from clip_rd_edge.contract.onnx_file import require_self_contained  # late: most files are remembered

        require_self_contained(path)
    with suppress(OSError):  # a full or read-only cache only costs time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        _forget_oldest(mark.parent)
    return True


def _forget_oldest(folder: Path) -> None:
    marks = list(folder.iterdir())
    if len(marks) > _MAX_MARKS:
        for mark in sorted(marks, key=lambda mark: mark.stat().st_mtime_ns)[: len(marks) // 2]:
            mark.unlink(missing_ok=True)
