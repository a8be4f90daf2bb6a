"""Whether `build` trains as well as somebody who sets `distill` by hand, on four kinds of data.

    python -m benchmarks.training.worlds WORK digits photographs captions images --steps 200 --seeds 0

digits        scikit-learn's digits in class folders, forty of each
photographs   class folders of forty labels of Tux Paint's stamps, five composites of each, of which some are held out
captions      a table of 600 emoji with captions
images        the photographs without their folders, and the list of labels

For each world and seed, the stages of a build are run up to its student; then each configuration of `--ways`, which is
hand-set.yaml beside this file, trains a student from the same teacher, on as many images. All are evaluated on the part
that the build keeps for its report. WORK keeps what is done, and all of it is published: a second call adds seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import clip_rd_edge as edge
from benchmarks.publishing import add_output_options, here_and_now, publish
from clip_rd_edge.benchmarking.tables import markdown_table
from clip_rd_edge.building.look import task_of
from clip_rd_edge.building.stages import Building
from clip_rd_edge.settings.measuring import Build

HAND_SET = Path(__file__).with_name("hand-set.yaml")
BUILD, LABELS, COMPOSITES, CAPTIONS = "build", 40, 5, 600
EDGE = 96  # of photographs, in pixels: at 224, a step takes five times as long
STAGES = ("look", "teach", "choose", "distil")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("worlds", nargs="+", choices=WORLDS)
    parser.add_argument("--steps", type=int, default=200, help="of the build's training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", type=Path, default=HAND_SET, help="options of distill that differ, by name")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a seed and a way, in a process of its own
    add_output_options(parser, "worlds")
    arguments = parser.parse_args()
    if arguments.one:
        seed, way = arguments.one
        changed = {} if way == BUILD else yaml.safe_load(arguments.ways.read_text(encoding="utf-8"))[way]
        trained(arguments.work, arguments.worlds[0], int(seed), way, changed, arguments.steps)
        return
    ways = [BUILD, *yaml.safe_load(arguments.ways.read_text(encoding="utf-8"))]
    results = list[dict[str, Any]]()
    for world in arguments.worlds:
        if not (arguments.work / world).exists():
            WORLDS[world](arguments.work / world)
        for seed in arguments.seeds:
            for way in ways:
                path = arguments.work / "results" / f"{world}-{seed}-{way.replace(' ', '-')}.json"
                if not path.is_file():
                    command = [sys.executable, "-m", "benchmarks.training.worlds", arguments.work, world]
                    command += ["--steps", arguments.steps, "--ways", arguments.ways, "--one", seed, way]
                    subprocess.run(list(map(str, command)), check=True)
        paths = sorted((arguments.work / "results").glob(f"{world}-*.json"))  # of earlier calls, too
        found = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
        results += sorted((result for result in found if result["way"] in ways), key=lambda r: r["seed"])
    publish({**here_and_now(), "steps": arguments.steps, "results": results}, table_of(results, ways), arguments)


def trained(work: Path, world: str, seed: int, way: str, changed: dict[str, Any], steps: int) -> None:
    """Train a world's student in one way, and write what it reaches."""
    data = work / world
    output, place = work / f"{world}-{seed}", data / "images" if world == "images" else data
    labels = data / "labels.txt" if world == "images" else None
    place = data / "pairs.csv" if world == "captions" else place
    size = EDGE if world in ("photographs", "images") else None
    request = Build(
        data=place, output=output, target="cpu-x86", steps=steps, seed=seed, labels=labels, image_size=size, workers=0
    )
    building = Building(request, edge.load)
    for stage in STAGES[: -1 if way != BUILD else None]:
        getattr(building, stage)()
    plan = building.plan
    if way == BUILD:
        student = building.student()
    else:
        options = {
            "student": plan.student, "pretrained_image": plan.start, "image_size": plan.image_size,
            "recipe": plan.recipe, "learning_rate": plan.learning_rate, "batch_size": plan.batch_size,
            "views": plan.views, "freeze_text_layers": plan.frozen_text_layers, **building._run_settings(), **changed,
        }  # fmt: skip
        count = len(building.found.of("train"))
        options["batch_size"] = min(options["batch_size"], count)
        options["steps"] = round(steps * plan.batch_size / options["batch_size"])
        if not options["views"]:
            del options["views"], options["store"]
        student = output / "by-hand" / way.replace(" ", "-")
        shutil.rmtree(student, ignore_errors=True)
        given = {name: value for name, value in options.items() if value not in (None, "")}
        edge.distill(output=student, precision=plan.precision, seed=seed, workers=0, **given)
    (score,) = edge.evaluate(student, task_of(output, building.found, "test"))
    (teacher,) = edge.evaluate(building.teacher, task_of(output, building.found, "test"))
    record = {
        "world": world, "seed": seed, "way": way, "images": score.images, "top1": primary(score),
        "teacher": primary(teacher), "processor_seconds": resource.getrusage(resource.RUSAGE_SELF).ru_utime,
    }  # fmt: skip
    (work / "results").mkdir(exist_ok=True)
    (work / "results" / f"{world}-{seed}-{way.replace(' ', '-')}.json").write_text(json.dumps(record))


