"""Accuracy of an evidence suite's students in float32 and INT8, by student and number of steps.

    python -m benchmarks.training.int8_students relations/relations.json longer/longer.json --method clip-kd-bank \\
        --seeds 0 1 2 -o benchmarks/results/MACHINE/int8-students.json --readme benchmarks/measurements/relations.md

Each student of the method and the seeds is exported as a user would export it, with the suite's training data to
calibrate, and evaluated on the suite's tasks. Bundles are written beside the runs, and kept.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import clip_rd_edge as edge
from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.evidence.report import read_evidence_file
from clip_rd_edge.evidence.suite import Run

TEST = "emoji, "  # how the test splits' names begin; the other tasks are held out of training, to choose by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="results of suites, which run from this folder")
    parser.add_argument("--method", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_output_options(parser, "int8-students")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    done: set[tuple[str, int, int]] = set()
    for path in arguments.results:
        evidence = read_evidence_file(path)
        suite = evidence.suite
        (method,) = (method for method in suite.methods if method.name == arguments.method)
        teacher = {task.score.task: task.score.top1 for task in evidence.teacher.tasks}
        for run in evidence.runs:
            steps = suite.steps_of(method, run.student)
            if run.method != method.name or run.seed not in arguments.seeds or (run.student, steps, run.seed) in done:
                continue
            done.add((run.student, steps, run.seed))
            folder = path.parent / Run(run.student, method, run.seed).subfolder
            bundle = folder / "int8"
            if not (bundle / "manifest.json").is_file():
                edge.export(folder / "student", output=bundle, precision="int8", calibration=suite.data, threads=1)
            scores = {score.task: score.top1 for score in edge.evaluate(bundle, list(suite.tasks), threads=1)}
            rows += [
                {
                    "student": run.student, "steps": steps, "seed": run.seed,
                    "task": task.score.task, "teacher": teacher[task.score.task], "fp32": task.score.top1,
                    "int8": scores[task.score.task], "processor_seconds": run.cpu_seconds,
                }
                for task in run.result.tasks
            ]  # fmt: skip
    publish({**here_and_now(), "method": arguments.method, "rows": rows}, table_of(rows), arguments)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return top-1 in per cent, its standard deviation over seeds, and the share of the teacher's that INT8 keeps."""
    found: dict[tuple[str, int], dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["student"], row["steps"]][row["seed"]].append(row)
    lines = [["student", "steps", "seeds"]]
    for title in ("held-out pairs", "test splits"):
        lines[0] += [f"{title}: FP32", "INT8", "of the teacher's"]
    lines[0].append("training, processor time")
    for (student, steps), seeds in sorted(found.items()):
        cells = [student, f"{steps:,}", str(len(seeds))]
        for test in (False, True):
            of = {
                key: np.array(
                    [
                        100 * np.mean([r[key] for r in runs if r["task"].startswith(TEST) == test])
                        for runs in seeds.values()
                    ]
                )
                for key in ("fp32", "int8", "teacher")
            }
            cells += [f"{of[key].mean():.1f} ± {of[key].std(ddof=1):.1f}" for key in ("fp32", "int8")]
            cells.append(f"{100 * of['int8'].mean() / of['teacher'].mean():.0f} %")
        cells.append(f"{np.mean([runs[0]['processor_seconds'] for runs in seeds.values()]):.0f} s")
        lines.append(cells)
    return markdown_table(lines, left=(0,))


if __name__ == "__main__":
    main()
