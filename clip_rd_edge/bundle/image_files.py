"""The image files among what a user names: files, folders with links in them, globs, lists of paths."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from clip_rd_edge.bundle.images import DANGLING, DANGLING_HINT
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.paths import exists, is_folder, near_files, sorted_paths

# Files in a folder with these suffixes count as images. Those that Pillow cannot open are reported on opening.
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif"),  # JFIF is the name that Windows gives to JPEGs from the web
    *(".heic", ".heif", ".hif"),  # HIF is that of cameras from Canon, Fujifilm and Sony
    *(".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pnm"),  # of data sets such as GTSRB
}
# Subfolders that programs other than the user's own put beside images: macOS into its archives, and Synology's NAS.
_FOREIGN_FOLDERS = {"__MACOSX", "@eaDir"}
STDIN = "-"
_SEPARATORS = re.escape(os.sep + (os.altsep or ""))
_ANY_DEPTH = re.compile(rf"(?:^|(?<=[{_SEPARATORS}]))(?:\*\*(?:[{_SEPARATORS}]|$))+")


def _raise(error: InputError) -> None:
    raise error


def find_images(
    names: Iterable[str], *, lines: Iterable[str] = (), on_unreadable: Callable[[InputError], None] = _raise
) -> Iterator[Path]:
    """Yield the image files for each name, in the order of the names; folders and globs are expanded in sorted order.

    Args:
        names: files, folders (searched recursively), globs such as `photos/**/*.jpg`, which some shells do not expand,
            and `-` for `lines`.
        lines: paths without the newline or NUL that ends them; blank ones are skipped.
        on_unreadable: called for each subfolder that cannot be read; the others are searched if it returns.
    """
    for name in names:
        path = Path(name)
        if name == STDIN:
            yield from (Path(line) for line in lines if line.strip())
        elif name and is_folder(path):  # Path("") is the working folder
            yield from _require_any(list_images(path, on_unreadable=on_unreadable), f"The folder {path} has no images.")
        elif name and (exists(path) or path.is_symlink()):
            yield path
        elif glob.has_magic(name):
            matches = (match for match in sorted_paths(_glob(name)) if _look_at(match)[0])
            yield from _require_any(matches, f"No image matches {name}.")
        else:
            raise InputError(f"The image or folder {name} does not exist.{near_files(path)}", hint="check the path")


def _glob(pattern: str) -> set[Path]:
    """Return what a pattern matches; its ** stands for the folders that `list_images` searches.

    That of `glob` follows a link to a folder that it is in again and again, up to 40 times.
    """
    any_depth = _ANY_DEPTH.search(pattern)
    if any_depth is None:
        return {Path(match) for match in glob.glob(pattern)}  # noqa: PTH207  Path.glob takes no absolute patterns
    before, after = pattern[: any_depth.start()], pattern[any_depth.end() :] or "*"
    starts = glob.glob(before) if before else [""]  # noqa: PTH207
    folders = (folder for start in starts for folder, _ in _walk(start or os.curdir))
    return {match for folder in folders for match in _glob(os.path.join(glob.escape(folder), after))}  # noqa: PTH118


def is_ignored(name: str) -> bool:
    """Return whether a file or subfolder of this name is not the user's: hidden, or another program's."""
    return name.startswith(".") or name in _FOREIGN_FOLDERS


def list_images(folder: Path, *, on_unreadable: Callable[[InputError], None] = _raise) -> list[Path]:
    """Return all image files in a folder and its subfolders, sorted, without what `is_ignored`.

    Links are followed, except to a folder that they are in. What cannot be looked at, such as a link to an image that
    does not exist, is returned, so that it counts as an image that cannot be read.

    Args:
        on_unreadable: called for the folder itself and for each subfolder, or link to one, that cannot be read; see
            `find_images`.
    """
    return sorted_paths(image for image, _ in look_at_images(folder, on_unreadable=on_unreadable))


def look_at_images(
    folder: Path, *, on_unreadable: Callable[[InputError], None]
) -> Iterator[tuple[Path, os.stat_result | None]]:
    """Yield the images of `list_images` in any order, each with its stat, or None if it cannot be looked at."""

    def report(error: OSError) -> None:
        on_unreadable(InputError(f"Cannot read the folder {error.filename}: {error.strerror or error}."))

    for path, names in _walk(os.fspath(folder), report):
        for image in (Path(path, name) for name in names if not is_ignored(name)):
            if image.suffix.lower() in IMAGE_SUFFIXES:
                is_file, found = _look_at(image)
                if is_file:
                    yield image, found
            elif leads_nowhere(image):
                on_unreadable(dead_link_error(image))


def _walk(folder: str, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield the folder and its subfolders, without what `is_ignored`, each with the names of its files.

    Links are followed, except to a folder that they are in.
    """
    # Of each folder that is still to be listed, the real paths of it and of those on the way to it.
    chains: dict[str, tuple[str, ...]] = {folder: (os.path.realpath(folder),)}
    for path, subfolders, names in os.walk(folder, onerror=onerror, followlinks=True):
        chain = chains.pop(path)
        followed = []
        for name in subfolders:
            inner = os.path.join(path, name)  # noqa: PTH118  # as os.walk names it
            real = os.path.realpath(inner) if os.path.islink(inner) else os.path.join(chain[-1], name)  # noqa: PTH114, PTH118
            if not is_ignored(name) and real not in chain:  # else it is a link that leads back
                followed.append(name)
                chains[inner] = (*chain, real)
        subfolders[:] = followed
        yield path, names


def leads_nowhere(path: Path) -> bool:
    """Return whether this is a dangling link that, by its name, may be a folder."""
    # Not those of Path, which raise for what cannot be looked at, up to Python 3.13.
    return not path.suffix and os.path.islink(path) and not os.path.exists(path)  # noqa: PTH110, PTH114


def dead_link_error(folder: Path) -> InputError:
    """Return the error for a folder that `leads_nowhere`."""
    return InputError(f"Cannot read the folder {folder}: {DANGLING}.", hint=DANGLING_HINT)


def _look_at(path: Path) -> tuple[bool, os.stat_result | None]:
    """Return whether this is a file, or something whose error only opening it shows; and its stat.

    The latter is a link that leads to nothing, or what cannot be looked at.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path.is_symlink(), None
    except OSError:
        return True, None
    return stat.S_ISREG(found.st_mode), found


def _require_any(paths: Iterable[Path], message: str) -> Iterator[Path]:
    empty = True
    for path in paths:
        empty = False
        yield path
    if empty:
        raise InputError(message, hint=f"name image files ({', '.join(sorted(IMAGE_SUFFIXES))}), or a folder of them")
