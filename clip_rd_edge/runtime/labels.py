"""Labels as a user names them: words, text files, tables and JSON or YAML lists."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from clip_rd_edge.bundle.encoder import Embeddings, Encoder, as_list, label_embeddings
from clip_rd_edge.bundle.image_files import IMAGE_SUFFIXES
from clip_rd_edge.bundle.labels import MAX_BYTES as BANK_BYTES
from clip_rd_edge.bundle.labels import LabelBank, LabelPrecision, require_readable, write_labels
from clip_rd_edge.bundle.manifest import Manifest
from clip_rd_edge.errors import InputError, near_matches, quoted
from clip_rd_edge.utils.arrays import load_array, npy_bytes
from clip_rd_edge.utils.files import read_cached, read_limited, text_lines, write_cached
from clip_rd_edge.utils.paths import Typed, cache_home, expand_home, looks_like_path, near_files
from clip_rd_edge.utils.structs import is_list_of_texts, is_natural, parse_yaml
from clip_rd_edge.utils.text import SEPARATOR_LINE, is_unicode

NO_LABELS = LabelBank((), np.zeros((0, 0), np.float32))  # of a bundle without a bank
TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t"}
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
STRUCTURED_SUFFIXES = (".json", *JSON_LINES_SUFFIXES, ".yaml", ".yml")
LABEL_FILE_SUFFIXES = (".txt", ".names", ".list", *TABLE_SUFFIXES, *STRUCTURED_SUFFIXES)
# The keys and column headings, in any case, under which other programs write class names.
HEADINGS = ("label", "labels", "name", "names", "class", "classes", "class_name", "classname", "classnames", "id2label")
# Labels in Python: a list of them as they are; a text, which is one label or the path of a label file; a path; or None.
Labels = Iterable[str] | str | os.PathLike[str] | None
MAX_FILE_BYTES = 1 << 24  # 200,000 labels
MAX_TEXTS_BYTES = 1 << 28  # some four million captions
MAX_BYTES = BANK_BYTES + 1024  # of the label cache: as many labels as a bundle may have, and what is beside the rows
EVERYDAY = "everyday"  # names the shipped list on the command line
_EVERYDAY_FILE = Path(__file__).with_name("everyday_labels.txt")
_ID = re.compile(r"\S*\d\S*")  # of a class or a file, as n02084071, /m/0bt9lr and 0001.jpg are
_COMMENT = re.compile(r"#(\s|$)")  # a label or caption may begin with a #hashtag
# A separator between words, but not between digits, as in 1,000.
_SEPARATOR = re.compile(r"\s*(?:[;|\n]|,(?!\d)|(?<!\d),)\s*")


def label_names(labels: Labels) -> list[str] | None:
    """Return the labels of a call in Python; None if `labels` is None.

    A list often holds what others wrote, such as the clients of a service. So none of its labels names a file, which
    would then be read and shown to them.
    """
    if labels is None:
        return None
    if isinstance(labels, os.PathLike):
        return read_labels_file(Path(labels))
    return parse_labels([labels]) if isinstance(labels, str) else as_list(labels)


def read_texts(name: Typed, column: str) -> list[str]:
    """Return captions or labels to train on, from a file as for `read_labels_file`, but larger.

    Args:
        column: heading or key of the captions, before HEADINGS. In a table, these may have several lines.
    """
    path = Path(name)
    headings = (column.lower(), *HEADINGS)
    return _read_list(path, max_bytes=MAX_TEXTS_BYTES, headings=headings, captions=True)


def everyday_labels() -> list[str]:
    """Return some 300 everyday things, such as a camera may see, among ImageNet's classes."""
    return read_labels_file(_EVERYDAY_FILE)


def parse_labels(words: Sequence[str]) -> list[str] | None:
    """Return the labels of a command line, where each word is a label or the path of a label file; None for no words.

    A single word is a file if there is one of that name; of several, those that look like a path are files. The word
    EVERYDAY stands for `everyday_labels`, alone or beside others; a label of that name can be in a file. White space
    around a label is dropped, so that two that differ only there count as one.
    """
    names: list[str] = []
    for word in words:
        if _is_label_file(word, alone=len(words) == 1):
            names += read_labels_file(expand_home(word))
        elif word == EVERYDAY:
            names += everyday_labels()
        else:
            _require_single_label(word, alone=len(words) == 1)
            names.append(word.strip())
    return names or None


def _is_label_file(word: str, *, alone: bool) -> bool:
    path = expand_home(word)
    path_like = looks_like_path(word, suffixes=(*LABEL_FILE_SUFFIXES, *IMAGE_SUFFIXES))
    try:
        is_there = path.is_file()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False
    if path_like and not is_there:
        raise InputError(
            f"The label {quoted(word)} looks like the path of a file, but there is no such file.{near_files(path)}",
            hint="check the path; a label that really has this form can be a line of a label file",
        )
    return is_there and (alone or path_like)


