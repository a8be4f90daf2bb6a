"""Pairs from individual image files: a CSV or TSV table in open_clip's conventions, or the emoji data set."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_rd_edge.contract.images import open_image
from clip_rd_edge.errors import InputError, near_matches

_SEPARATORS = (",", "\t", ";", "|")  # Excel writes semicolons where the comma is the decimal sign
_GROUP_ROWS = 4096


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
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            separator = separator or _separator_of(path, header, {image_key, caption_key})
            rows = csv.DictReader(file, delimiter=separator)
            for key, option in ((image_key, "--csv-img-key"), (caption_key, "--csv-caption-key")):
                _require_column(path, list(rows.fieldnames or []), key, option)
            for row in rows:
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
        raise InputError(f"{path}, line {rows.line_num}: {error}.") from error
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


def _find_image(name: str | None, folder: Path) -> Path | None:
    for candidate in (Path(name or ""), folder / (name or "")):
        if name and candidate.is_file():
            return candidate.resolve()
    return None
