"""Which pictures a user means by files, folders, globs and a list of paths."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from clip_rd_edge.errors import InputError

# By which a folder's pictures are told from other files. What Pillow cannot open of them is reported when it is met.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"}
FROM_LIST = "-"


def find_pictures(names: Iterable[str], *, listed: Iterable[str] = ()) -> Iterator[Path]:
    """The pictures that are meant by each name, in the order of the names; folders and globs are sorted.

    Args:
        names: files, folders (searched through), globs such as `photos/**/*.jpg`, which some shells leave to the
            program, and `-` for `listed`.
        listed: lines with a path each, such as sys.stdin.

    Raises:
        InputError: a file or folder is not there, a folder has no pictures, or a glob matches nothing.
    """
    for name in names:
        path = Path(name)
        if name == FROM_LIST:
            yield from (Path(line.rstrip("\r\n")) for line in listed if line.strip())
        elif path.is_dir():
            yield from _found(pictures_below(path), f"The folder {path} has no pictures.")
        elif path.exists():
            yield path
        elif glob.has_magic(name):
            # Path.glob takes no absolute pattern.
            matches = (Path(match) for match in sorted(glob.glob(name, recursive=True)))  # noqa: PTH207
            yield from _found((match for match in matches if match.is_file()), f"No picture matches {name}.")
        else:
            raise InputError(f"There is no picture or folder {name}.", hint="check the path")


def pictures_below(folder: Path) -> list[Path]:
    """Every picture in a folder and its sub-folders, sorted; hidden files, folders and their contents are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _found(paths: Iterable[Path], otherwise: str) -> Iterator[Path]:
    none = True
    for path in paths:
        none = False
        yield path
    if none:
        raise InputError(otherwise)
