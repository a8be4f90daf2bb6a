"""Export a model: float32 towers that are compared with torch, a bundle per plan from there, its manifest last."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx

from clip_rd_edge.bundle.encoder import Embeddings, label_embeddings
from clip_rd_edge.bundle.formats import import_named
from clip_rd_edge.bundle.labels import LabelBank, background_nouns, read_labels, require_readable, write_labels
from clip_rd_edge.bundle.manifest import (
    BACKGROUND,
    FORMAT_VERSION,
    IMAGE_MODEL,
    KNOWN,
    TEXT_MODEL,
    TOKENIZER,
    Manifest,
    Tower,
    damaged_files,
    read_manifest,
    require_whole_towers,
    write_manifest,
)
from clip_rd_edge.bundle.outputs import require_output
from clip_rd_edge.bundle.tokenizer import TokenIds, Tokenizer, TokenizerSpec
from clip_rd_edge.errors import ClipRdEdgeError, UsageError
from clip_rd_edge.exporting.formats import Converted, Job
from clip_rd_edge.exporting.layouts import LAYOUTS, Layout
from clip_rd_edge.exporting.parity import (
    HARD_TEXTS,
    Inputs,
    NodeByNode,
    add_reference,
    agreement,
    embed,
    latencies,
    measurement,
    require_agreement,
)
from clip_rd_edge.exporting.plan import Plan
from clip_rd_edge.exporting.towers import (
    IMAGE_INPUT,
    IMAGE_OUTPUT,
    TEXT_INPUT,
    TEXT_OUTPUT,
    export_image_tower,
    export_text_tower,
)
from clip_rd_edge.models.clip import ClipModel, deployed_parameter_count, evaluation_mode, float32_on_cpu
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.models.tokenizers import export_tokenizer
from clip_rd_edge.runtime.backends.onnxruntime import open_session
from clip_rd_edge.runtime.encoder import BundleEncoder
from clip_rd_edge.runtime.labels import write_label_bank
from clip_rd_edge.runtime.load import load
from clip_rd_edge.settings.deploying import Export
from clip_rd_edge.utils.files import write_bytes
from clip_rd_edge.utils.outputs import new_folder
from clip_rd_edge.utils.paths import as_text, typed
from clip_rd_edge.utils.text import SILENT, PrefixedReporter, Reporter

if TYPE_CHECKING:
    from clip_rd_edge.data.samples import Samples
    from clip_rd_edge.exporting.calibration import CalibrationPairs, CalibrationSet

TARGET = "onnxruntime"


@float32_on_cpu()
def export_model(
    request: Export,
    plans: Sequence[Plan],
    pairs: Samples | CalibrationPairs | None = None,
    *,
    unseen: Samples | None = None,
) -> dict[str, Converted]:
    """Load a model and export it by its plans; return what was written, by target.

    Args:
        pairs: to calibrate and evaluate INT8 on, if a plan is in it.
        unseen: pairs that the model was not trained on, to calibrate its answers on where `pairs` are others.
    """
    reporter, output, layout = request.reporter, Path(request.output), plans[0].layout
    reporter.update("loading the model")
    clip = load_clip(typed(request.model), pretrained=as_text(request.pretrained))
    samples = None
    if pairs is not None or unseen is not None:
        from clip_rd_edge.exporting.calibration import calibration_set, was_trained_on

        choose = partial(calibration_set, preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize)
        if pairs is not None:
            reporter.update(f"reading images of {pairs.name}")
            samples = choose(pairs)
            if request.calibration is not None and was_trained_on(typed(request.model), typed(request.calibration)):
                samples = replace(samples, seen=True)
        if unseen is not None:
            own = choose(unseen)
            samples = replace(samples or own, unseen=own)
    if layout in ("bundle", "browser") and clip.labels:
        plans = [replace(plan, labels=plan.labels or clip.labels) for plan in plans]
    if layout != "bundle":
        return {plans[0].target: export_layout(clip, request, plans[0], samples=samples)}
    by_folder = {"": plans[0]} if len(plans) == 1 else {plan.target: plan for plan in plans}
    written = export_bundles(clip, output, by_folder, samples=samples, overwrite=request.force, reporter=reporter)
    return dict(zip((plan.target for plan in plans), written.values(), strict=True))


@float32_on_cpu()
def export_layout(clip: ClipModel, request: Export, plan: Plan, *, samples: CalibrationSet | None = None) -> Converted:
    """Export a model in another layout than a bundle's; return the bundle in the plan's precision, or in the last."""
    layout: Layout = import_named(LAYOUTS[plan.layout])()
    layout.check_model(clip, request)
    plans: dict[str, Plan] = {name: replace(plan, precision=name) for name in layout.precisions(plan)}
    output, reporter = Path(request.output), request.reporter
    with tempfile.TemporaryDirectory() as scratch, new_folder(output, overwrite=request.force) as folder:
        bundles = Path(scratch) / "bundles"
        written = export_bundles(clip, bundles, plans, samples=samples, reporter=reporter)
        reporter.update("writing the folder")
        layout.write({name: bundles / name for name in plans}, folder, clip, request)
    return list(written.values())[-1]


def export_bundle(clip: ClipModel, output: Path, plan: Plan, **options: Any) -> Converted:
    """Export a model as a bundle in the folder `output`; options as for `export_bundles`."""
    return export_bundles(clip, output, {"": plan}, **options)[""]


@float32_on_cpu()
def export_bundles(
    clip: ClipModel,
    output: Path,
    plans: Mapping[str, Plan],
    *,
    samples: CalibrationSet | None = None,
    source: Path | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> dict[str, Converted]:
    """Export a model as bundles, each in the folder of its name in `output`, or in `output` itself; towers only once.

    Args:
        samples: calibrate and evaluate INT8.
        source: the model's float32 bundle, if there is one, so that its towers are not exported again.
        overwrite: replace an earlier export in `output`.
    """
    require_output(output, "export", overwrite=overwrite)
    for labels in (plan.labels for plan in plans.values() if plan.labels is not None):
        # The precision of their embeddings is known later: int8 takes the least.
        require_readable(tuple(dict.fromkeys(labels)), clip.embedding_size, "int8")
    with new_folder(output, overwrite=overwrite) as folder, tempfile.TemporaryDirectory() as scratch:
        if source is None:
            source = Path(scratch)
            fp32 = _write_source(clip, source, next(iter(plans.values())), reporter)
        else:
            fp32 = read_manifest(source)
            if fp32.precision != "fp32" or damaged_files(source, fp32):
                raise UsageError(f"The bundle {source} is damaged, or not in float32.", hint="export it again")
        written = {}
        for name, plan in plans.items():
            own, shown = folder / name, PrefixedReporter(reporter, f"{name}: ") if name else reporter
            own.mkdir(exist_ok=True)
            job = Job(plan=plan, clip=clip, source=source, fp32=fp32, folder=own, samples=samples, reporter=shown)
            written[name] = _write_bundle(job)
        return written


def _write_source(clip: ClipModel, folder: Path, plan: Plan, reporter: Reporter) -> Manifest:
    """Write what all bundles of an export are made from: as `write_fp32`, and the background if they keep one."""
    fp32 = write_fp32(clip, folder, threads=plan.threads, reporter=reporter)
    if plan.layout in ("bundle", "browser"):
        reporter.update("embedding common nouns")
        nouns = label_embeddings(_label_encoder(folder, fp32), background_nouns(), fp32.templates, reporter=reporter)
        write_labels(folder, LabelBank(background_nouns(), nouns), precision="int8", name=BACKGROUND)
    return fp32


def write_fp32(clip: ClipModel, folder: Path, *, threads: int = 1, reporter: Reporter = SILENT) -> Manifest:
    """Write both towers and the tokenizer into `folder`; return their manifest, not yet written."""
    with evaluation_mode(clip.model):
        reporter.update("exporting the image tower")
        export_image_tower(clip, folder)
        reporter.update("exporting the text tower")
        export_text_tower(clip, folder)
        spec = export_tokenizer(clip.tokenizer, folder)
        reporter.update("comparing the files with torch")
        ids = _checked_ids(clip, folder / TOKENIZER, spec)
        height, width = clip.preprocessing.size
        pixels = np.random.default_rng(0).standard_normal((len(HARD_TEXTS), 3, height, width)).astype(np.float32)
        encoder = TorchEncoder(clip)
        image = _checked_tower(
            folder / IMAGE_MODEL, pixels, encoder.encode_pixels(pixels), (IMAGE_INPUT, IMAGE_OUTPUT), threads
        )
        text = _checked_tower(folder / TEXT_MODEL, ids, encoder.encode_ids(ids), (TEXT_INPUT, TEXT_OUTPUT), threads)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=clip.name,
        precision="fp32",
        target=TARGET,
        embedding_size=clip.embedding_size,
        logit_scale=clip.logit_scale,
        preprocessing=clip.preprocessing,
        tokenizer=spec,
        image=image,
        text=text,
        templates=clip.templates,
        parameters=deployed_parameter_count(clip.model, text_tower=True),
    )
    return manifest.with_scoring(clip.scoring)


def _checked_ids(clip: ClipModel, path: Path, spec: TokenizerSpec) -> TokenIds:
    """Return the token ids of HARD_TEXTS; raise ClipRdEdgeError if open_clip's tokenizer gives others."""
    expected = clip.tokenizer(list(HARD_TEXTS)).numpy()
    ids = Tokenizer(path, spec)(HARD_TEXTS)
    for text, row, expected_row in zip(HARD_TEXTS, ids, expected, strict=True):
        if not np.array_equal(row, expected_row):
            raise ClipRdEdgeError(
                f"The exported tokenizer of {clip.name} turns {text[:40]!r} into {row.tolist()[:12]}; "
                f"expected {expected_row.tolist()[:12]}, as from open_clip's tokenizer."
            )
    return ids


