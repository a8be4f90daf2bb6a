from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import clip_rd_edge
from clip_rd_edge.benchmarking.results import read_results
from clip_rd_edge.errors import ConfigError, UsageError
from clip_rd_edge.evidence import report
from clip_rd_edge.evidence.report import markdown, read_evidence_file, write_evidence
from clip_rd_edge.evidence.results import Evidence, ModelResult
from clip_rd_edge.utils.structs import to_yaml

from .conftest import Make

CORRECT = {("none", 0): 4, ("clip-rd", 0): 12, ("none", 1): 3}  # three of six runs are finished


def test_an_unfinished_suite_gives_tables(make: Make) -> None:
    text = markdown(make(CORRECT))
    assert text.startswith("3 of 6 runs are finished: 2 steps of 6 pairs")
    assert "| test_vit | `none` | 2 | 17.5 ± 3.5 | 17.5 ± 3.5 | 17.5 ± 3.5 |" in text
    assert "| test_vit | `clip-rd` | 1 | **+40.0 (+" in text
    assert "without-xrd" not in text
    assert "| 0.500 ± 0.000 | −0.125 ± 0.000 | 0.625 ± 0.000 |" in text


def test_methods_of_different_steps_have_a_table_of_their_times(make: Make) -> None:
    evidence = make(CORRECT)
    assert "CPU time of training" not in markdown(evidence)
    methods = tuple(
        msgspec.structs.replace(method, steps=1 if method.name == "clip-rd" else None)
        for method in evidence.suite.methods
    )
    evidence = msgspec.structs.replace(evidence, suite=msgspec.structs.replace(evidence.suite, methods=methods))
    text = markdown(evidence)
    assert text.startswith("3 of 6 runs are finished: 2 steps, or those given below, of 6 pairs")
    seconds = [run.cpu_seconds for run in evidence.runs if run.method == "none" and run.cpu_seconds is not None]
    assert f"| test_vit | `none` | 2 | {sum(seconds) / len(seconds):.0f} ± " in text
    assert "| test_vit | `clip-rd` | 1 | " in text


def test_times_on_two_machines_are_told_apart(make: Make) -> None:
    evidence = make(CORRECT)
    first, second, third = (
        msgspec.structs.replace(
            run,
            cpu_seconds=seconds,
            environment=msgspec.structs.replace(run.environment, machine=machine),
        )
        for run, machine, seconds in zip(
            evidence.runs,
            ("Abacus, 2 cores", "Abacus, 2 cores", "Slide rule, 1 core"),
            (60.0, 120.0, 900.0),
            strict=True,
        )
    )
    methods = tuple(msgspec.structs.replace(method, steps=3) for method in evidence.suite.methods)
    suite = msgspec.structs.replace(evidence.suite, methods=methods)
    text = markdown(msgspec.structs.replace(evidence, suite=suite, runs=(first, second, third)))
    assert ". Abacus, 2 cores (2 runs) and Slide rule, 1 core (1 run), 1 thread, " in text
    assert "CPU time on Abacus, 2 cores, 1.0 to 2.0 minutes per run; 0.2 hours of CPU time on Slide rule, 1 c" in text
    assert "| test_vit | `none` | Abacus, 2 cores | 3 | 60 |" in text
    assert "| test_vit | `none` | Slide rule, 1 core | 3 | 900 |" in text


def test_times_on_two_processors_of_one_name_are_told_apart_by_their_instruction_sets(make: Make) -> None:
    evidence = make(CORRECT)
    instruction_sets: tuple[tuple[str, ...], ...] = (("AVX2",), ("AVX2",), ("AVX2", "AVX-512"))
    runs = tuple(
        msgspec.structs.replace(
            run,
            cpu_seconds=seconds,
            environment=msgspec.structs.replace(run.environment, machine="Abacus, 2 cores", instruction_sets=sets),
        )
        for run, sets, seconds in zip(evidence.runs, instruction_sets, (60.0, 120.0, 900.0), strict=True)
    )
    methods = tuple(msgspec.structs.replace(method, steps=3) for method in evidence.suite.methods)
    suite = msgspec.structs.replace(evidence.suite, methods=methods)
    text = markdown(msgspec.structs.replace(evidence, suite=suite, runs=runs))
    assert ". Abacus, 2 cores with AVX2 (2 runs) and Abacus, 2 cores with AVX2, AVX-512 (1 run), 1 thread, " in text
    assert "| test_vit | `none` | Abacus, 2 cores with AVX2 | 3 | 60 |" in text
    assert "| test_vit | `none` | Abacus, 2 cores with AVX2, AVX-512 | 3 | 900 |" in text
    assert "| test_vit | `clip-rd` | Abacus, 2 cores with AVX2 | 3 | 120 |" in text


def test_a_suite_that_compares_nothing_has_no_differences(make: Make) -> None:
    evidence = make(CORRECT)
    assert "Differences in" in markdown(evidence)
    alone = msgspec.structs.replace(evidence.suite, compare_with=())
    assert "Differences in" not in markdown(msgspec.structs.replace(evidence, suite=alone))


