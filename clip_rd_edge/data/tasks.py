"""Tasks by name or folder."""

from __future__ import annotations

from pathlib import Path

from clip_rd_edge.contract.task import Task, ZeroShotTask
from clip_rd_edge.errors import InputError, near_matches

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
EMBEDDED = (
    "emoji:unseen-style",
    "emoji:unseen-concepts",
    "emoji:unseen-style:retrieval",
    "emoji:unseen-concepts:retrieval",
)


def load_task(name: str) -> Task:
    """A task of the embedded data set, or a folder of pictures in one sub-folder a class.

    In such a folder, classes are the sub-folders in alphabetical order. `classnames.txt` (a name a line, in that order)
    and `zeroshot_classification_templates.txt` (a prompt a line, `{c}` or `{}` for the name) may stand in it, as
    CLIP_benchmark writes them; else the sub-folders' names are the labels.

    Raises:
        InputError: no such task or folder, an empty one, or class names that do not match the sub-folders.
    """
    if name in EMBEDDED:
        from clip_rd_edge.data import emoji

        split: emoji.Split = "unseen style" if "unseen-style" in name else "unseen concepts"
        return emoji.retrieval_task(split) if name.endswith(":retrieval") else emoji.zero_shot_task(split)
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(
            f"There is no task {name!r}: neither a folder of pictures nor one of {', '.join(EMBEDDED)}."
            f"{near_matches(name, EMBEDDED)}"
        )
    return _image_folder(folder)


def _image_folder(folder: Path) -> ZeroShotTask:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    labels = _lines(folder / CLASS_NAMES) or [path.name.replace("_", " ") for path in classes]
    if len(labels) != len(classes):
        raise InputError(f"{folder / CLASS_NAMES} has {len(labels)} names for {len(classes)} sub-folders.")
    found = [
        (path, target)
        for target, subfolder in enumerate(classes)
        for path in sorted(subfolder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not found:
        raise InputError(f"{folder} has no pictures in sub-folders; expected CLASS/picture.jpg.")
    return ZeroShotTask(
        name=folder.name,
        images=tuple(path for path, _ in found),
        targets=tuple(target for _, target in found),
        labels=tuple(labels),
        templates=tuple(_lines(folder / TEMPLATES) or ["a photo of a {}."]),
    )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