def primary(score: Any) -> float:
    return float(score.top1 if hasattr(score, "top1") else score.image_to_text.at1)


def write_digits(folder: Path) -> None:
    command = ["benchmarks.data.digits", str(folder), "--per-class", "40"]
    subprocess.run([sys.executable, "-m", *command], check=True)


def write_photographs(folder: Path) -> None:
    """Write class folders of the first labels in the order of the stamps."""
    source = folder.with_name("stamps")
    if not source.is_dir():
        command = ["benchmarks.data.tuxpaint", str(source), "--views", str(COMPOSITES)]
        subprocess.run([sys.executable, "-m", *command], check=True)
    with (source / "pairs.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["filepath"], row["title"].strip(". ").replace("/", " or ")) for row in csv.DictReader(file)]
    labels = list(dict.fromkeys(label for _, label in rows))[-LABELS:]  # of objects; the first are animals of one kind
    for path, label in rows:
        if label in labels:
            (folder / label).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, folder / label / Path(path).name)


def write_captions(folder: Path) -> None:
    from clip_rd_edge.data.emoji import training_pairs

    pairs = training_pairs()
    chosen = np.linspace(0, len(pairs) - 1, CAPTIONS).astype(int).tolist()
    folder.mkdir(parents=True)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("filepath", "title"))
        writer.writerows((str(pairs.images[number]), pairs.read(number).captions[0]) for number in chosen)


def write_images(folder: Path) -> None:
    photographs = folder.with_name("photographs")
    if not photographs.is_dir():
        write_photographs(photographs)
    (folder / "images").mkdir(parents=True)
    for path in photographs.rglob("*.jpg"):
        shutil.copyfile(path, folder / "images" / path.name)
    names = sorted(path.name for path in photographs.iterdir())
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


WORLDS: dict[str, Callable[[Path], None]] = {
    "digits": write_digits, "photographs": write_photographs, "captions": write_captions, "images": write_images,
}  # fmt: skip


def table_of(results: list[dict[str, Any]], ways: list[str]) -> str:
    """Return top-1 in per cent by way and world, a mean with its standard deviation over seeds, and processor time."""
    worlds = list(dict.fromkeys(result["world"] for result in results))
    of = lambda world, way, key: [r[key] for r in results if (r["world"], r["way"]) == (world, way)]  # noqa: E731
    lines = [["way", *(f"{world}, %: top-1, seconds" for world in worlds)]]
    lines.append(["teacher, untrained", *(f"{100 * np.mean(of(world, BUILD, 'teacher')):.1f}" for world in worlds)])
    for way in ways:
        cells = []
        for world in worlds:
            values = 100 * np.array(of(world, way, "top1"))
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}, {np.mean(of(world, way, 'processor_seconds')):.0f}")
        lines.append([way, *cells])
    return markdown_table(lines, left=(0,))


if __name__ == "__main__":
    main()
