"""Pairs from files that lie one by one: a CSV or TSV table in open_clip's conventions, the emoji set."""

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
    """Pairs by path; it satisfies `data.pairs.Pairs`.

    Attributes:
        images: N paths.
        texts: N non-empty tuples of captions that say the same.
        left_out: empty: what a table names has to be there.
    """

    name: str
    images: tuple[Path, ...]
    texts: tuple[tuple[str, ...], ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def open(self, index: int) -> Image.Image:
        """The picture as RGB; raises InputError where it cannot be read."""
        return open_image(self.images[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions."""
        return self.texts[index]

    def identity(self) -> Iterator[bytes]:
        """What tells these pairs from others: names of the pictures and their captions."""
        for path, captions in zip(self.images, self.texts, strict=True):
            yield f"{path.name}\0{len(captions)}\0".encode() + "\0".join(captions).encode()


def read_table(path: Path, *, image_key: str, caption_key: str, separator: str | None) -> TablePairs:
    """Read pairs from a CSV or TSV file; arguments and errors as `data.pairs.load_pairs`."""
    if not path.is_file():
        raise InputError(
            f"There is no data file {path}.",
            hint="give a CSV with the columns filepath,title, shards (….tar), or emoji",
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
                place = f"{path}, line {rows.line_num}"
                images.append(_existing_picture(row[image_key], path.parent, place))
                caption = (row[caption_key] or "").strip()
                if not caption:
                    raise InputError(f"{place}: the caption in column {caption_key!r} is empty.")
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
            hint=f"name it with {option}",
        )


def _existing_picture(name: str | None, folder: Path, place: str) -> Path:
    for candidate in (Path(name or ""), folder / (name or "")):
        if name and candidate.is_file():
            return candidate.resolve()
    raise InputError(f"{place}: there is no picture {name!r}, neither here nor in {folder}.")
