"""Compare the accuracy of `index` and `search` on the embedded images, caption by caption, with the evaluation.

python benchmarks/scripts/search_accuracy.py quickstart/bundles/int8          # a minute
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from click.testing import CliRunner

from clip_rd_edge.benchmarking.accuracy import retrieval
from clip_rd_edge.cli.main import cli
from clip_rd_edge.contract.task import RetrievalTask
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.runtime.load import load

TOP = 5
TOLERANCE = 1e-6  # for rounding: an embedding does not depend on the other images of its batch


def search_recall(bundle: Path, task: RetrievalTask, folder: Path) -> float:
    """Return how often the commands find a caption's image among the first TOP results."""
    images = folder / "images"
    images.mkdir()
    for number, image in enumerate(task.images):
        shutil.copy(str(image), images / f"{number:05}.png")
    runner = CliRunner()
    runner.invoke(cli, ["index", str(bundle), str(images), "-o", str(folder / "index")], catch_exceptions=False)
    hits = 0
    for caption, number in zip(task.captions, task.caption_images, strict=True):
        command = ["search", str(folder / "index"), caption, "--top", str(TOP), "--json"]
        lines = runner.invoke(cli, command, catch_exceptions=False).stdout.splitlines()
        hits += f"{number:05}.png" in {Path(json.loads(line)["image"]).name for line in lines}
    return hits / len(task.captions)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--task", default="emoji:unseen-concepts:retrieval")
    args = parser.parse_args()
    task = load_task(args.task)
    assert isinstance(task, RetrievalTask)
    evaluated = retrieval(load(args.bundle), task).score.text_to_image.at5
    with tempfile.TemporaryDirectory() as name:
        searched = search_recall(args.bundle, task, Path(name))
    print(f"{task.name}: {len(task.captions)} captions, {len(task.images)} images")
    print(f"text-to-image R@{TOP}: search {searched:.4f}, evaluation {evaluated:.4f}")
    sys.exit(evaluated is None or abs(searched - evaluated) > TOLERANCE)


if __name__ == "__main__":
    main()
