"""The quickstart as stages: each leaves something behind by which it is known to be done, so any can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from clip_rd_edge.benchmarking.cold import Launch
from clip_rd_edge.benchmarking.report import write_report
from clip_rd_edge.benchmarking.results import RESULTS, Results, read_results
from clip_rd_edge.benchmarking.rows import OpenEncoder
from clip_rd_edge.benchmarking.run import run_suite
from clip_rd_edge.benchmarking.suite import Suite, read_suite
from clip_rd_edge.contract.bundle import is_bundle
from clip_rd_edge.convert.calibration import calibration_set
from clip_rd_edge.convert.int8.select import Trial
from clip_rd_edge.data import emoji
from clip_rd_edge.exporters.bundle import export_bundle
from clip_rd_edge.models.encoder import TorchEncoder
from clip_rd_edge.models.load import load_clip
from clip_rd_edge.quickstart.settings import Settings, Watcher
from clip_rd_edge.quickstart.training import distil, train_alone, tune_teacher
from clip_rd_edge.utils.io import new_folder, shipped


def run_quickstart(
    settings: Settings, watch: Watcher, open_encoder: OpenEncoder, launch: Launch | None = None
) -> Results:
    """Run every stage that is not done yet; returns what was measured.

    Args:
        open_encoder: opens a bundle or a model's folder for the benchmark.
        launch: as `benchmarking.run.run_suite` takes it.

    Raises:
        UsageError: the folder holds a quickstart with other settings.
        InterruptedRunError: a signal asked to stop; the same call goes on from there.
    """
    stages: list[tuple[str, Callable[[Settings, Watcher], None]]] = [
        ("Draw the data set", _draw),
        ("Tune the teacher", tune_teacher),
        ("Distil the student", distil),
        *([("Train the same student alone", train_alone)] if settings.with_baseline else []),
        ("Export to ONNX FP32 and FP16", _export_floats),
        ("Quantise to INT8", _quantise),
        ("Compare all of them", lambda s, w: _compare(s, w, open_encoder, launch)),
    ]
    for number, (title, run) in enumerate(stages, start=1):
        watch.stage(number, len(stages), title)
        run(settings, watch)
    return read_results(settings.folder / "report" / RESULTS)


def _draw(settings: Settings, watch: Watcher) -> None:
    pairs = emoji.training_pairs()
    watch.say(f"{len(emoji.concepts()):,} emoji in two art styles; {len(pairs):,} pairs to train on, 760 to test by")


def _export_floats(settings: Settings, watch: Watcher) -> None:
    _export(settings, watch, "fp32")
    _export(settings, watch, "fp16")


def _quantise(settings: Settings, watch: Watcher) -> None:
    _export(settings, watch, "int8")


def _export(settings: Settings, watch: Watcher, precision: Literal["fp32", "fp16", "int8"]) -> None:
    bundle = settings.folder / "bundles" / precision
    if is_bundle(bundle):
        return
    clip = load_clip(str(settings.folder / "student"))
    calibration = None
    if precision == "int8":
        calibration = calibration_set(
            emoji.training_pairs(), preprocessing=clip.preprocessing, tokenize=TorchEncoder(clip).tokenize
        )
    export_bundle(
        clip,
        bundle,
        precision=precision,
        calibration=calibration,
        fallback="fp32",  # a machine on which INT8 is not worth it gets its report, too
        labels=[concept.name for concept in emoji.concepts()],
        provenance={"model": "quickstart", "recipe": settings.recipe, "student": settings.student},
        source=None if precision == "fp32" else settings.folder / "bundles" / "fp32",
        progress=lambda what: watch.progress(0, 1, what),
        on_trials=lambda trials: _tell(watch, trials),
    )


def _tell(watch: Watcher, trials: Sequence[Trial]) -> None:
    """What was tried, and what became of it."""
    for trial in trials:
        watch.say(
            f"{trial.tower} tower, {trial.name}: {1 / trial.latency_ratio:.2f}× as fast as FP32, "
            f"centred cosine {trial.centred_cosine:.4f}, {trial.size_ratio:.2f}× the size: {trial.verdict}"
        )


def _compare(settings: Settings, watch: Watcher, open_encoder: OpenEncoder, launch: Launch | None) -> None:
    report, suite = settings.folder / "report", quickstart_suite(settings.folder)
    if (report / RESULTS).is_file() and read_results(report / RESULTS).suite == suite:
        return
    results = run_suite(suite, open_encoder, lambda what, done, total: watch.progress(done, total, what), launch=launch)
    with new_folder(report) as folder:
        write_report(results, folder)


def quickstart_suite(folder: Path) -> Suite:
    """The shipped suite over a quickstart's folder, without the baseline where it was not trained."""
    suite = read_suite(shipped("benchmarks/suites/quickstart.yaml"))
    rows = tuple(row for row in suite.rows if row.role != "baseline" or (folder / row.model).is_dir())
    return msgspec.structs.replace(suite, root=str(folder), rows=rows)
