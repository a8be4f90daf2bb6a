"""Pairs from individual image files: a CSV or TSV table in open_clip's conventions, or the emoji data set."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_rd_edge.contract.images import open_image
from clip_rd_edge.errors import InputError, near_matches

_SEPARATORS = (",", "\t", ";", "|")  # Excel writes semicolons where the comma is the decimal sign
_GROUP_ROWS = 4096
_MAX_HEADER = 100_000  # characters


@dataclass(frozen=True)
class TablePairs:
    """Pairs of image paths and captions; implements `data.pairs.Pairs`.

    Attributes:
        images: N paths.
        texts: N non-empty tuples of equivalent captions.
        left_out: messages about rows without an existing image or a caption.
    """

    name: str
    images: tuple[Path, ...]
    texts: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def groups(self) -> Sequence[int]:
        """Sizes of blocks of rows: image files lie apart, so that any block serves."""
        return [min(_GROUP_ROWS, len(self) - start) for start in range(0, len(self), _GROUP_ROWS)]

    def prefetch(self, groups: Sequence[int]) -> None:
        """Do nothing: the images are local files."""

    def open(self, index: int) -> Image.Image:
        """Return the image as RGB; raises InputError if it cannot be read."""
        return open_image(self.images[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """Return all captions."""
        return self.texts[index]

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify these pairs: the images' names and sizes in bytes, and the captions."""
        for path, captions in zip(self.images, self.texts, strict=True):
            size = path.stat().st_size if path.is_file() else -1
            yield f"{path.name}\0{size}\0{len(captions)}\0".encode() + "\0".join(captions).encode()


def read_table(path: Path, *, image_key: str, caption_key: str, separator: str | None) -> TablePairs:
    """Read pairs from a CSV or TSV file; arguments and errors as for `data.pairs.load_pairs`.

    A row that is not a pair is left out with a message that names its line.
    """
    if not path.is_file():
        raise InputError(
            f"The data file {path} does not exist.",
            hint="name a CSV file with the columns filepath,title, shards (….tar), or emoji",
        )
    images: list[Path] = []
    captions: list[tuple[str, ...]] = []
    left_out: list[str] = []
    last_line = 0  # of the rows that were read
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline(_MAX_HEADER)
            file.seek(0)
            separator = separator or _separator_of(path, header, {image_key, caption_key})
            rows = csv.DictReader(file, delimiter=separator, strict=True)
            for key, option in ((image_key, "--csv-img-key"), (caption_key, "--csv-caption-key")):
                _require_column(path, list(rows.fieldnames or []), key, option)
            last_line = rows.line_num
            for row in rows:
                first_line, last_line = last_line + 1, rows.line_num
                if last_line > first_line:
                    _require_no_rows_within(path, row, (image_key, caption_key), separator, first_line)
                image = _find_image(row[image_key], path.parent)
                caption = (row[caption_key] or "").strip()
                if image is None:
                    reason = (
                        f"the image {row[image_key]!r} exists neither in the working directory nor in {path.parent}"
                    )
                elif not caption:
                    reason = f"the caption in column {caption_key!r} is empty"
                elif any(row.get(None) or ()):  # the fields beyond the header's
                    reason = f"it has more fields than the header; a caption with {separator!r} needs quotes"
                else:
                    images.append(image)
                    captions.append((caption,))
                    continue
                left_out.append(f"{path}, line {rows.line_num}: {reason}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except csv.Error as error:
        raise InputError(
            f"{path}, line {last_line + 1}: {error}.",
            hint='a quote that begins a field must end it, and is doubled within it: "a 5"" nail"',
        ) from error
    return TablePairs(str(path), tuple(images), tuple(captions), tuple(left_out))


def _separator_of(path: Path, header: str, keys: set[str]) -> str:
    """Return the separator that splits the header into columns with these names, else the one that seems likeliest."""
    for separator in _SEPARATORS:
        if keys <= set(next(csv.reader([header], delimiter=separator), ())):
            return separator
    return "\t" if path.suffix == ".tsv" else max(_SEPARATORS, key=header.count)


def _require_column(path: Path, columns: list[str], key: str, option: str) -> None:
    if key not in columns:
        raise InputError(
            f"{path} has no column {key!r}; its columns are {', '.join(map(repr, columns)) or 'none'}."
            f"{near_matches(key, columns)}",
            hint=f"name the column with {option}",
        )


def _require_no_rows_within(
    path: Path, row: dict[str, str | None], keys: tuple[str, str], separator: str, first_line: int
) -> None:
    """Check that a row of several lines is one pair, and not several that a stray quote joined.

    A caption may hold newlines, but then none of its lines is a row with an image that exists.
    """
    columns = list(row)
    position = columns.index(keys[0])
    for value in (row[key] or "" for key in keys):
        for line in value.splitlines()[1:]:
            fields = line.split(separator)
            if position < len(fields) and _find_image(fields[position].strip('"'), path.parent):
                raise InputError(
                    f"{path}, line {first_line}: a quoted field holds the row of the image {fields[position]!r}; "
                    "expected a quote at its end.",
                    hint="remove the stray quote, or quote the whole field and double each quote within it",
                )


def _find_image(name: str | None, folder: Path) -> Path | None:
    for candidate in (Path(name or ""), folder / (name or "")):
        if name and os.path.isfile(candidate):  # noqa: PTH113  False also for a name that is too long
            return candidate.resolve()
    return None