def test_a_suite_without_retrieval_tasks_has_no_table_of_geometry(make: Make) -> None:
    def zero_shot_alone(result: ModelResult) -> ModelResult:
        return msgspec.structs.replace(result, tasks=result.tasks[:1])

    evidence = make(CORRECT)
    runs = tuple(msgspec.structs.replace(run, result=zero_shot_alone(run.result)) for run in evidence.runs)
    text = markdown(msgspec.structs.replace(evidence, teacher=zero_shot_alone(evidence.teacher), runs=runs))
    assert "top-1" in text
    assert "Geometry" not in text


def test_only_the_cost_of_the_built_in_teacher_has_its_tuning(make: Make) -> None:
    evidence = make(CORRECT)
    assert "plus tuning the teacher and computing its embeddings." in markdown(evidence)
    other = msgspec.structs.replace(evidence.teacher, model="ViT-B-16")
    own_data = msgspec.structs.replace(evidence.suite, data="pairs.csv")
    for changed in ({"teacher": other}, {"suite": own_data}):
        assert "run, plus computing the teacher's embeddings." in markdown(msgspec.structs.replace(evidence, **changed))


def test_a_task_that_was_trained_on_is_named(make: Make) -> None:
    evidence = make(CORRECT)
    assert "trained and evaluated" not in markdown(evidence)
    suite = msgspec.structs.replace(evidence.suite, data="./pairs.csv", tasks=("squares", "pairs.csv"))
    text = markdown(msgspec.structs.replace(evidence, suite=suite))
    assert "\n\npairs.csv is both trained and evaluated on: its scores say nothing about new pairs.\n\n" in text


def test_a_machine_or_task_is_no_markup(make: Make) -> None:
    evidence = make(CORRECT)
    name = "<script>[x](http://x)\x1b[2J\n\n# b"
    environment = msgspec.structs.replace(evidence.runs[0].environment, machine=name)
    runs = tuple(msgspec.structs.replace(run, environment=environment) for run in evidence.runs)
    suite = msgspec.structs.replace(evidence.suite, data=name, tasks=(name,))
    text = markdown(msgspec.structs.replace(evidence, suite=suite, runs=runs))
    assert not any(part in text for part in ("<", "](", "\x1b", "\n# "))


def test_a_suite_of_retrieval_tasks_alone_is_compared_in_their_recall(make: Make) -> None:
    def retrieval_alone(result: ModelResult) -> ModelResult:
        zero_shot, retrieval = result.tasks
        return msgspec.structs.replace(result, tasks=(msgspec.structs.replace(retrieval, hits=zero_shot.hits),))

    evidence = make(CORRECT)
    runs = tuple(msgspec.structs.replace(run, result=retrieval_alone(run.result)) for run in evidence.runs)
    text = markdown(msgspec.structs.replace(evidence, teacher=retrieval_alone(evidence.teacher), runs=runs))
    assert "retrieval, image → text R@1 | unseen style, retrieval, text → image R@1 |" in text
    assert "Differences in image → text R@1, in percentage points" in text
    assert "top-1" not in text.lower()
    assert "| test_vit | `clip-rd` | 1 | **+40.0 (+" in text


def test_a_task_with_few_labels_has_no_column_for_top_5(make: Make) -> None:
    def four_labels(result: ModelResult) -> ModelResult:
        task = result.tasks[0]
        score = msgspec.structs.replace(task.score, classes=4, top5=None)
        return msgspec.structs.replace(result, tasks=(msgspec.structs.replace(task, score=score),))

    evidence = make(CORRECT)
    runs = tuple(msgspec.structs.replace(run, result=four_labels(run.result)) for run in evidence.runs)
    text = markdown(msgspec.structs.replace(evidence, teacher=four_labels(evidence.teacher), runs=runs))
    rows = [line for line in text.partition("\n\nDifferences")[0].splitlines() if line.startswith("|")]
    assert "top-5" not in rows[0]
    assert len({row.count("|") for row in rows}) == 1


def test_the_published_comparisons_of_small_suites_match_their_results() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    page = _without_intervals((benchmarks / "README.md").read_text(encoding="utf-8"))
    names = ("bank.json", "bank-text.json", "bank-choice.json", "tokens.json", "trimmed.json", "equal-time.json")
    published = [source for source in sorted(benchmarks.glob("results/*/*.json")) if source.name in names]
    assert {source.name for source in published} == set(names)
    for source in published:
        assert _without_intervals(markdown(read_evidence_file(source))) in page


def test_evidence_is_read_as_it_was_written(make: Make, tmp_path: Path) -> None:
    path, evidence = tmp_path / "small.json", make(CORRECT)
    write_evidence(path, evidence)
    assert read_evidence_file(path) == evidence
    assert sum(line.startswith('{"student"') for line in path.read_text().splitlines()) == len(evidence.runs)
    content = msgspec.json.decode(path.read_bytes())
    for damaged, message in (({"format_version": 9}, "format version 9"), ({"runs": []}, "has no runs")):
        path.write_bytes(msgspec.json.encode({**content, **damaged}))
        with pytest.raises(ConfigError, match=message):
            read_evidence_file(path)


