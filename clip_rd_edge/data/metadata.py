"""What lies beside a data set's pictures: CLIP_benchmark's classnames.txt, templates and type, and its splits.

    DATASET/test/…                            or test's content in DATASET itself
    DATASET/classnames.txt                    a class a line, in the order of their numbers or sub-folders
    DATASET/zeroshot_classification_templates.txt   a prompt a line, `{c}` or `{}` for the class
    DATASET/dataset_type.txt                  `retrieval`, `multilabel`, or not there: classification

Source: https://github.com/LAION-AI/CLIP_benchmark, `datasets/builder.py`, `build_wds_dataset`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clip_rd_edge.data.templates import Fallback, Templates
from clip_rd_edge.errors import InputError

CLASS_NAMES, TEMPLATES, TYPE = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
SHARD_COUNT = "nshards.txt"
SPLITS = ("test", "val", "validation")  # the first that is there


@dataclass(frozen=True)
class DataSet:
    """A folder with a data set: `root` has what is said of it, `split` its pictures; they may be the same."""

    root: Path
    split: Path

    @property
    def name(self) -> str:
        """As reports show it: the folder's name without what CLIP_benchmark puts before it."""
        return self.root.resolve().name.removeprefix("wds_").removeprefix("vtab-")

    @property
    def in_shards(self) -> bool:
        """Whether the split's pictures are in tars."""
        return _in_shards(self.split)

    def labels(self) -> list[str]:
        """The class names, or none where there is no classnames.txt."""
        return self._lines(CLASS_NAMES)

    def templates(self, fallback: Fallback) -> Templates:
        """The data set's own, else the fallback's."""
        own = self._lines(TEMPLATES)
        return Templates(tuple(own), "the data set's") if own else fallback()

    def kind(self) -> str:
        """`classification`, `retrieval`, …, or empty where it does not say."""
        lines = self._lines(TYPE)
        return lines[0].lower() if lines else ""

    def place(self, name: str) -> Path:
        """Where a file is, at the root or beside the pictures; it need not be there."""
        beside = self.split / name
        return beside if beside.is_file() and not (self.root / name).is_file() else self.root / name

    def _lines(self, name: str) -> list[str]:
        path = self.place(name)
        if not path.is_file():
            return []
        # A line's number is a class's: an empty line in the middle is kept, to be found missing rather than skipped.
        lines = [line.strip() for line in path.read_text(encoding="utf-8").strip().splitlines()]
        if "" in lines:
            raise InputError(f"{path}, line {lines.index('') + 1}, is empty.")
        return lines


def find_data_set(folder: Path) -> DataSet:
    """The data set that a folder is, or whose split it is."""
    for name in SPLITS:
        # A class may be called `test`, too: a split has folders or shards in it, a class has pictures.
        split = folder / name
        if split.is_dir() and (_in_shards(split) or any(path.is_dir() for path in split.iterdir())):
            return DataSet(folder, split)
    above = folder.resolve().parent
    if folder.resolve().name in SPLITS and any((above / name).is_file() for name in (CLASS_NAMES, TEMPLATES, TYPE)):
        return DataSet(above, folder)
    return DataSet(folder, folder)


def _in_shards(folder: Path) -> bool:
    return (folder / SHARD_COUNT).is_file() or any(folder.glob("*.tar"))
