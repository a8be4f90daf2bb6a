"""Pairs from individual image files: a CSV or TSV table in open_clip's conventions, or the emoji data set."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_rd_edge.contract.images import open_image
from clip_rd_edge.errors import InputError, near_matches


@dataclass(frozen=True)
class TablePairs:
    """Pairs of image paths and captions; implements `data.pairs.Pairs`.

    Attributes:
        images: N paths.
        texts: N non-empty tuples of equivalent captions.
        left_out: empty: every row of a table must be valid.
    """

    name: str
    images: tuple[Path, ...]
    texts: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        """Return the image as RGB; raises InputError if it cannot be read."""
        return open_image(self.images[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """Return all captions."""
        return self.texts[index]

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify these pairs: the names of the images, and the captions."""
        for path, captions in zip(self.images, self.texts, strict=True):
            yield f"{path.name}\0{len(captions)}\0".encode() + "\0".join(captions).encode()


def read_table(path: Path, *, image_key: str, caption_key: str, separator: str | None) -> TablePairs:
    """Read pairs from a CSV or TSV file; arguments and errors as for `data.pairs.load_pairs`."""
    if not path.is_file():
        raise InputError(
            f"The data file {path} does not exist.",
            hint="name a CSV file with the columns filepath,title, shards (….tar), or emoji",
        )
    images: list[Path] = []
    captions: list[tuple[str, ...]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            rows = csv.DictReader(file, delimiter=separator or _separator_of(path, header))
            for key, option in ((image_key, "--csv-img-key"), (caption_key, "--csv-caption-key")):
                _require_column(path, list(rows.fieldnames or []), key, option)
            for row in rows:
                location = f"{path}, line {rows.line_num}"
                images.append(_find_image(row[image_key], path.parent, location))
                caption = (row[caption_key] or "").strip()
                if not caption:
                    raise InputError(f"{location}: the caption in column {caption_key!r} is empty.")
                captions.append((caption,))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    return TablePairs(str(path), tuple(images), tuple(captions))


def _separator_of(path: Path, header: str) -> str:
    if path.suffix == ".tsv" or "\t" in header:
        return "\t"
    return ","


def _require_column(path: Path, columns: list[str], key: str, option: str) -> None:
    if key not in columns:
        raise InputError(
            f"{path} has no column {key!r}; its columns are {', '.join(map(repr, columns)) or 'none'}."
            f"{near_matches(key, columns)}",
            hint=f"name the column with {option}",
        )


def _find_image(name: str | None, folder: Path, location: str) -> Path:
    for candidate in (Path(name or ""), folder / (name or "")):
        if name and candidate.is_file():
            return candidate.resolve()
    raise InputError(f"{location}: the image {name!r} exists neither in the working directory nor in {folder}.")
