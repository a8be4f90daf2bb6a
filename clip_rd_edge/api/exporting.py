"""Export a model as a bundle, and verify that it answers on this device as it did where it was made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clip_rd_edge.api.everyday import place_of
from clip_rd_edge.settings.deploying import Export, Verify
from clip_rd_edge.settings.options import keywords_of
from clip_rd_edge.utils.paths import AnyPath, typed

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
    from clip_rd_edge.bundle.manifest import is_bundle
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
