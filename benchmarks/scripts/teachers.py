"""What a second teacher is worth: students of the embedded teacher, tuned with two seeds, of each and of both.

    export OMP_NUM_THREADS=1
    python benchmarks/scripts/teachers.py teachers --untuned quickstart/teacher-untuned --seeds 0 1 2 3 4 \\
        -o benchmarks/results/MACHINE/teachers.json --readme benchmarks/README.md

Settings are the quickstart's. A student of both teachers is tried as wide as one, with learned projections to both, and
as wide as both together. An interrupted call goes on; finished teachers and students are in the folder.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from unpaired import QUICKSTART, TASKS, scores, spread

import clip_rd_edge as edge
from clip_rd_edge.benchmarking.report.text import write_between_markers
from clip_rd_edge.utils.host import machine_name

WIDTH = 256  # of each teacher
TEACHER_SEEDS = (0, 1)
TEACHER = "the teacher of seed {}"
WAYS: dict[str, dict[str, Any]] = {
    **{TEACHER.format(seed): {"teachers": (seed,), "embedding_size": WIDTH} for seed in TEACHER_SEEDS},
    "both, 256 numbers": {"teachers": TEACHER_SEEDS, "embedding_size": WIDTH},
    "both, 512 numbers": {"teachers": TEACHER_SEEDS, "embedding_size": 2 * WIDTH},
}


def tune_teacher(folder: Path, untuned: Path, *, seed: int, steps: int) -> Path:
    """Tune the embedded teacher as the quickstart does, but for the seed."""
    return edge.distill(
        data="emoji", recipe="clip", student=f"local-dir:{untuned}", freeze_text=True, steps=steps, batch_size=64,
        learning_rate=1e-3, seed=seed, image_size=64, context_length=16, embedding_size=WIDTH, checkpoint_every=50,
        precision="fp32", output=folder / f"teacher-{seed}", resume=True,
    )  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Return mean and standard deviation over the seeds that all ways have, and how far each is ahead of one teacher.

    The last column is the mean difference over seeds and tasks to the students of one teacher, seed by seed, with its
    standard deviation; students of one teacher are compared with those of the other.
    """
    by_way: dict[str, dict[int, list[float]]] = {}
    for run in result["runs"]:
        by_way.setdefault(run["way"], {})[run["seed"]] = [100 * run["top1"][task] for task in TASKS]
    seeds = sorted(set.intersection(*(set(runs) for runs in by_way.values())))
    single = [name for name in by_way if len(WAYS[name]["teachers"]) == 1]
    lines = [
        "| students of | seeds | unseen style, top-1 | unseen concepts, top-1 | ahead of one teacher, points |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, top1 in result["teachers"].items():
        lines.append(f"| {name}, itself | | {' | '.join(f'{100 * top1[task]:.1f}' for task in TASKS)} | |")
    for way, runs in by_way.items():
        columns = [_plus_minus([runs[seed][i] for seed in seeds]) for i in (0, 1)]
        others = [name for name in single if name != way]
        ahead = [
            sum(runs[seed]) / 2 - sum(sum(by_way[name][seed]) / 2 for name in others) / len(others)
            for seed in seeds
            if others
        ]
        lines.append(f"| {way} | {len(seeds)} | {' | '.join(columns)} | {_plus_minus(ahead) if ahead else ''} |")
    return "\n".join(lines)


def _plus_minus(values: list[float]) -> str:
    return " ± ".join(f"{value:.1f}" for value in spread(values))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--untuned", type=Path, required=True, help="the embedded teacher before it is tuned")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a run that it has already is kept")
    parser.add_argument("--readme", type=Path, help="replace the table between <!-- teachers: begin --> and its end")
    arguments = parser.parse_args()
    teachers = {
        seed: tune_teacher(arguments.folder, arguments.untuned, seed=seed, steps=arguments.teacher_steps)
        for seed in TEACHER_SEEDS
    }
    result: dict[str, Any] = {"steps": arguments.steps, "settings": QUICKSTART, "runs": []}
    if arguments.output.is_file():
        result = json.loads(arguments.output.read_text(encoding="utf-8"))
    else:
        result["teachers"] = {TEACHER.format(seed): scores(run) for seed, run in teachers.items()}
    done = {(run["way"], run["seed"]) for run in result["runs"]}
    for seed in arguments.seeds:
        for way, settings in WAYS.items():
            if (way, seed) in done:
                continue
            run = edge.distill(
                data="emoji", teacher=[teachers[number] for number in settings["teachers"]], steps=arguments.steps,
                seed=seed, resume=True, output=arguments.folder / f"{'-'.join(way.replace(',', '').split())}-{seed}",
                **{**QUICKSTART, "embedding_size": settings["embedding_size"]},
            )  # fmt: skip
            result["runs"].append({"way": way, "seed": seed, "top1": scores(run)})
            result |= {"machine": machine_name(), "date": date.today().isoformat()}
            arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"seed {seed}, {way}: {result['runs'][-1]['top1']}", flush=True)
    print(markdown(result))
    if arguments.readme:
        write_between_markers(arguments.readme, "teachers", markdown(result))


if __name__ == "__main__":
    main()