def _checked_tower(path: Path, inputs: Inputs, expected: Embeddings, names: tuple[str, str], threads: int) -> Tower:
    """Return the manifest entry of a tower's file, whose embeddings have to be those `expected`."""
    session = open_session(str(path), threads=threads)
    for batch_size in (1, len(inputs)):
        parity = agreement(expected, embed(session, inputs, batch_size=batch_size))
        hint = "try a newer torch, whose exporter may support this architecture better"
        require_agreement(f"{path.name}, at batch size {batch_size},", parity, hint=hint)
    latencies_ms = latencies({"fp32": session}, inputs)["fp32"]
    return Tower(
        file=path.name,
        input_name=names[0],
        output_name=names[1],
        precision="fp32",
        measured=measurement(parity, latencies_ms, reference_ms=latencies_ms, threads=threads),
    )


def _write_bundle(job: Job) -> Converted:
    """Carry out a job: convert the towers, add what was asked for and the reference embeddings, write the manifest."""
    plan, folder = job.plan, job.folder
    converter = plan.converter
    if plan.text_tower:
        shutil.copyfile(job.source / TOKENIZER, folder / TOKENIZER)
    if (plan.format, plan.precision) != ("onnx", "fp32"):
        require_whole_towers(job.source, job.manifest, purpose="every conversion of float32 ONNX")
    provenance = dict(plan.provenance)
    if plan.precision == "int8":
        assert job.samples is not None  # which every export in INT8 has
        provenance["calibration"] = job.samples.name
    manifest, trials = converter.convert(job)
    manifest = msgspec.structs.replace(manifest, provenance=provenance)
    if plan.preprocess_in_graph:
        manifest = _with_preprocessing(folder, manifest)
    origin = converter.runnable(job)
    runnable = manifest if origin == folder else job.fp32
    if plan.labels is not None:
        job.reporter.update("embedding the labels")
        complete = (origin, runnable) if runnable.text else (job.source, job.fp32)
        write_label_bank(folder, manifest, plan.labels, encoder=_label_encoder(*complete))
    manifest = _with_calibration(job, manifest, load(origin, manifest=runnable, device="cpu"))
    if not plan.text_tower:
        parameters = deployed_parameter_count(job.clip.model, text_tower=False)
        manifest = msgspec.structs.replace(manifest, parameters=parameters)
        runnable = runnable.without_text()
    job.reporter.update("computing the reference embeddings")
    add_reference(folder, converter.reference(origin, runnable))
    return Converted(write_manifest(folder, manifest), trials)


