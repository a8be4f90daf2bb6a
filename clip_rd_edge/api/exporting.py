"""Export a model as a bundle, and verify that it answers on this device as it did where it was made."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_rd_edge.api.everyday import place_of
from clip_rd_edge.errors import UsageError
from clip_rd_edge.settings.deploying import Verify
from clip_rd_edge.settings.options import keywords_of
from clip_rd_edge.utils.calls import checked_call
from clip_rd_edge.utils.paths import AnyPath, Typed, as_text, typed
from clip_rd_edge.utils.reporting import SILENT, Reporter

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from clip_rd_edge.benchmarking.results import Results
    from clip_rd_edge.bundle.manifest import Manifest
    from clip_rd_edge.data.samples import Samples
    from clip_rd_edge.exporting.calibration import CalibrationPairs, CalibrationSet
    from clip_rd_edge.exporting.conversion import ConvertedBundle
    from clip_rd_edge.exporting.int8.search import Trial
    from clip_rd_edge.exporting.plan import ExportOptions, ExportPlan, ExportRequest, Target
    from clip_rd_edge.models.clip import ClipModel
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


@checked_call
def export(
    model: AnyPath,
    output: AnyPath,
    *,
    pretrained: AnyPath | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
    **options: Unpack[ExportOptions],
) -> ExportedBundle:
    """Export a model as a bundle for a device: two ONNX files, a tokenizer and a manifest.

    For several targets, `output` holds one bundle per target, in a folder of its name.

    While a graph is converted, what any thread of the process prints to `sys.stdout`, and its warnings, are suppressed;
    other threads log as ever.

    Args:
        model: as for `load`, except that a bundle is accepted only with `target="browser"`.
        force: replace an earlier export in `output`; a folder with anything else is refused.
        options: the other options of `clip-rd-edge export`, under the same names.

    Raises:
        UsageError: `output` is in use, or would replace the model, or the options contradict each other.
        InputError, ConfigError: the model, target, labels or calibration pairs are missing or invalid.
        MissingExtraError: a required package is not installed.
        ClipRdEdgeError: a tower cannot be exported, or no tower is worth shipping in INT8.
    """
    from clip_rd_edge.benchmarking.results import read_results
    from clip_rd_edge.bundle.manifest import is_bundle
    from clip_rd_edge.bundle.outputs import require_output
    from clip_rd_edge.exporting.plan import plan_exports

    spec, output = typed(model), Path(output)
    read = (options.get(name) for name in ("labels", "calibration", "report", "node_modules"))
    named = [name for name in (pretrained, *read) if isinstance(name, str | os.PathLike)]
    require_output(output, "export", overwrite=force, sources=[*_folders(spec), *map(Path, named)])
    job = _Export(
        spec=spec,
        weights=as_text(pretrained),
        output=output,
        options=options,
        plans=plan_exports(options),
        results=None if (report := options.get("report")) is None else read_results(Path(report)),
        force=force,
        reporter=reporter,
    )
    return job.from_bundle() if is_bundle(Path(spec)) else job.from_model()


@dataclass(frozen=True, kw_only=True)
class _Export:
    """One call of `export` whose options agree.

    Attributes:
        spec, weights: the model, and the weights that were named for it.
        plans: one per target.
        results: a report of the model, for its card.
    """

    spec: Typed
    weights: Typed | None
    output: Path
    options: ExportOptions
    plans: tuple[ExportPlan, ...]
    results: Results | None
    force: bool
    reporter: Reporter

    def from_bundle(self) -> ExportedBundle:
        """Write a bundle for browsers."""
        from clip_rd_edge.exporting.plan import BROWSER, require_unconverted

        if self.plans[0].layout != BROWSER:
            raise UsageError(f"{self.spec} is already a bundle.", hint="pass the model that it was exported from")
        require_unconverted(Path(self.spec), self.options, self.weights)
        self._require_browser_packages()
        from clip_rd_edge.exporting.layouts.browser import write_from_bundle

        labels = self.plans[0].request.labels
        written = write_from_bundle(
            Path(self.spec), self.output, labels=labels, node_modules=self._node_modules, overwrite=self.force
        )
        return ExportedBundle(self.output, written)

    def from_model(self) -> ExportedBundle:
        """Load the model, and export it for each target."""
        from clip_rd_edge.exporting.calibration import kept_pairs, named_pairs
        from clip_rd_edge.exporting.plan import BROWSER

        plans, plan, reporter = self.plans, self.plans[0], self.reporter
        if plan.layout == BROWSER:
            self._require_browser_packages()
        pairs: Samples | CalibrationPairs | None = None
        if any(planned.request.precision == "int8" for planned in plans):
            given = self.options.get("calibration")
            pairs = kept_pairs(self.spec) if given is None else named_pairs(typed(given), self.spec)
        if plan.note:
            reporter.say(plan.note)

        # PyTorch takes seconds to import: by now, mistakes in the options have been reported.
        from clip_rd_edge.exporting.bundle import export_bundles
        from clip_rd_edge.models.load import load_clip

        reporter.update("loading the model")
        clip = load_clip(self.spec, pretrained=self.weights)
        if plan.layout == "immich":
            self._immich_name(clip)
        calibration = None
        if pairs is not None:
            reporter.update(f"reading images of {pairs.name}")
            calibration = _calibration_set(pairs, clip)
        requests = {planned.device: _request(planned, clip, self.spec, self.weights) for planned in plans}
        if len(plans) == 1:
            converted = self._write(clip, requests[plan.device], calibration)
            return ExportedBundle(self.output, converted.manifest, converted.trials)
        bundles = export_bundles(
            clip, self.output, requests, calibration=calibration, overwrite=self.force, reporter=reporter
        )
        exported = [ExportedBundle(self.output / name, part.manifest, part.trials) for name, part in bundles.items()]
        return ExportedBundle(self.output, exported[0].manifest, exported[0].trials, tuple(exported))

    def _write(self, clip: ClipModel, request: ExportRequest, calibration: CalibrationSet | None) -> ConvertedBundle:
        """Export a model in the layout of the only plan."""
        from clip_rd_edge.exporting.bundle import export_bundle

        layout, output, force, reporter = self.plans[0].layout, self.output, self.force, self.reporter
        if layout == "huggingface":
            from clip_rd_edge.exporting.layouts.huggingface import export_huggingface
            from clip_rd_edge.models.load import training_facts

            return export_huggingface(
                clip,
                output,
                request,
                calibration=calibration,
                results=self.results,
                training=training_facts(self.spec),
                overwrite=force,
                reporter=reporter,
            )
        if layout == "bundle":
            return export_bundle(clip, output, request, calibration=calibration, overwrite=force, reporter=reporter)
        with tempfile.TemporaryDirectory() as scratch:  # a bundle in another shape
            plain = Path(scratch)
            converted = export_bundle(clip, plain, request, calibration=calibration, overwrite=True, reporter=reporter)
            if layout == "immich":
                from clip_rd_edge.exporting.layouts.immich import where_it_goes, write_immich

                write_immich(plain, output, overwrite=force)
                reporter.say(where_it_goes(output, self._immich_name(clip), clip.preprocessing))
            else:
                from clip_rd_edge.exporting.layouts.browser import write_browser

                write_browser(plain, output, node_modules=self._node_modules, overwrite=force)
        return converted

    @property
    def _node_modules(self) -> Path | None:
        return Path(folder) if (folder := self.options.get("node_modules")) else None

    def _require_browser_packages(self) -> None:
        """Raise if onnxruntime-web is not among npm's packages."""
        from clip_rd_edge.exporting.layouts.browser import find_packages

        self.reporter.update("looking for onnxruntime-web")
        find_packages(self._node_modules)

    def _immich_name(self, clip: ClipModel) -> str:
        """Return the name that the model takes in Immich, which has to be one of Immich's own."""
        from clip_rd_edge.exporting.layouts.immich import immich_name

        return immich_name(self.options.get("as_name"), embedding_size=clip.embedding_size, model=clip.name)


