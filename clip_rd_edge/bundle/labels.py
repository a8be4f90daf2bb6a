"""The label bank of a bundle, labels.npz: `names` (C,) and prompt-averaged `embeddings` (C, D), float32 or float16.

background.npz has the same form, and holds common nouns.

In INT8, `levels` (C, D) int8 and `scales` (C, 1) float32 replace `embeddings`, which is their product. The different
keys make a reader without INT8 support refuse the file instead of misreading it.

In a bundle that was taught labels by images, rows are (C, D + 1), of any length: the last entry is added to the cosine.
What they were made from is kept in taught.npz, from which more labels are taught later (see `runtime.taught`):

names (C,), texts (C, D) float32    the taught labels, and the embeddings of their texts; zeros without a text tower
own (C,) bool                       whether the bundle had the label before, which it gets back when it is forgotten
images (N, D) float16               embeddings of images
classes (N,) int32                  the label of each, or -1 for images of nothing that is taught
model ()                            the key of the image tower, to which the embeddings belong
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from clip_rd_edge.bundle.encoder import Embeddings, as_list, require_finite, require_labels
from clip_rd_edge.bundle.manifest import LABELS
from clip_rd_edge.errors import ConfigError, InputError, near_matches, quoted
from clip_rd_edge.utils.arrays import npz_bytes, read_npz, require_arrays
from clip_rd_edge.utils.files import read_text_limited, text_lines, write_bytes
from clip_rd_edge.utils.paths import Typed, as_text, expand_home, near_files

MAX_BYTES = 1 << 28  # of an array of labels.npz: 65,536 labels of 1,024 float32 entries
LabelPrecision = Literal["fp32", "fp16", "int8"]
_HINT = "export the bundle again"
_TAUGHT_HINT = "copy the bundle again, or teach it again from the images"
_TAUGHT_ARRAYS = {"names": "U C", "texts": "f C D", "own": "b C", "images": "f N D", "classes": "i N", "model": "U"}
_UNIT = 0.01  # by which float16 may miss the length of an embedding


class LabelBank(msgspec.Struct, frozen=True):
    """Label names and their embeddings, (C,) and (C, D), or (C, D + 1) with some that were taught by images."""

    names: tuple[str, ...]
    embeddings: Embeddings
    taught: tuple[str, ...] = ()

    def find(self, labels: Sequence[str]) -> Embeddings | None:
        """Return the embeddings of labels in their order, or None if one is not in the bank."""
        rows = {name: row for row, name in enumerate(self.names)}
        if not all(label in rows for label in labels):
            return None
        return self.embeddings[[rows[label] for label in labels]]

    def untaught(self, labels: Sequence[str]) -> list[str]:
        """Return those of the labels that have no row of their own beside others, in their order."""
        return [label for label in labels if label not in self.taught]

    def completed(self, labels: Sequence[str], texts: Embeddings) -> Embeddings:
        """Return the rows of labels: those taught from the bank, and those of `untaught` from `texts`, (T, D)."""
        untaught = self.untaught(labels)
        if len(untaught) == len(labels):
            return texts
        texts = np.pad(texts, ((0, 0), (0, self.embeddings.shape[1] - texts.shape[1])))
        rows = dict(zip(self.names, self.embeddings, strict=True)) | dict(zip(untaught, texts, strict=True))
        return np.stack([rows[label] for label in labels])


class Taught(msgspec.Struct, frozen=True):
    """What labels were taught with; shapes as above."""

    names: tuple[str, ...]
    texts: Embeddings
    own: npt.NDArray[np.bool_]
    images: npt.NDArray[np.float16]
    classes: npt.NDArray[np.int32]
    model: str


def require_readable(names: Sequence[str], size: int, precision: LabelPrecision) -> None:
    """Refuse labels that cannot be stored, or whose bank `read_labels` would refuse, before they are embedded."""
    require_labels(names)
    longest = max(names, key=len, default="")  # to which NumPy pads all of them, with four bytes per character
    row = max(size * {"fp32": 4, "fp16": 2, "int8": 1}[precision], 4 * len(longest))
    if row * len(names) > MAX_BYTES:
        raise InputError(
            f"There are {len(names):,} labels of up to {len(longest):,} characters, such as {longest[:40]!r}; a bundle "
            f"holds at most {MAX_BYTES // row:,} of them.",
            hint="leave some out, or shorten them, or export without them and pass them when classifying",
        )


def write_labels(folder: Path, bank: LabelBank, *, precision: LabelPrecision = "fp32", name: str = LABELS) -> None:
    """Write a label bank into the file `name`.

    In `int8`, the largest entry of an embedding becomes level ±127, and its norm is preserved.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {"names": np.asarray(bank.names, dtype=np.str_)}
    if precision == "int8":
        max_abs = np.abs(bank.embeddings).max(axis=1, keepdims=True)
        levels = np.rint(bank.embeddings * (127 / np.where(max_abs > 0, max_abs, 1)))
        norms, level_norms = (np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank.embeddings, levels))
        arrays["levels"] = levels.astype(np.int8)
        arrays["scales"] = (norms / np.maximum(level_norms, 1)).astype(np.float32)
    else:
        arrays["embeddings"] = bank.embeddings.astype(np.float16 if precision == "fp16" else np.float32)
    write_bytes(folder / name, npz_bytes(compressed=True, **arrays))