def _require_single_label(word: str, *, alone: bool) -> None:
    """Refuse a word that holds several labels: `pig,dog`, `["pig", "dog"]`, or, on its own, `a pig, a dog`."""
    stripped = word.strip()
    brackets = stripped[:1] == "[" and stripped[-1:] == "]"
    parts = [part.strip("\"' ") for part in _SEPARATOR.split(stripped.strip("[]"))]
    parts = [part for part in parts if part]
    several = len(parts) > 1 and (alone or brackets or not re.search(r"\s", stripped))
    if several or (parts and (stripped[-1] in ",;|" or is_list_of_texts(stripped))):
        shown = " ".join(f'"{part}"' for part in parts)
        raise InputError(
            f"The label {word!r} looks like a list; expected one label per argument.",
            hint=f"pass {{labels}} {shown}, or one label per line in a file",
        )


def read_labels_file(path: Path) -> list[str]:
    """Read labels from a file of any of these forms, recognised by suffix:

    - text: one label per line; empty lines and lines that start with # and white space are skipped.
    - .csv, .tsv: a column headed `label` (or another of HEADINGS), or the only column of a table without a heading;
      commas, tabs, semicolons and bars separate columns.
    - .json, .yaml: a list, or an object with one under such a key; its items are names, or objects with a name. Also an
      object from class numbers to names, in the order of the numbers.
    - .jsonl, .ndjson: an item of such a list per line.
    """
    return _read_list(path, max_bytes=MAX_FILE_BYTES, headings=HEADINGS, captions=False)


def _read_list(path: Path, *, max_bytes: int, headings: Sequence[str], captions: bool) -> list[str]:
    content = read_limited(path, max_bytes, hint="leave out some of the labels or captions, or shorten them")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"The label file {path} is not UTF-8 text: {error}.", hint="save it as UTF-8 text, one label per line"
        ) from error
    suffix = path.suffix.lower()
    if suffix in STRUCTURED_SUFFIXES:
        labels = _from_structure(_parse(text, path), path, headings)
    elif suffix in TABLE_SUFFIXES:
        labels = _from_table(text, path, headings, captions=captions)
    else:
        lines = (line.strip() for line in text_lines(text))
        labels = [line for line in lines if line and not _COMMENT.match(line)]
    if not labels:
        raise InputError(
            f"The label file {path} has no labels; expected one label per line.",
            hint='write labels into it, or pass them directly: {labels} "a cat" "a dog"',
        )
    is_list = len(labels) == 1 and len(_SEPARATOR.split(labels[0])) > 2
    if lists := [label for label in labels if is_list or is_list_of_texts(label)]:
        raise InputError(
            f"The label file {path} has a list for a label: {lists[0]!r}.", hint="write one label per line"
        )
    return labels


def _from_table(text: str, path: Path, headings: Sequence[str], *, captions: bool) -> list[str]:
    above = 0
    if separator_line := re.match(SEPARATOR_LINE, text):
        text, above = text[separator_line.end() :], 1
    first = re.split(r"[\r\n]", text, maxsplit=1)[0]
    separator = _table_separator(first, TABLE_SUFFIXES[path.suffix.lower()], headings)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[tuple[int, list[str]]] = []  # with the row's first line
    problem, last = "", above
    try:
        for row in reader:
            start, last = last + 1, above + reader.line_num
            if rows and any(cell.strip() for cell in row[len(rows[0][1]) :]):
                problem = f"{start} has more fields than its first line"
                break
            if any(cell.strip() for cell in row):
                rows.append((start, row))
    except csv.Error as error:
        problem = f"{above + reader.line_num}: {error}"
    number, header_rows = _column_number([row for _, row in rows], first, path, headings) if rows else (0, 0)
    if not captions and not problem:
        several = (start for start, row in rows if len(text_lines("".join(row[number : number + 1]).strip())) > 1)
        problem = next((f"{start}: a quoted field holds several lines" for start in several), "")
    if problem:
        raise InputError(
            f"The label file {path}, line {problem}.",
            hint=f'put a text with {separator!r} in quotes, and double a quote within: "a 5"" nail"; one text per line',
        )
    return _column([row for _, row in rows[header_rows:]], number)


def _column_number(rows: Sequence[Sequence[str]], first: str, path: Path, headings: Sequence[str]) -> tuple[int, int]:
    """Return which column has the labels, and how many rows are a heading."""
    header = [cell.strip().lower() for cell in rows[0]]
    if numbers := [header.index(heading) for heading in headings if heading in header]:
        if headings[0] != HEADINGS[0] and headings[0] in header:  # asked for
            return numbers[0], 1
        # Beside class numbers, as under `label,name`, the names are meant.
        named = (number for number in numbers if not all(map(is_natural, _column(rows[1:], number))))
        return next(named, numbers[0]), 1
    if max(map(len, rows)) > 1:
        raise InputError(
            f"The label file {path} has no column headed 'label'; its first line is {first.strip()!r}."
            f"{near_matches('label', header)}",
            hint="head the column of the labels: label",
        )
    return 0, 0


