"""Measure and compare models and methods, and walk through the whole pipeline."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from clip_rd_edge.api.models import first_answer, load, open_encoder
from clip_rd_edge.errors import InputError, UsageError, require_known_options
from clip_rd_edge.utils.calls import checked_call
from clip_rd_edge.utils.paths import AnyPath, as_text
from clip_rd_edge.utils.reporting import SILENT, Reporter
from clip_rd_edge.utils.trust import Typed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from clip_rd_edge.benchmarking.metrics import Score
    from clip_rd_edge.benchmarking.regression import Changes
    from clip_rd_edge.benchmarking.results import Results
    from clip_rd_edge.contract.task import Task
    from clip_rd_edge.contract.templates import TemplateNames
    from clip_rd_edge.evidence.results import Evidence
    from clip_rd_edge.runtime.model import Model


class QuickstartOptions(TypedDict, total=False):
    """Further options of `quickstart` and the command line.

    Keys:
        with_baseline: also train the same student without a teacher.
        student_steps, teacher_steps: training steps, of 32 and of 64 pairs. Default: 1,100 and 400.
        photos: a folder that benchmarks/data/tuxpaint.py wrote, on whose photographs the models are compared, too.
    """

    with_baseline: bool
    student_steps: int | None
    teacher_steps: int | None
    photos: AnyPath | None


class EvaluateOptions(TypedDict, total=False):
    """Further options of `evaluate` and the command line.

    Keys:
        csv_img_key, csv_caption_key: the columns of tables that are tasks. Default: `filepath` and `title`.
    """

    csv_img_key: str
    csv_caption_key: str


@checked_call
def evaluate(
    model: AnyPath | Model,
    tasks: AnyPath | Task | Iterable[AnyPath | Task],
    *,
    pretrained: AnyPath | None = None,
    threads: int | None = None,
    templates: TemplateNames = None,
    per_class: bool = False,
    reporter: Reporter = SILENT,
    **options: Unpack[EvaluateOptions],
) -> list[Score]:
    """Evaluate a bundle, a run or any open_clip model on zero-shot classification and retrieval; one score per task.

    Args:
        model: a loaded model, or anything that `load` accepts together with `pretrained` and `threads`.
        tasks: names as for `clip-rd-edge evaluate --task`, or task objects.
        templates: prompt templates with one `{}` for zero-shot tasks, a file of them, or `imagenet` for CLIP's 80; None
            uses each data set's own, or else CLIP's.
        per_class: fill in `per_class` of zero-shot scores: the accuracy of each class, and what it was mistaken for.
        options: the other options of `clip-rd-edge evaluate`, under the same names.

    Raises:
        UsageError: `pretrained` or `threads` beside a loaded model, or an option is unknown.
        ClipRdEdgeError: as `load`, or a task cannot be read.
    """
    from clip_rd_edge.benchmarking.accuracy import evaluate as score
    from clip_rd_edge.benchmarking.accuracy import say_class_names
    from clip_rd_edge.runtime.model import Model

    known = {**inspect.signature(evaluate).parameters, **EvaluateOptions.__annotations__}
    require_known_options(options, known, command="evaluate")
    if isinstance(model, Model) and (pretrained, threads) != (None, None):
        raise UsageError(
            "The model is loaded already, so that pretrained and threads come too late.",
            hint="pass them to clip_rd_edge.load, or the model's name or path to evaluate",
        )
    loaded = load_tasks(tasks, templates=templates, **options)
    say_class_names(loaded, reporter)
    evaluated = model if isinstance(model, Model) else load(model, pretrained=pretrained, threads=threads)
    return [score(evaluated.encoder, task, per_class=per_class, reporter=reporter) for task in loaded]


@checked_call
def benchmark(
    suite: AnyPath,
    output: AnyPath,
    *,
    root: AnyPath | None = None,
    models: str | Sequence[str] = (),
    budget_ms: float | None = None,
    min_accuracy: float | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Results:
    """Measure accuracy, latency and size of the models of a suite, and write a report into `output`.

    Accuracies are saved in `output` as they are measured: after an interruption, the same call resumes from there.

    Args:
        suite: a YAML file, or the name of a suite that ships with the package.
        root: folder of the data sets; None uses the suite's.
        models: `ROLE=MODEL` entries that override the suite's models.
        budget_ms, min_accuracy: max latency and min accuracy of a recommended model.
        force: write into `output` even if it is not empty; files of an earlier report are replaced, and no others.
    """
    import msgspec

    from clip_rd_edge.benchmarking.answer_cache import FOLDER, AnswerCache, is_cache
    from clip_rd_edge.benchmarking.report.plot import require_matplotlib
    from clip_rd_edge.benchmarking.report.text import require_report_folder, write_report
    from clip_rd_edge.benchmarking.results import this_environment
    from clip_rd_edge.benchmarking.run import run_suite
    from clip_rd_edge.benchmarking.suite import find_suite, parse_models, read_suite
    from clip_rd_edge.contract.encoder import as_list
    from clip_rd_edge.utils.folders import require_free_output
    from clip_rd_edge.utils.lock import LOCK_FILE, exclusive_writer

    folder = Path(output)
    # Check everything that can be checked before the long work starts.
    interrupted = is_cache(folder / FOLDER)
    require_free_output(folder, overwrite=force or interrupted, replaced=False, ignoring=(LOCK_FILE,))
    require_report_folder(folder)
    require_matplotlib()
    loaded = read_suite(find_suite(os.fspath(suite)), rows=parse_models(as_list(models)), data_root=as_text(root))
    budget = {"budget_ms": budget_ms, "min_accuracy": min_accuracy}
    loaded = msgspec.structs.replace(loaded, **{name: value for name, value in budget.items() if value is not None})
    if models:
        for row in loaded.rows:
            loaded.resolve_model(row)  # models named in this call must exist: they are not skipped
    with exclusive_writer(folder):
        if interrupted:
            reporter.say(f"resuming from the results in {folder / FOLDER}")
        cache = AnswerCache(folder / FOLDER, this_environment())
        open_model = partial(open_encoder, threads=loaded.threads)
        results = run_suite(loaded, open_model, reporter, cache=cache, launch=first_answer)
        write_report(results, folder)
        cache.remove()
    return results


@checked_call
def compare(old: AnyPath, new: AnyPath) -> Changes:
    """Compare two benchmark results, files or folders: regressions, improvements and noise."""
    from clip_rd_edge.benchmarking.regression import compare_runs
    from clip_rd_edge.benchmarking.results import read_results

    return compare_runs(read_results(Path(old)), read_results(Path(new)))


@checked_call
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

    from clip_rd_edge.benchmarking.report.findings import busy_remark, recommendation
    from clip_rd_edge.benchmarking.results import read_results

    read = read_results(Path(results))
    given = {"budget_ms": budget_ms, "min_accuracy": min_accuracy}
    suite = msgspec.structs.replace(read.suite, **{name: value for name, value in given.items() if value is not None})
    advice = recommendation(msgspec.structs.replace(read, suite=suite))
    if advice is None:
        raise UsageError(
            f"{results} has nothing to choose a model by: no requirement, or no zero-shot task.",
            hint="give a requirement, such as --budget-ms 10",
        )
    return " ".join([advice.replace("**", ""), *busy_remark(read)])


def spread(results: AnyPath | Sequence[AnyPath]) -> str:
    """Return means and standard deviations over several results of one suite, such as seeds, as a Markdown table.

    Args:
        results: at least two, each a results.json or the folder of one.
    """
    from clip_rd_edge.benchmarking.results import read_results
    from clip_rd_edge.benchmarking.statistics import seeds_table

    paths = [results] if isinstance(results, str | os.PathLike) else results
    return seeds_table([read_results(Path(path)) for path in paths])


@checked_call
def quickstart(
    output: AnyPath = "quickstart",
    *,
    student: str = "resnet10t",
    recipe: str = "clip-rd-bank",
    seed: int = 0,
    reporter: Reporter = SILENT,
    **options: Unpack[QuickstartOptions],
) -> Results:
    """Run the whole pipeline on the built-in emoji data set in minutes on a CPU; an interrupted run is resumed.

    Args:
        student: a preset or a timm architecture.
        seed: random seed of the student.
        options: the other options of `clip-rd-edge quickstart`, under the same names.
    """
    from clip_rd_edge.utils.files import require_utf8_path

    require_known_options(options, QuickstartOptions.__annotations__, command="quickstart")
    require_utf8_path(Path(output))

    from clip_rd_edge.walkthrough.pipeline import Settings, run_quickstart

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if "photos" in given:
        given["photos"] = Path(given["photos"])
    settings = Settings(folder=Path(output), student=student, recipe=recipe, seed=seed, **given)
    return run_quickstart(settings, reporter, partial(open_encoder, threads=1), first_answer)


@checked_call
def evidence_run(
    suite: AnyPath, output: AnyPath, *, teacher: AnyPath | None = None, reporter: Reporter = SILENT
) -> Evidence:
    """Train a suite's students with each method and seed, measure them, and write tables and figures.

    Args:
        suite: a YAML file, or the name of a suite that ships with the package.
        teacher: as for `distill`; None fine-tunes the built-in teacher first.
    """
    from clip_rd_edge.benchmarking.report.plot import require_matplotlib
    from clip_rd_edge.evidence.report import require_report_folder, write_report
    from clip_rd_edge.evidence.run import run_evidence
    from clip_rd_edge.evidence.suite import read_evidence
    from clip_rd_edge.utils.files import require_utf8_path

    require_utf8_path(Path(output))
    require_matplotlib()
    loaded = read_evidence(os.fspath(suite))
    require_report_folder(Path(output), loaded.name)
    evidence = run_evidence(loaded, Path(output), reporter, teacher=as_text(teacher))
    for path in write_report(evidence, Path(output)):
        reporter.say(f"written: {path}")
    return evidence


@checked_call
def evidence_report(results: AnyPath, *, into: AnyPath | None = None) -> str:
    """Return the tables of an evidence file as Markdown. Nothing is trained.

    Args:
        into: a Markdown file whose marked lines are replaced by the tables; figures are written beside `results`.
    """
    from clip_rd_edge.evidence.report import markdown, publish, read_evidence_file

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
        InputError: a task does not exist or is invalid, or `tasks` are of another type.
    """
    import msgspec

    from clip_rd_edge.contract.task import RetrievalTask, ZeroShotTask, with_distinct_names
    from clip_rd_edge.contract.templates import parse_templates, template_words
    from clip_rd_edge.data.tasks import load_task

    single = isinstance(tasks, str | os.PathLike | ZeroShotTask | RetrievalTask)
    if isinstance(tasks, bytes) or not (single or isinstance(tasks, Iterable)):
        raise InputError(
            f"Tasks of type {type(tasks).__name__} were given; expected a name, a task, or a list of them."
        )
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