def read_labels(folder: Path, *, name: str = LABELS) -> LabelBank | None:
    """Return the label bank in a file of a bundle, or None if there is no such file."""
    path = folder / name
    if not path.is_file():
        return None
    arrays = read_npz(path, max_bytes=MAX_BYTES, hint=_HINT)
    rows = {"levels": "i C D", "scales": "f C 1"} if "levels" in arrays else {"embeddings": "f C D"}
    require_arrays(arrays, {"names": "U C", **rows}, source=path, hint=_HINT)
    embeddings = arrays["levels"] * arrays["scales"] if "levels" in arrays else arrays["embeddings"]
    return LabelBank(tuple(map(str, arrays["names"])), require_finite(embeddings.astype(np.float32), str(path)))


def taught_bytes(taught: Taught) -> bytes:
    """Return the content of taught.npz."""
    arrays = {name: np.asarray(getattr(taught, name)) for name in Taught.__struct_fields__}
    return npz_bytes(compressed=True, **arrays)


def read_taught(path: Path, *, size: int) -> Taught:
    """Read taught.npz, of embeddings with `size` entries."""
    arrays = read_npz(path, max_bytes=MAX_BYTES, hint=_TAUGHT_HINT)
    require_arrays(arrays, _TAUGHT_ARRAYS, source=path, hint=_TAUGHT_HINT)
    names = tuple(map(str, arrays["names"]))
    if arrays["images"].shape[1] != size or not _is_sound(arrays, len(names)):
        raise ConfigError(f"{path} is damaged: expected unit vectors of {size} numbers.", hint=_TAUGHT_HINT)
    require_labels(names)
    return Taught(
        names,
        arrays["texts"].astype(np.float32),
        arrays["own"],
        arrays["images"].astype(np.float16),
        arrays["classes"].astype(np.int32),
        str(arrays["model"]),
    )


def _is_sound(arrays: dict[str, npt.NDArray[Any]], count: int) -> bool:
    """Return whether rows are of unit length, or zeros for texts, and each label has an image."""
    lengths = np.linalg.norm(arrays["images"].astype(np.float64), axis=1)
    texts = np.linalg.norm(arrays["texts"].astype(np.float64), axis=1)
    return bool(
        (abs(lengths - 1) < _UNIT).all()
        and (np.minimum(abs(texts - 1), abs(texts)) < _UNIT).all()
        and len(set(arrays["names"].tolist())) == count
        and set(arrays["classes"].tolist()) - {-1} == set(range(count))
    )


@cache
def background_nouns() -> tuple[str, ...]:
    """Return some thousand common nouns, of things, living beings, places and ideas."""
    return tuple(Path(__file__).with_name("nouns.txt").read_text(encoding="utf-8").split())


_PLACEHOLDERS = ("{}", "{c}")  # the latter in CLIP_benchmark's files
IMAGENET = "imagenet"  # names CLIP's templates on the command line
_IMAGENET_FILE = Path(__file__).with_name("imagenet_templates.txt")


@dataclass(frozen=True)
class Templates:
    """Prompt templates with one `{}` (or `{c}`) for the label's name, and their origin as shown in reports."""

    prompts: tuple[str, ...]
    origin: str


@cache
def imagenet_templates() -> Templates:
    """Return the 80 templates that CLIP was evaluated with on ImageNet.

    Source: https://github.com/openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb (MIT, see NOTICE).
    """
    return Templates(tuple(_IMAGENET_FILE.read_text(encoding="utf-8").splitlines()), "CLIP's for ImageNet")


# Templates in Python: one or several, each as for `parse_templates`; a path; or None.
TemplateNames = Iterable[str] | str | os.PathLike[str] | None


def template_words(templates: TemplateNames) -> list[Typed]:
    """Return the templates of a call in Python for `parse_templates`; none are the model's own templates."""
    return [] if templates is None else [Typed(word) for word in as_list(as_text(templates))]


def parse_templates(words: Sequence[Typed]) -> Templates:
    """Return the templates that a user names: templates, `imagenet` for CLIP's, or files with one template per line."""
    if list(words) == [IMAGENET]:
        return imagenet_templates()
    prompts: list[str] = []
    for word in words:
        if is_template(word):
            prompts.append(word)
        elif word == IMAGENET:
            prompts += imagenet_templates().prompts
        else:
            prompts += _read_file(word)
    return Templates(tuple(prompts), "given")


def is_template(text: str) -> bool:
    """Return whether a text has a place for a label; otherwise, it names a file of templates, or CLIP's."""
    return any(placeholder in text for placeholder in _PLACEHOLDERS)


def in_words(templates: Sequence[str]) -> str:
    """Return what to call these templates in a sentence."""
    return f"the template {templates[0]!r}" if len(templates) == 1 else f"a list of {len(templates)} templates"


def _read_file(word: Typed) -> list[str]:
    path = expand_home(word)
    try:
        lines = [line.strip() for line in text_lines(read_text_limited(path)) if line.strip()]
    except InputError as error:
        suggestion = near_matches(word, [IMAGENET]) or near_files(path)
        raise InputError(
            f"The template {quoted(word)} has no {{}} for the label's name, and is not a readable file.{suggestion}",
            hint=f'pass {{templates}} "{word.strip()} {{}}", the file of templates, or {IMAGENET} for CLIP\'s 80',
        ) from error
    missing = [number for number, line in enumerate(lines, start=1) if not is_template(line)]
    if missing or not lines:
        fault = f"template {missing[0]} without {{}} for the label's name" if missing else "no templates"
        raise InputError(f"{path} has {fault}.", hint="write one template per line, such as: a photo of a {}.")
    return lines
