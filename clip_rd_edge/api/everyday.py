"""`everyday`: a model that classifies photographs with any labels, without a training of one's own.

EfficientNet-Lite0, for ImageNet, and the sentence encoder MiniLM-L6, both from packages on PyPI, joined by `stitch` and
quantised. It is made once, with PyTorch, and kept in the cache; the package `clip_rd_edge_everyday`, which a release
builds, brings it for devices without PyTorch.
"""

from __future__ import annotations

import os
import random
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from clip_rd_edge.bundle.manifest import is_bundle
from clip_rd_edge.errors import MissingExtraError
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import AnyPath, cache_home, exists
from clip_rd_edge.utils.reporting import SILENT, Reporter

NAME = "everyday"
PREFIX = "builtin:"
PACKAGE = "clip_rd_edge_everyday"
VERSION = "2"  # of what is made: another one is made anew
# What a page begins with: things around a desk, a kitchen and a street that the model tells apart.
LABELS = (
    "a person", "a cat", "a dog", "a bird", "a flower", "a tree", "grass", "a cup of coffee", "a bottle", "a banana",
    "a plate of food", "an apple", "a book", "a laptop", "a keyboard", "a phone", "a camera", "a chair", "a table",
    "a lamp", "a shoe", "a bag", "a bicycle", "a motorcycle", "a car", "a bus", "a street", "a building", "the sky",
)  # fmt: skip
_CROPS, _CROP_EDGE = 128, 256


def is_built_in(model: AnyPath) -> bool:
    """Return whether a name is `builtin:everyday`, or `everyday` where no file or folder has that name."""
    name = os.fspath(model)
    return name == PREFIX + NAME or (name == NAME and not exists(name))


def place_of(model: AnyPath, *, reporter: Reporter = SILENT) -> AnyPath:
    """Return the folder of the built-in model for its name, and any other model as it is."""
    return everyday(reporter=reporter) if is_built_in(model) else model


def everyday(*, reporter: Reporter = SILENT) -> Path:
    """Return the folder of the built-in bundle: an installed package's, or that in the cache, made if it is missing.

    Raises:
        MissingExtraError: it is in neither place, and PyTorch or a package with weights is not installed.
    """
    package = find_spec(PACKAGE)
    if package is not None and package.submodule_search_locations:
        return Path(package.submodule_search_locations[0]) / NAME
    folder = cache_home() / "models" / VERSION / NAME
    if not is_bundle(folder):
        if not find_spec("torch"):
            raise MissingExtraError("torch", extra="train,emoji", purpose="Making the built-in model, once,")
        with exclusive_writer(folder.parent, on_wait=reporter.note):
            if not is_bundle(folder):
                make_everyday(folder, reporter=reporter)
    return folder


def make_everyday(folder: Path, *, reporter: Reporter = SILENT) -> None:
    """Make the built-in bundle from packages, in about two minutes."""
    from clip_rd_edge.api.exporting import export
    from clip_rd_edge.api.models import stitch
    from clip_rd_edge.models.classifiers import CLASSIFIERS, SENTENCE_ENCODERS

    ((classifier, image_weights),) = CLASSIFIERS.items()
    ((encoder, text_weights),) = SENTENCE_ENCODERS.items()
    for package in (image_weights, text_weights):
        package.verified()  # `stitch` would look for it on the hub
    reporter.note(f"making the model {NAME!r}: once, in about two minutes")
    with TemporaryDirectory() as scratch:
        model = stitch(classifier, names="imagenet", text=encoder, output=Path(scratch) / "model", reporter=reporter)
        reporter.update("quantising its towers")
        crops, names = _calibration(Path(scratch))
        export(
            model, folder, precision="int8", calibration=crops, texts=names, labels=LABELS, force=True,
            reporter=reporter,
        )  # fmt: skip


def _calibration(folder: Path) -> tuple[Path, Path]:
    """Write what INT8 is calibrated with: crops of the photograph that matplotlib brings, and names of things."""
    from matplotlib.cbook import get_sample_data

    from clip_rd_edge.bundle.images import open_image
    from clip_rd_edge.runtime.labels import everyday_labels

    draw, crops, texts = random.Random(0), folder / "crops", folder / "names.txt"
    photograph = open_image(Path(get_sample_data("grace_hopper.jpg", asfileobj=False)))
    names = everyday_labels()
    draw.shuffle(names)
    texts.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    crops.mkdir()
    for number in range(_CROPS):
        edge = int(draw.uniform(0.15, 1.0) * min(photograph.size))
        left, top = draw.randint(0, photograph.width - edge), draw.randint(0, photograph.height - edge)
        crop = photograph.crop((left, top, left + edge, top + edge)).resize((_CROP_EDGE, _CROP_EDGE))
        crop.save(crops / f"{number:03}.png")
    return crops, texts
