"""Main effects and interactions of an evidence suite whose methods are all combinations of a base and a bank.

    python -m benchmarks.training.factorial relations/relations.json [another part of its students or seeds …]
    python -m benchmarks.training.factorial --worlds apart.json    # of `worlds.py --ways apart.yaml`

Methods are called BASE or BASE-bank. Each contrast is computed within a student and a seed, which shares data, start
weights and order of batches among methods, as a mean over the others' levels; so it has one value per student and seed.
Intervals are Student's t over these values, at 95 % for all contrasts of a set of tasks together (Holm's method decides
which differ from 0). The emoji tasks are the tests; the others are held out of training, to choose by.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from scipy import stats

from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.evidence.report import read_evidence_file
from clip_rd_edge.evidence.suite import Evidence

BANK, WITH_BANK, WITHOUT_BANK = "-bank", " with the bank", " without the bank"
Scores = dict[tuple[str, int], dict[str, float]]  # by student and seed, and then by method
# Of bases in the order of their terms: what a step adds.
CONTRASTS: Mapping[str, Mapping[str, float]] = {
    "CLIP-KD − FD": {"clip-kd": 1, "fd": -1},
    "CLIP-RD − CLIP-KD": {"clip-rd": 1, "clip-kd": -1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--worlds", action="store_true", help="results of worlds.py, of one world")
    arguments = parser.parse_args()
    if arguments.worlds:
        (path,) = arguments.results
        print(contrasts_table(scores_of_ways(json.loads(path.read_text(encoding="utf-8"))), "photographs"))
        return
    evidence = together([read_evidence_file(path) for path in arguments.results])
    names = [task.score.task for task in evidence.teacher.tasks]
    held_out = [k for k, name in enumerate(names) if not name.startswith("emoji, ")]
    tests = [k for k, name in enumerate(names) if name.startswith("emoji, ")]
    for title, tasks in (("held-out pairs", held_out), ("test splits", tests)):
        if tasks:
            print(f"{means_table(evidence, tasks, title)}\n\n{contrasts_table(scores(evidence, tasks), title)}\n")


def together(parts: Sequence[Evidence]) -> Evidence:
    """Return parts of a suite that ran side by side, by students or seeds, as one; a run in several counts once."""
    first, runs = parts[0], {(run.student, run.method, run.seed): run for part in parts for run in part.runs}
    students = tuple(dict.fromkeys(name for part in parts for name in part.suite.students))
    suite = msgspec.structs.replace(first.suite, students=students)
    return msgspec.structs.replace(first, suite=suite, runs=type(first.runs)(runs.values()))


def scores(evidence: Evidence, tasks: Sequence[int]) -> Scores:
    """Return top-1 in per cent by method, a mean over `tasks`, of each student and seed that all methods have."""
    found: Scores = {}
    for run in evidence.runs:
        values = [100 * np.mean([mark == "1" for mark in run.result.tasks[k].hits]) for k in tasks]
        found.setdefault((run.student, run.seed), {})[run.method] = float(np.mean(values))
    return {key: row for key, row in found.items() if len(row) == len(evidence.suite.methods)}


def means_table(evidence: Evidence, tasks: Sequence[int], title: str) -> str:
    """Return top-1 and its standard deviation over seeds by student and method, and the processor time."""
    found = scores(evidence, tasks)
    rows = [("student", "method", f"top-1, {title}", "processor time", "seeds")]
    for student, method in product(evidence.suite.students, (method.name for method in evidence.suite.methods)):
        values = [row[method] for (name, _), row in found.items() if name == student]
        trained = [run for run in evidence.runs if (run.student, run.method) == (student, method)]
        seconds = [run.cpu_seconds for run in trained if run.cpu_seconds]
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        rows.append((student, method, f"{np.mean(values):.1f}{spread}", f"{np.mean(seconds):.0f} s", str(len(values))))
    return markdown_table(rows, left=(0, 1))


def scores_of_ways(results: Mapping[str, Any]) -> Scores:
    """Return the same of apart.yaml's ways, whose names are STUDENT METHOD, or METHOD for the build's own student."""
    found: Scores = {}
    for result in results["results"]:
        *student, base = result["way"].lower().removesuffix(WITH_BANK).removesuffix(WITHOUT_BANK).split()
        if base != "build":
            method = base + (BANK if result["way"].endswith(WITH_BANK) else "")
            key = student[0] if student else result["world"]
            found.setdefault((key, result["seed"]), {})[method] = 100 * result["top1"]
    return found


def contrasts_table(found: Scores, title: str) -> str:
    """Return each main effect and interaction with its simultaneous interval and Holm's p-value."""
    effects: dict[str, list[float]] = {}
    for row in found.values():
        bases = [name for name in row if not name.endswith(BANK)]
        bank = {base: row[base + BANK] - row[base] for base in bases}
        both = {base: (row[base + BANK] + row[base]) / 2 for base in bases}
        for name, weights in CONTRASTS.items():
            effects.setdefault(name, []).append(sum(weight * both[base] for base, weight in weights.items()))
        effects.setdefault("bank", []).append(float(np.mean([*bank.values()])))
        for name, weights in CONTRASTS.items():
            effects.setdefault(f"bank × ({name})", []).append(sum(w * bank[base] for base, w in weights.items()))
    count = len(found)
    p_values = {name: float(stats.ttest_1samp(values, 0).pvalue) for name, values in effects.items()}
    holm, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        holm[name] = largest
    # Bonferroni's half width: all intervals hold together, as Holm's tests do.
    width = stats.t.ppf(1 - 0.025 / len(effects), count - 1) / np.sqrt(count)
    rows = [(f"effect, {title}", "points (95 % together)", "p (Holm)", "by student", "ahead")]
    for name, values in effects.items():
        mean, half = np.mean(values), width * np.std(values, ddof=1)
        by_student = ", ".join(
            f"{np.mean([value for value, key in zip(values, found, strict=True) if key[0] == student]):+.1f}"
            for student in dict.fromkeys(name for name, _ in found)
        )
        ahead = sum(value > 0 for value in values)
        rows.append(
            (
                name,
                f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})".replace("-", "−"),
                f"{holm[name]:.3f}" if holm[name] >= 0.0005 else "below 0.001",
                by_student.replace("-", "−"),
                f"{ahead} of {count}",
            )
        )
    return markdown_table(rows)


if __name__ == "__main__":
    main()