def _calibration_set(pairs: Samples | CalibrationPairs, clip: ClipModel) -> CalibrationSet:
    """Return the images and captions that INT8 is calibrated with."""
    from clip_rd_edge.exporting.calibration import CalibrationPairs, choose_pairs
    from clip_rd_edge.models.encoder import TorchEncoder

    if not isinstance(pairs, CalibrationPairs):
        pairs = choose_pairs(pairs, preprocessing=clip.preprocessing)
    return pairs.for_model(preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize)


def _request(plan: ExportPlan, clip: ClipModel, spec: str, pretrained: str | None) -> ExportRequest:
    """Return a plan's request with what was exported, and with the model's own labels if none were given."""
    import msgspec

    from clip_rd_edge.bundle.runs import was_quantized_in_training
    from clip_rd_edge.exporting.bundle import package_versions
    from clip_rd_edge.exporting.plan import BROWSER

    provenance = {
        "model": spec, "pretrained": pretrained, **package_versions(), "device": plan.device,
        "quantize": "int8" if was_quantized_in_training(spec) else None,
    }  # fmt: skip
    return msgspec.structs.replace(
        plan.request,
        provenance={key: value for key, value in provenance.items() if value},
        labels=plan.request.labels or (clip.labels if plan.layout in ("bundle", BROWSER) else ()) or None,
    )


def _folders(spec: str) -> list[Path]:
    """Return the folders in which a model is: its own, and that of the run."""
    from clip_rd_edge.bundle.runs import LOCAL_DIR, model_folder

    folder = model_folder(spec)
    return [Path(spec.removeprefix(LOCAL_DIR)), *([folder] if folder else [])] if spec else []


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
