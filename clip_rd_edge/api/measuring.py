"""Measure and compare models and methods, and walk through the whole pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip_rd_edge.api.models import first_answer, import_modules, load, open_encoder
from clip_rd_edge.errors import UsageError
from clip_rd_edge.settings.measuring import Benchmark, Evaluate, EvidenceRun, Quickstart
from clip_rd_edge.settings.options import keywords_of
from clip_rd_edge.utils.paths import AnyPath, Typed, as_text, several

if TYPE_CHECKING:
    from clip_rd_edge.benchmarking.metrics import Score
    from clip_rd_edge.benchmarking.regression import Changes
    from clip_rd_edge.benchmarking.results import Results
    from clip_rd_edge.bundle.labels import TemplateNames
    from clip_rd_edge.data.tasks import Task
    from clip_rd_edge.evidence.suite import Evidence
    from clip_rd_edge.runtime.model import Model


@keywords_of(Evaluate)
def evaluate(request: Evaluate) -> list[Score]:
    """Evaluate a bundle, a run or any open_clip model on zero-shot classification and retrieval; one score per task.

    `model` is a loaded model, or anything that `load` accepts; `tasks` are names as for the command line, or task
    objects. With `per_class`, zero-shot scores have the accuracy of each class, and the class that it was mistaken for.

    Raises:
        UsageError: `pretrained` or `threads` beside a loaded model.
        ClipRdEdgeError: as `load`, or a task cannot be read.
    """
    return evaluate_model(request)[1]


def evaluate_model(request: Evaluate) -> tuple[Model, list[Score]]:
    """Return the model, too."""
    from clip_rd_edge.benchmarking.accuracy import evaluate as score
    from clip_rd_edge.benchmarking.accuracy import note_class_names
    from clip_rd_edge.runtime.model import Model

    model, reporter = request.model, request.reporter
    if isinstance(model, Model) and (request.pretrained, request.threads) != (None, None):
        raise UsageError(
            "The model is already loaded, so pretrained and threads come too late.",
            hint="pass them to clip_rd_edge.load, or the model's name or path to evaluate",
        )
    columns = {"csv_img_key": request.csv_img_key, "csv_caption_key": request.csv_caption_key}
    # Before the model, so that a mistyped name is reported at once.
    loaded = load_tasks(request.tasks, templates=request.templates, **columns)
    note_class_names(loaded, reporter)
    if not isinstance(model, Model):
        reporter.update("loading the model")
        import_modules(request.modules)
        model = load(model, pretrained=request.pretrained, threads=request.threads)
    own = model.label_bank.names if model.label_bank is not None else ()
    for task in loaded:
        if others := [label for label in own if label not in getattr(task, "labels", own)]:
            named = f"{', '.join(others[:3])}{', …' if len(others) > 3 else ''}"
            reporter.note(
                f"{task.name}: {len(others):,} labels of the bundle are not among the task's and do not compete here, "
                f"as they do in classify: {named}"
            )
    options: dict[str, Any] = {"per_class": request.per_class, "shots": request.shots, "reporter": reporter}
    return model, [score(model.encoder, task, matches=True, **options) for task in loaded]


@keywords_of(Benchmark)
def benchmark(request: Benchmark) -> Results:
    """Measure accuracy, latency and size of the models of a suite, and write a report into `output`.

    Accuracies are saved in `output` as they are measured: after an interruption, the same call resumes from there.
    """
    import msgspec

    from clip_rd_edge.benchmarking.report import require_matplotlib, require_report_folder, write_report
    from clip_rd_edge.benchmarking.results import this_environment
    from clip_rd_edge.benchmarking.run import FOLDER, PredictionCache, is_cache, run_suite
    from clip_rd_edge.benchmarking.suite import find_suite, parse_models, read_suite
    from clip_rd_edge.bundle.encoder import as_list
    from clip_rd_edge.utils.outputs import LOCK_FILE, exclusive_writer, require_free_output

    folder, reporter = Path(request.output), request.reporter
    # Check everything that can be checked before the long work starts.
    interrupted = is_cache(folder / FOLDER)
    require_free_output(folder, overwrite=request.force or interrupted, ignoring=(LOCK_FILE,))
    require_report_folder(folder)
    require_matplotlib()
    rows, suite = parse_models(as_list(request.models)), find_suite(os.fspath(request.suite))
    loaded = read_suite(suite, rows=rows, data_root=as_text(request.root))
    budget = {"budget_ms": request.budget_ms, "min_accuracy": request.min_accuracy}
    loaded = msgspec.structs.replace(loaded, **{name: value for name, value in budget.items() if value is not None})
    if request.models:
        for row in loaded.rows:
            loaded.resolve_model(row)  # models named in this call must exist: they are not skipped
    with exclusive_writer(folder):
        if interrupted:
            reporter.note(f"resuming from the results in {folder / FOLDER}")
        cache = PredictionCache(folder / FOLDER, this_environment(), shots=loaded.shots)
        open_model = partial(open_encoder, threads=loaded.threads)
        results = run_suite(loaded, open_model, reporter, cache=cache, launch=first_answer)
        write_report(results, folder)
        cache.remove()
    return results


def compare(old: AnyPath, new: AnyPath) -> Changes:
    """Compare two benchmark results, files or folders: regressions, improvements and noise."""
    from clip_rd_edge.benchmarking.regression import compare_runs
    from clip_rd_edge.benchmarking.results import read_results

    return compare_runs(read_results(Path(old)), read_results(Path(new)))


def recommend(results: AnyPath, *, budget_ms: float | None = None, min_accuracy: float | None = None) -> str:
    """Return a sentence that recommends a model of a finished benchmark; nothing is measured.

    Another sentence follows if the machine was too busy for its latencies to be trusted.

    Args:
        results: a results.json or the folder of one.
        budget_ms, min_accuracy: max latency from image file to answer (95th percentile) and min top-1 as a fraction;
            None keeps what the benchmark was run with.

    Raises:
        UsageError: there is neither a requirement nor a zero-shot task to choose by.
    """
    import msgspec

    from clip_rd_edge.benchmarking.findings import busy_remark, recommendation
    from clip_rd_edge.benchmarking.results import read_results

    read = read_results(Path(results))
    given = {"budget_ms": budget_ms, "min_accuracy": min_accuracy}
    suite = msgspec.structs.replace(read.suite, **{name: value for name, value in given.items() if value is not None})
    advice = recommendation(msgspec.structs.replace(read, suite=suite))
    if advice is None:
        raise UsageError(
            f"{results} has nothing to choose a model by: no requirement, or no zero-shot task.",
            hint="give a requirement, such as {budget_ms} 10",
        )
    return " ".join([advice.replace("**", ""), *busy_remark(read)])


@keywords_of(Quickstart)
def quickstart(request: Quickstart) -> Results:
    """Run the whole pipeline on the built-in emoji data set in minutes on a CPU; an interrupted run is resumed."""
    from clip_rd_edge.pipeline import run_quickstart

    return run_quickstart(request, partial(open_encoder, threads=1), first_answer)


@keywords_of(EvidenceRun)
def evidence_run(request: EvidenceRun) -> Evidence:
    """Train a suite's students with each method and seed, measure them, and write tables and figures."""
    from clip_rd_edge.benchmarking.report import require_matplotlib
    from clip_rd_edge.evidence.report import require_report_folder, write_report
    from clip_rd_edge.evidence.run import run_evidence
    from clip_rd_edge.evidence.suite import read_evidence
    from clip_rd_edge.losses.terms import load_terms

    folder, reporter = Path(request.output), request.reporter
    require_matplotlib()
    for source in several(request.terms):
        load_terms(source)
    loaded = read_evidence(os.fspath(request.suite))
    require_report_folder(folder, loaded.name)
    evidence = run_evidence(loaded, folder, reporter, teacher=as_text(request.teacher))
    for path in write_report(evidence, folder):
        reporter.note(f"written: {path}")
    return evidence


