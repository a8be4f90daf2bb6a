"""Images in folders: class folders, whose names are captions, and images alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_rd_edge.bundle.encoder import fill_template
from clip_rd_edge.bundle.image_files import IMAGE_SUFFIXES, dead_link_error, is_ignored, leads_nowhere, list_images
from clip_rd_edge.data.samples import NO_PROBLEMS, Counts, LocalFiles, Problems, Sample
from clip_rd_edge.errors import InputError
from clip_rd_edge.utils.files import read_text_limited, text_lines
from clip_rd_edge.utils.paths import sorted_paths
from clip_rd_edge.utils.text import as_word

CLASS_NAMES = "classnames.txt"
SPLITS = ("test", "val", "validation")  # those of an evaluation, in order of preference
_OTHER_SPLITS = ("train", "training", "valid", "dev")  # that an evaluation never chooses, and may be classes, too
_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Folder(LocalFiles):
    """Image files in memory; implements `data.samples.Samples`.

    Attributes:
        images: N paths.
        numbers: of each image, which of the texts are its own, (N,); empty for images alone.
        texts: tuples of equivalent captions.
        counts: how many images there are, with captions, without, or of how many classes.
    """

    name: str
    images: tuple[Path, ...]
    numbers: tuple[int, ...]
    texts: tuple[tuple[str, ...], ...]
    counts: Counts
    problems: Problems = NO_PROBLEMS

    @classmethod
    def of(cls, name: str, images: Sequence[Path], captions: Sequence[tuple[str, ...]]) -> Folder:
        """Return images, each with captions of its own."""
        return cls(name, tuple(images), tuple(range(len(images))), tuple(captions), Counts(pairs=len(images)))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Sample:
        captions = self.texts[self.numbers[index]] if self.numbers else ()
        return Sample(captions, self.images[index])

    def identity(self) -> Iterator[bytes]:
        """Yield the captions, and of each image name, size in bytes, and which captions it has."""
        yield repr(self.texts).encode(errors="surrogatepass")
        for number, path in zip(self.numbers or (0,) * len(self), self.images, strict=True):
            size = path.stat().st_size if path.is_file() else -1
            yield path.name.encode(errors="surrogateescape") + f"\0{size}\0{number}".encode()


def image_samples(name: str, folder: Path) -> Folder:
    """Return the images of a folder and its subfolders, without captions."""
    images = tuple(list_images(folder))
    return Folder(name, images, (), (), Counts(images=len(images)))


def class_samples(name: str, folder: Path, templates: Sequence[str] = ()) -> Folder:
    """Return the images of class folders, CLASS/…/image.jpg, whose captions are prompts with the class's name.

    They come in an order that is random but always the same, so that each part of an epoch has images of all classes.
    An image that is in no class folder is a problem.

    Args:
        templates: prompts with a place for the name; none for the name alone. All images have their captions in this
            order: a batch that takes the caption of the same number from each has one caption for each class.
    """
    names = folder / CLASS_NAMES
    if not names.is_file() and folder.resolve().name in (*SPLITS, *_OTHER_SPLITS):
        names = folder.resolve().parent / CLASS_NAMES
    _require_classes(folder, (*_OTHER_SPLITS, *SPLITS))
    classes = class_folders(folder, names)
    images = [(path, number) for number, (inner, _) in enumerate(classes) for path in list_images(inner)]
    if (count := len({number for _, number in images})) < 2:
        raise InputError(
            f"The folder {folder} has images in {count} subfolders; expected 2 or more, one for each class.",
            hint="name such a folder, a CSV file with the columns filepath,title, shards (….tar) or emoji, or pass "
            f"images and captions apart: {{images}} {as_word(folder)} {{texts}} FILE",
            option="data",
        )
    outside = [path for path in sorted_paths(filter(_is_image, folder.iterdir())) if not is_ignored(path.name)]
    problems = Problems.of(
        [f"{path} is in no class folder" for path in outside], hint="put each image into the folder of its class"
    )
    paths, numbers = zip(*(images[index] for index in np.random.default_rng(0).permutation(len(images))), strict=True)
    texts = tuple(tuple(fill_template(each, label) for each in templates) or (label,) for _, label in classes)
    return Folder(name, paths, numbers, texts, Counts(pairs=len(images), classes=len(classes)), problems)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def class_name(folder: Path) -> str:
    """Return what a class is called by the name of its folder: a hyphen is part of it, as in `t-shirt`."""
    return folder.name.replace("_", " ")


def class_folders(folder: Path, names: Path) -> list[tuple[Path, str]]:
    """Return the subfolders of a folder with the names of their classes.

    They are sorted by name, or by number if all names are numbers, as those of ImageNet-V2, which are 0 to 999.

    Args:
        names: a file that may exist, with a line for each subfolder: in order, the names of their classes; or in any
            order, its own name, a tab, and that of its class.
    """
    if lost := sorted(path for path in folder.iterdir() if leads_nowhere(path) and not is_ignored(path.name)):
        raise dead_link_error(lost[0])  # without a word, there would be a class less
    found = subfolders(folder)
    if all(path.name.isdecimal() for path in found):
        found.sort(key=lambda path: int(path.name))
    if lines := metadata_lines(names):
        return list(zip(found, _names(lines, names, found), strict=True))
    _require_classes(folder, _OTHER_SPLITS)
    if found and all(_WORDNET_ID.fullmatch(path.name) for path in found):
        raise InputError(
            f"The subfolders of {folder} are named by WordNet ids, such as {found[0].name}, which mean nothing to a "
            "text tower.",
            hint=f"write the class names to {names}, one per line, in the order of the ids",
        )
    return [(path, class_name(path)) for path in found]


def subfolders(folder: Path) -> list[Path]:
    """Return the subfolders that may hold images, sorted by name."""
    return sorted_paths(path for path in folder.iterdir() if path.is_dir() and not is_ignored(path.name))


def metadata_lines(path: Path) -> list[str]:
    """Return the lines of a file that accompanies images; empty if there is none."""
    if not path.is_file():
        return []
    # Line numbers are class numbers: skipping an empty line in the middle would shift the classes.
    return [line.strip() for line in text_lines(read_text_limited(path).strip())]


def _names(lines: Sequence[str], file: Path, found: Sequence[Path]) -> list[str]:
    """Return the names of classes from lines, which are the names or, if there are tabs, `SUBFOLDER<tab>NAME`."""
    folders = [folder.name for folder in found]
    names = dict(zip(folders, lines, strict=False))
    if any("\t" in line for line in lines):
        names = {folder.strip(): name.strip() for folder, _, name in (line.partition("\t") for line in lines)}
    if len(lines) != len(folders) or not all(map(names.get, folders)):
        lost = next((f"; that of {folder} is missing" for folder in folders if not names.get(folder)), "")
        raise InputError(
            f"{file} has {len(lines)} lines for the names of {len(folders)} subfolders{lost}.",
            hint="write one line for each: the name of the subfolder, a tab, and the name of the class",
        )
    return [names[folder] for folder in folders]


def _require_classes(folder: Path, splits: Sequence[str]) -> None:
    """Refuse subfolders that hold the folders of the classes, in which every image would be of the wrong class."""
    found = subfolders(folder)
    above = {path.name.lower(): path for path in found if subfolders(path)}
    wrong = next((above[name] for name in splits if name in above), None)
    if len(found) == len(above) == 1 and not any(map(_is_image, found[0].iterdir())):
        wrong = found[0]
    if wrong is not None:
        raise InputError(
            f"The subfolder {wrong.name} of {folder} is not a class: it has subfolders.",
            hint=f"name the folder of the classes: {wrong}",
        )
