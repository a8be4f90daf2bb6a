"""Pairs of pictures and captions, whatever they come from."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from clip_rd_edge.errors import InputError, UsageError, near_matches


@dataclass(frozen=True)
class Pairs:
    """N pictures, each with one caption or more that say the same; training picks one a view.

    Attributes:
        name: as logs and provenance show it.
        images: N paths.
        captions: N non-empty tuples.
    """

    name: str
    images: tuple[Path, ...]
    captions: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.images)


def load_pairs(
    source: str, *, image_key: str = "filepath", caption_key: str = "title", separator: str | None = None
) -> Pairs:
    """Load pairs for training.

    Args:
        source: `emoji` for the embedded data set's training pairs, or the path of a CSV or TSV file with a header, in
            open_clip's conventions. Relative picture paths count from where the command runs, as in open_clip, else
            from the table's folder.
        image_key, caption_key: names of the two columns.
        separator: None means tab for `.tsv`, and for others what the header holds.

    Raises:
        InputError: no such file, a missing column, a missing picture, an empty caption, or fewer than two pairs.
    """
    if source == "emoji":
        from clip_rd_edge.data.emoji import training_pairs

        return training_pairs()
    return _from_table(Path(source), image_key, caption_key, separator)


def _from_table(path: Path, image_key: str, caption_key: str, separator: str | None) -> Pairs:
    if not path.is_file():
        raise InputError(f"There is no data file {path}.", hint="give a CSV with the columns filepath,title, or emoji")
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
    if len(images) < 2:
        raise InputError(f"{path} has {len(images)} pairs; a contrastive loss needs at least 2.")
    return Pairs(str(path), tuple(images), tuple(captions))


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


def require_batch(pairs: Pairs, batch_size: int, *, processes: int = 1) -> None:
    """Refuse a batch that the pairs cannot fill, one without negatives, or one that processes cannot share.

    Raises:
        UsageError: fewer than two pairs a step, more than there are, or not the same number for each process.
    """
    if batch_size < 2:
        raise UsageError(f"The batch size is {batch_size}; a contrastive loss needs at least 2 pairs a step.")
    if batch_size > len(pairs):
        raise UsageError(
            f"The batch size is {batch_size}, but {pairs.name} has only {len(pairs)} pairs.",
            hint=f"--batch-size {len(pairs)} or less",
        )
    if batch_size % processes:
        raise UsageError(f"The batch size is {batch_size}, which {processes} processes cannot share evenly.")