def _with_calibration(job: Job, manifest: Manifest, encoder: BundleEncoder) -> Manifest:
    """Add the background, if the source has one, and return the manifest with what pairs show of the answers."""
    bank = read_labels(job.source, name=BACKGROUND)
    if bank is not None:
        shutil.copyfile(job.source / BACKGROUND, job.folder / BACKGROUND)
    samples = job.samples.for_answers if job.samples else None
    if samples is None or not samples.paired or bank is None or encoder.int8_fault(manifest.image):
        return manifest
    if samples.seen:
        job.reporter.note(
            'probabilities and "none of these" are not calibrated: that takes pairs which the model was not trained on'
        )
        return manifest
    from clip_rd_edge.exporting.calibration import MIN_PAIRS, calibrate  # imported already, with the samples

    job.reporter.update("calibrating the answers")
    pixels, ids = samples.calibrate
    images = encoder.encode_pixels(pixels)
    captions = _label_encoder(job.source, job.fp32).encode_ids(ids)
    calibration = calibrate(images, captions, bank.embeddings, manifest.scoring, source=samples.name)
    if calibration is None:
        few = f"that takes {2 * MIN_PAIRS} pairs, half of which choose how INT8 is done"
        why = few if len(images) < MIN_PAIRS else f"the captions of {samples.name} do not fit their images"
        job.reporter.note(f"answers are not calibrated: {why}")
        return manifest
    write_labels(job.folder, LabelBank(tuple(map(str, range(len(images)))), images), precision="int8", name=KNOWN)
    job.reporter.note(
        f"answers are calibrated on {len(images)} pairs of {samples.name}: calibration error "
        f"{calibration.error_before:.1%} before, {calibration.error:.1%} with temperature {calibration.temperature:.2f}"
    )
    return manifest.with_features(calibration=calibration)


def _label_encoder(folder: Path, manifest: Manifest) -> BundleEncoder:
    """Return the bundle as a device runs it, or if its text tower's INT8 gives wrong answers here, node by node."""
    encoder = load(folder, manifest=manifest, device="cpu")
    return NodeByNode(folder, manifest) if encoder.int8_fault(manifest.require_text()) else encoder


def _with_preprocessing(folder: Path, manifest: Manifest) -> Manifest:
    from clip_rd_edge.exporting.graph import IMAGE, with_preprocessing  # which few exports need

    require_whole_towers(folder, manifest.without_text(), purpose="{preprocess_in_graph}")
    path = folder / manifest.image.file
    write_bytes(path, with_preprocessing(onnx.load(path), manifest.preprocessing).SerializeToString())
    image = msgspec.structs.replace(manifest.image, input_name=IMAGE, preprocesses=True)
    return msgspec.structs.replace(manifest, image=image)