def _table_separator(first: str, usual: str, headings: Sequence[str]) -> str:
    """Return the separator that splits the first line into cells of which one is a heading, else the likeliest one."""
    for separator in usual + ",\t;|":
        if any(cell.strip().strip('"').lower() in headings for cell in first.split(separator)):
            return separator
    # Without a heading, a comma may be part of a text.
    return usual if "," in first else next((separator for separator in usual + "\t;|" if separator in first), usual)


def _column(rows: Sequence[Sequence[str]], number: int) -> list[str]:
    cells = (row[number].strip() for row in rows if len(row) > number)
    return list(dict.fromkeys(cell for cell in cells if cell))


def _parse(text: str, path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES_SUFFIXES:
        lines = enumerate(text_lines(text), start=1)
        return [_parse_json(line, f"{path}, line {number},") for number, line in lines if line.strip()]
    return _parse_json(text, str(path)) if suffix == ".json" else parse_yaml(text, source=path)


def _parse_json(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"The label file {location} is not valid JSON: {error}.") from error


def _from_structure(content: Any, path: Path, headings: Sequence[str]) -> list[str]:
    content = _under_heading(content, headings, (list, dict))
    if isinstance(content, dict) and content and all(is_natural(str(key)) for key in content):
        content = [content[key] for key in sorted(content, key=int)]
    items = content if isinstance(content, list) else [content]
    return [_name(item, f"{path}: entry {number}", headings) for number, item in enumerate(items, start=1)]


def _name(item: Any, location: str, headings: Sequence[str]) -> str:
    """Return the name in an item: a text, an object with a name, or a pair such as ["n01440764", "tench"]."""
    item = _under_heading(item, headings)
    if isinstance(item, list) and item and all(_ID.fullmatch(str(part)) for part in item[:-1]):  # no several names
        item = item[-1]
    if not isinstance(item, str) or not item.strip() or not is_unicode(item):
        raise InputError(
            f"The label file {location} is {item!r}; expected a name.",
            hint="write one text per entry, or objects with the text at the key 'label'",
        )
    return item.strip()


def _under_heading(content: Any, headings: Sequence[str], kinds: tuple[type, ...] = (object,)) -> Any:
    """Return the value of an object at the first of the headings, in any case, that has one of these kinds there.

    Anything else is returned as it is.
    """
    if not isinstance(content, dict):
        return content
    values = {str(key).lower(): value for key, value in content.items()}
    found = (values[heading] for heading in headings if heading in values)
    return next((value for value in found if isinstance(value, kinds)), content)


def write_label_bank(
    folder: Path, manifest: Manifest, labels: Sequence[str], *, encoder: Encoder | None = None
) -> None:
    """Embed labels with the bundle's own text tower and templates, and write labels.npz.

    Call this before the manifest is written, which has the file's checksum. Embeddings are stored in the precision of
    the text tower: storing them in INT8 loses less accuracy than the INT8 tower already has. Without a text tower, they
    are stored in float16, or in float32 beside an image tower in float32.

    Args:
        encoder: embeds them in the bundle's place, if that does not run here or has no text tower.
    """
    from clip_rd_edge.runtime.load import load  # late: what reads labels alone opens no bundle

    names = tuple(dict.fromkeys(labels))
    if encoder is None:
        own = load(folder, manifest=manifest, device="cpu")
        own.require_right(manifest.require_text())
        encoder = own
    tower = (manifest.text or manifest.image).precision
    int8 = manifest.text is not None and tower.startswith("int8")
    precision: LabelPrecision = "fp32" if tower == "fp32" else "int8" if int8 else "fp16"
    require_readable(names, manifest.embedding_size, precision)
    embeddings = label_embeddings(encoder, names, manifest.templates)
    write_labels(folder, LabelBank(names, embeddings), precision=precision)


def label_cache_folder() -> Path:
    """Return the folder of the label cache, which may not exist yet."""
    return cache_home() / "labels"


def label_set_key(text_tower: str, labels: Sequence[str], templates: Sequence[str]) -> str:
    """Return the cache key of labels in order, by the `text_key` of the encoder that embeds them in these templates."""
    return hashlib.sha256(msgspec.json.encode((text_tower, list(labels), list(templates)))).hexdigest()


def read_label_set(key: str, *, count: int) -> Embeddings | None:
    """Return the cached embeddings, (count, D), or None if there are none or they are damaged."""
    rows = read_cached(label_cache_folder() / key)
    if rows is None:
        return None
    try:
        embeddings: Embeddings = load_array(io.BytesIO(rows))
    except (ValueError, EOFError):
        return None
    if embeddings.ndim != 2 or len(embeddings) != count or embeddings.dtype != np.float32:
        return None
    return embeddings


def write_label_set(key: str, embeddings: Embeddings) -> None:
    """Cache embeddings, (C, D), as `write_cached` does."""
    rows = npy_bytes(embeddings.astype(np.float32, copy=False))
    write_cached(label_cache_folder() / key, rows, max_bytes=MAX_BYTES)