def evidence_report(results: AnyPath | Sequence[AnyPath], *, into: AnyPath | None = None) -> str:
    """Return the tables of an evidence file, or of several results of one benchmark, as Markdown. Nothing is trained.

    Args:
        results: the file of a suite; or two or more results of `benchmark`, each a results.json or its folder, for a
            table of means and standard deviations.
        into: a Markdown file whose marked lines are replaced by a suite's tables; figures are written beside `results`.
    """
    from clip_rd_edge.evidence.report import markdown, publish, read_evidence_file

    paths = [results] if isinstance(results, str | os.PathLike) else results
    if len(paths) > 1:
        from clip_rd_edge.benchmarking.results import read_results
        from clip_rd_edge.evidence.suite import seeds_table

        if into is not None:
            raise UsageError("The tables of one suite can be written into a file; several results were given.")
        return seeds_table([read_results(Path(path)) for path in paths])
    (results,) = paths
    if into is not None:
        publish(Path(results), Path(into))
    return markdown(read_evidence_file(Path(results)))


def load_tasks(
    tasks: AnyPath | Task | Iterable[AnyPath | Task],
    *,
    templates: TemplateNames = None,
    csv_img_key: str = "filepath",
    csv_caption_key: str = "title",
) -> list[Task]:
    """Load tasks by name; arguments as for `evaluate`.

    Raises:
        InputError: a task does not exist or is invalid.
    """
    import msgspec

    from clip_rd_edge.bundle.labels import parse_templates, template_words
    from clip_rd_edge.data.tasks import RetrievalTask, ZeroShotTask, load_task, with_distinct_names

    single = isinstance(tasks, str | os.PathLike | ZeroShotTask | RetrievalTask)
    given: Iterable[Any] = [tasks] if single else tasks  # type: ignore[assignment]
    names: list[str | Task] = [as_text(name) for name in given]
    unique = [name for i, name in enumerate(names) if name not in names[:i]]
    loaded = [
        load_task(Typed(name), image_key=csv_img_key, caption_key=csv_caption_key) if isinstance(name, str) else name
        for name in unique
    ]
    if words := template_words(templates):
        chosen = parse_templates(words)
        loaded = [
            msgspec.structs.replace(task, templates=chosen.prompts, templates_from=chosen.origin)
            if isinstance(task, ZeroShotTask)
            else task
            for task in loaded
        ]
    return with_distinct_names(loaded, [name if isinstance(name, str) else name.name for name in unique])