def test_the_results_of_a_benchmark_are_told_from_those_of_evidence(tmp_path: Path, make: Make) -> None:
    (tmp_path / "results.json").write_text('{"format_version": 3, "suite": {}, "rows": [], "tasks": []}')
    with pytest.raises(ConfigError, match="has the results of a benchmark; expected those of an evidence suite"):
        read_evidence_file(tmp_path / "results.json")
    write_evidence(tmp_path / "evidence.json", make(CORRECT))
    with pytest.raises(ConfigError, match="has the results of an evidence suite") as raised:
        read_results(tmp_path / "evidence.json")
    assert raised.value.hint == f"clip-rd-edge evidence report {tmp_path / 'evidence.json'}"


def test_a_secret_in_the_address_of_the_data_is_not_in_the_evidence(make: Make, tmp_path: Path) -> None:
    evidence = make(CORRECT)
    suite = msgspec.structs.replace(evidence.suite, data="https://me:SECRET@a.example/{0..9}.tar?sig=SECRET")
    write_evidence(tmp_path / "small.json", msgspec.structs.replace(evidence, suite=suite))
    assert "SECRET" not in (tmp_path / "small.json").read_text()
    assert read_evidence_file(tmp_path / "small.json").suite.data == "https://a.example/{0..9}.tar"


def test_one_command_updates_the_page_and_the_figures(
    make: Make,
    tmp_path: Path,
    command_line: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for figure in ("learning_curves", "geometry_curves"):  # the test that runs the suite draws them
        monkeypatch.setattr(report, figure, lambda *_, name=figure, **__: name.encode())
    page, source = tmp_path / "README.md", tmp_path / "small.json"
    page.write_text("# Before\n<!-- small: begin -->\nstale\n<!-- small: end -->\nafter\n")
    write_evidence(source, make(CORRECT))
    assert command_line("evidence", "report", source, "--into", page)[0] == 0
    text = page.read_text()
    assert text.startswith("# Before\n<!-- small: begin -->\n3 of 6 runs")
    assert text.endswith("<!-- small: end -->\nafter\n")
    assert "stale" not in text
    assert ", 1.5 minutes per run" in text  # and not 1.5 to 1.5
    assert (tmp_path / "small-curves.png").read_bytes() == b"learning_curves"
    assert (tmp_path / "small-geometry.png").read_bytes() == b"geometry_curves"

    page.write_text("no markers\n")
    code, _, error = command_line("evidence", "report", source, "--into", page)
    assert (code, page.read_text()) == (2, "no markers\n")
    assert "has no lines <!-- small: begin -->" in error


def test_the_published_tables_match_the_published_results() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    (source,) = benchmarks.glob("results/*/method-evidence.json")
    page = (benchmarks / "README.md").read_text(encoding="utf-8")
    assert _without_intervals(markdown(read_evidence_file(source))) in _without_intervals(page)


def _without_intervals(text: str) -> str:
    """Remove intervals and bold, which depend on random numbers that may differ between numpy versions."""
    return re.sub(r" \([^)|]*\)|\*\*", "", text)


def test_the_command_shows_what_it_measured_even_if_its_suite_is_gone_meanwhile(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Callable[..., tuple[int, str, str]]
) -> None:
    evidence, suite = make(CORRECT), tmp_path / "suite.yaml"
    suite.write_text(to_yaml(evidence.suite))

    def run(suite: str, output: Path, **_: object) -> Evidence:
        write_evidence(output / "small.json", evidence)
        Path(suite).unlink()
        return evidence

    monkeypatch.setattr(clip_rd_edge, "evidence_run", run, raising=False)
    code, shown, _ = command_line("evidence", "run", str(suite), "-o", str(tmp_path / "out"))
    assert (code, "3 of 6 runs are finished" in shown) == (0, True)


def test_a_report_replaces_an_earlier_one_and_no_file_of_the_users(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence, suite, folder = make(CORRECT), tmp_path / "suite.yaml", tmp_path / "out"
    suite.write_text(to_yaml(evidence.suite))
    runs = []

    def run(*_: object, **__: object) -> Evidence:
        runs.append(1)
        write_evidence(folder / "small.json", evidence)
        return evidence

    monkeypatch.setattr("clip_rd_edge.evidence.run.run_evidence", run)
    names = ("small.json", "small.md", "small-curves.png", "small-geometry.png")
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine")
        with pytest.raises(UsageError, match=f"{name} is not replaced"):
            clip_rd_edge.evidence_run(suite, folder)
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    assert not runs
    for _ in range(2):
        clip_rd_edge.evidence_run(suite, folder)
    assert {path.name for path in folder.iterdir()} == set(names)
