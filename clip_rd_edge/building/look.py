"""The first stages of a build: look at the images, and hold a part of them back.

look.json   what was found, and the part of each image; written last
look.html   the images that somebody should look at
train.csv   what is trained on, as `distill --data` takes it
held-out/   a task for `evaluate`: test/, which the report is of, and val/, which chooses among students; class folders
            whose images are links to the user's, or copies on another disk. For captions, tables of the same names
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.data.folders import CLASS_NAMES, Folder, class_name, image_samples, subfolders
from clip_rd_edge.data.load import load_pairs, names_shards
from clip_rd_edge.data.look import CHOSEN_BY, Part, Seen, groups_of, hold_back, see_all
from clip_rd_edge.data.samples import Samples, fingerprint
from clip_rd_edge.data.tables import Table
from clip_rd_edge.data.tasks import TEMPLATES
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.files import write_bytes, write_text
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.paths import Typed, is_file, is_folder
from clip_rd_edge.utils.structs import read_json, to_json
from clip_rd_edge.utils.text import SILENT, Reporter

LOOK, PAGE, TRAIN, HELD_OUT = "look.json", "look.html", "train.csv", "held-out"
_FEW = 10  # images: a class with fewer is named
_REPEATED = 3  # captions that come as often, on average, are the names of classes
_SHOWN, _THUMB_EDGE = 24, 96  # images of a kind on the page, and their edge in pixels
Kind = Literal["classes", "captions", "images"]


class Row(msgspec.Struct, frozen=True):
    """An image file, its caption or the name of its class, its part, and the number of its duplicates' group."""

    path: str
    caption: str
    part: Part | Literal["left out"]
    group: int


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What a build has found in its data.

    Attributes:
        key: a digest of the images' names and sizes, and of how they are to be divided.
        kind: images in classes, with captions of their own, or without either.
        labels: the names of the classes, or those that were given; empty for captions.
        edge: of the images in pixels: the median of their shorter ones.
        lines: what was found, a line each.
    """

    key: str
    kind: Kind
    labels: tuple[str, ...]
    edge: int
    lines: tuple[str, ...]
    rows: tuple[Row, ...]

    def of(self, part: Part) -> list[Row]:
        """Return the rows of a part."""
        return [row for row in self.rows if row.part == part]


@dataclass(frozen=True)
class _Source:
    """Image files, with the caption of each, or without any."""

    kind: Kind
    paths: list[Path]
    captions: list[str]
    labels: tuple[str, ...]
    samples: Samples


def look(
    data: Typed,
    folder: Path,
    *,
    share: float,
    labels: Sequence[str] | None = None,
    chosen_by: int = CHOSEN_BY,
    columns: tuple[str, str] = ("filepath", "title"),
    kept: str | None = None,
    reporter: Reporter = SILENT,
) -> Look:
    """Look at images and divide them, unless that is done in the folder already, and return what is known.

    Args:
        share: of the images that are held out.
        labels: what may be on images without captions.
        chosen_by: one in this many of these is for choosing a student; 0 for none.
        columns: of a table, with the paths and the captions.
        kept: the key of images that a student was trained on; others are refused.
    """
    source = _read_source(data, labels, columns, reporter)
    place = str(Path(data).absolute())
    content = (fingerprint(source.samples), source.kind, source.labels, share, chosen_by, place)
    key = hashlib.sha256(msgspec.json.encode(content)).hexdigest()
    if kept not in (None, key):
        raise UsageError(
            f"{folder} was built from other images than {data} has now, or from another division of them.",
            hint="name another {output}: what was trained there is kept",
            option="output",
        )
    if is_file(folder / LOOK) and (known := read_json(folder / LOOK, Look)).key == key:
        return known
    (folder / LOOK).unlink(missing_ok=True)
    seen = see_all(source.paths, reporter=reporter)
    found = _divided(source, seen, share=share, chosen_by=chosen_by, key=key)
    rows = found.of("train")
    if len(rows) < 2:
        raise InputError(f"{data} has {len(rows)} images to train on. {' '.join(f'{line}.' for line in found.lines)}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / TRAIN, table_of(rows))
    if found.kind != "images":  # else, the teacher names what is on them
        write_task(folder / HELD_OUT, found, found.rows)
    write_page(folder, found)
    write_bytes(folder / LOOK, to_json(found))
    return found


def _read_source(data: Typed, labels: Sequence[str] | None, columns: tuple[str, str], reporter: Reporter) -> _Source:
    if names_shards(data) or not (is_file(data) or is_folder(data)):
        raise InputError(
            f"{data} is neither a folder of images nor a table of them.",
            hint="name a folder with a sub-folder for each class, a CSV file with the columns filepath,title, or a "
            "folder of images with {labels}; distill trains on shards",
            option="data",
        )
    if labels is not None:
        if not is_folder(data) or len(set(labels)) < 2:
            raise UsageError("Two labels or more name what is on a folder of images.", option="labels")
        images = image_samples(data, Path(data))
        return _Source("images", list(images.images), [""] * len(images), tuple(dict.fromkeys(labels)), images)
    if is_folder(data) and not subfolders(Path(data)):
        raise UsageError(
            f"The images of {data} are in no class folders.",
            hint="name what may be on them with {labels}, or put the images of each class into a folder of its name",
            option="labels",
        )
    pairs = load_pairs(data, image_key=columns[0], caption_key=columns[1], reporter=reporter)
    if isinstance(pairs, Folder):
        captions = [pairs.texts[number][0] for number in pairs.numbers]
        return _Source("classes", list(pairs.images), captions, tuple(sorted(set(captions))), pairs)
    assert isinstance(pairs, Table)
    rows = [pairs.pair(index) for index in range(len(pairs))]
    captions = [row.caption for row in rows]
    distinct = tuple(sorted(set(captions)))
    kind: Kind = "classes" if _REPEATED * len(distinct) <= len(captions) else "captions"
    return _Source(kind, [row.path for row in rows], captions, distinct if kind == "classes" else (), pairs)


def _divided(source: _Source, seen: Sequence[Seen], *, share: float, chosen_by: int, key: str) -> Look:
    captions, kind = source.captions, source.kind
    groups = groups_of(seen, captions if kind == "captions" else ())
    parts = hold_back(seen, groups, captions if kind == "classes" else [""] * len(seen), share, chosen_by)
    copies = groups_of(seen) if kind == "captions" else groups
    rows = tuple(
        Row(str(path.absolute()), caption, "left out" if own.problem else part, copy)
        for path, caption, own, part, copy in zip(source.paths, captions, seen, parts, copies, strict=True)
    )
    sizes = [min(own.size) for own in seen if not own.problem]
    edge = int(np.median(sizes)) if sizes else 0
    return Look(key=key, kind=kind, labels=source.labels, edge=edge, lines=tuple(_lines(source, seen, rows)), rows=rows)


def _lines(source: _Source, seen: Sequence[Seen], rows: Sequence[Row]) -> Iterable[str]:
    count = len(rows) - sum(row.part == "left out" for row in rows)
    shorter = sorted(min(own.size) for own in seen if not own.problem) or [0]
    of = {"classes": f" of {len(source.labels):,} classes", "captions": " with captions", "images": ""}[source.kind]
    yield f"{count:,} images{of}; shorter edge {shorter[0]:,} to {shorter[-1]:,} pixels"
    problems = [own.problem for own in seen if own.problem]
    problems += list(source.samples.problems.examples)
    lost = sum(bool(own.problem) for own in seen) + source.samples.problems.total
    if lost:
        yield f"{lost:,} cannot be used and are left out; the first: {problems[0].rstrip('.')}"
    if source.kind == "classes":
        counts = Counter(row.caption for row in rows if row.part != "left out")
        few = {label: counts[label] for label in source.labels if counts[label] < _FEW}
        if few:
            named = ", ".join(
                f"{label} ({count})" for label, count in sorted(few.items(), key=lambda item: item[1])[:5]
            )
            yield f"{len(few):,} classes have fewer than {_FEW} images: {named}{', …' if len(few) > 5 else ''}"
    groups = duplicates(rows)
    exact = len({row.path for row in rows if row.part != "left out"}) - len({own.digest for own in seen if own.digest})
    copies = sum(map(len, groups)) - len(groups)
    if copies:
        yield f"{copies:,} are copies of others, {max(exact, 0):,} of them byte for byte; copies stay on one side"
    across = [group for group in groups if len({row.caption for row in group}) > 1]
    if across and source.kind == "classes":
        first = " and ".join(dict.fromkeys(row.caption for row in across[0]))
        yield f"{len(across):,} images are in several classes, such as {Path(across[0][0].path).name} in {first}"


def duplicates(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the groups of files that are copies of each other; a file with several captions is not a copy."""
    groups = dict[int, dict[str, Row]]()
    for row in rows:
        if row.part != "left out":
            groups.setdefault(row.group, {}).setdefault(row.path, row)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def table_of(rows: Iterable[Row]) -> str:
    """Return rows as a table in open_clip's columns; one without captions has the paths alone."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, row in enumerate(rows):
        cells = (row.path, row.caption) if row.caption else (row.path,)
        if not number:
            writer.writerow(("filepath", "title")[: len(cells)])
        writer.writerow(cells)
    return text.getvalue()


def task_of(folder: Path, found: Look, part: str) -> Path:
    """Return the task of a part that is held out, `val` or `test`."""
    return folder / HELD_OUT / (part if found.labels else f"{part}.csv")


def write_task(folder: Path, found: Look, rows: Iterable[Row]) -> None:
    """Write the rows that are held out as a task for `evaluate`, with its two parts `val` and `test`."""
    parts: dict[str, list[Row]] = {"val": [], "test": []}
    for row in rows:
        if row.part in ("choose", "test"):
            parts["val" if row.part == "choose" else "test"].append(row)
    with new_folder(folder) as temporary:
        if not found.labels:
            for name, own in parts.items():
                (temporary / f"{name}.csv").write_text(table_of(own), encoding="utf-8")
            return
        names = _folder_names(found.labels)
        (temporary / TEMPLATES).write_text("{}\n", encoding="utf-8")
        if any(class_name(Path(name)) != label for label, name in names.items()):
            lines = sorted(f"{name}\t{label}\n" for label, name in names.items())
            (temporary / CLASS_NAMES).write_text("".join(lines), encoding="utf-8")
        for part, own in parts.items():
            for label in found.labels:
                (temporary / part / names[label]).mkdir(parents=True)
            for number, row in enumerate(own):
                path = Path(row.path)
                _link(path, temporary / part / names[row.caption] / f"{number:05d}-{path.name}")


def _folder_names(labels: Sequence[str]) -> dict[str, str]:
    """Return for each label the name of a folder that every file system takes."""
    names = {label: re.sub(r"[^\w '-]", "_", label).strip(" ._")[:80] for label in labels}
    if len({name.casefold() for name in names.values()}) == len(labels) and all(names.values()):
        return names
    return {label: f"{number:04d} {names[label]}".strip() for number, label in enumerate(labels)}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def write_page(folder: Path, found: Look) -> None:
    """Write the page with the images that somebody should look at: copies, across classes first, and some of each."""
    groups = sorted(duplicates(found.rows), key=lambda group: len({row.caption for row in group}) == 1)
    shown = {
        "Copies": [row for group in groups for row in group[:4]],
        "What is held out": [*found.of("test"), *found.of("choose")],
        "What is trained on": found.of("train"),
    }
    parts = [f"<p>{html.escape(line)}</p>" for line in found.lines]
    for title, rows in shown.items():
        if rows:
            parts += [f"<h2>{title}</h2>", *(_figure(row) for row in rows[:_SHOWN])]
    style = "body{font:16px system-ui;margin:2em}figure{display:inline-block;margin:4px;max-width:110px;font-size:12px}"
    write_text(
        folder / PAGE,
        f'<!doctype html><meta charset="utf-8"><title>The images</title><style>{style}</style><h1>The images</h1>'
        + "\n".join(parts),
    )


def _figure(row: Row) -> str:
    image = open_image(Path(row.path), min_edge=_THUMB_EDGE)
    image.thumbnail((_THUMB_EDGE, _THUMB_EDGE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    source = base64.b64encode(content.getvalue()).decode()
    name = html.escape(f"{row.caption} · {Path(row.path).name}")
    return f'<figure><img alt="" src="data:image/jpeg;base64,{source}"><figcaption>{name}</figcaption></figure>'
