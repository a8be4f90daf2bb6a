"""What a second teacher is worth: students of the embedded teacher, tuned with two seeds, of each and of both.

    export OMP_NUM_THREADS=1
    python -m benchmarks.training.teachers teachers --untuned quickstart/teacher-untuned --seeds 0 1 2 3 4 \\
        -o benchmarks/results/MACHINE/teachers.json --readme benchmarks/measurements/two-teachers.md

Both teachers' embeddings are stored. They share their text tower, so a student of both learns the mean of their image
embeddings. An interrupted call goes on; finished teachers and students are in the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

import clip_rd_edge as edge
from benchmarks.training.quickstart_students import Result, parser_for, plus_minus, rows, scores, train_all
from clip_rd_edge.bundle.encoder import Description, Embeddings, Encoder
from clip_rd_edge.pipeline import EMBEDDING_SIZE, FROZEN_LAYERS

WIDTH = EMBEDDING_SIZE  # of each teacher
TEACHER_SEEDS = (0, 1)
TEACHER = "the teacher of seed {}"
# By name: the seeds of the teachers. Both come first: a store of several teachers serves students of one, too.
WAYS: dict[str, tuple[int, ...]] = {
    "both teachers": TEACHER_SEEDS,
    **{TEACHER.format(seed): (seed,) for seed in TEACHER_SEEDS},
}


def tune_teacher(folder: Path, untuned: Path, *, seed: int, steps: int) -> Path:
    """Tune the embedded teacher as the quickstart does, but for the seed."""
    return edge.distill(
        data="emoji", recipe="clip", student=f"local-dir:{untuned}", freeze_text=True, freeze_image=FROZEN_LAYERS,
        freeze_norms=True, steps=steps, batch_size=64, learning_rate=1e-3, seed=seed, image_size=64,
        context_length=16, embedding_size=WIDTH, checkpoint_every=50, precision="fp32",
        output=folder / f"teacher-{seed}", resume=True,
    )  # fmt: skip


class Together:
    """Several models as one `Encoder`: their embeddings side by side, so that cosines are the means of theirs."""

    def __init__(self, *encoders: Encoder) -> None:
        self._encoders = encoders

    def describe(self) -> Description:
        """Return the first model's description, but for the width."""
        parts = [encoder.describe() for encoder in self._encoders]
        return msgspec.structs.replace(parts[0], embedding_size=sum(part.embedding_size for part in parts))

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """Embed images, (N, D)."""
        return self._side_by_side([encoder.encode_images(images) for encoder in self._encoders])

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts, (N, D)."""
        return self._side_by_side([encoder.encode_texts(texts) for encoder in self._encoders])

    def _side_by_side(self, parts: Sequence[Embeddings]) -> Embeddings:
        embeddings: Embeddings = np.concatenate(parts, axis=1) / np.float32(len(parts)) ** 0.5
        return embeddings


def markdown(result: Result) -> str:
    """Return the figures of each way, and how far it is ahead of one teacher.

    The last column is the mean difference over seeds and tasks to the students of one teacher, seed by seed, with its
    standard deviation; students of one teacher are compared with those of the other.
    """
    by_way, ahead = scores(result), {}
    single = [way for way in by_way if len(WAYS[way]) == 1]
    for way, runs in by_way.items():
        others = [by_way[name] for name in single if name != way]
        if others:
            ahead[way] = plus_minus(
                [sum(runs[seed]) / 2 - sum(sum(other[seed]) / 2 for other in others) / len(others) for seed in runs]
            )
    head = [
        "| students of | seeds | unseen style, top-1 | unseen concepts, top-1 | ahead of one teacher, points |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(head + rows(result, ahead))


def main() -> None:
    parser = parser_for("teachers", steps=1100)
    parser.add_argument("--untuned", type=Path, required=True, help="the embedded teacher before it is tuned")
    parser.add_argument("--teacher-steps", type=int, default=400)
    arguments = parser.parse_args()
    teachers = [
        tune_teacher(arguments.folder, arguments.untuned, seed=seed, steps=arguments.teacher_steps)
        for seed in TEACHER_SEEDS
    ]
    ways = {
        name: {
            "data": "emoji",
            "teacher": [teachers[seed] for seed in seeds],
            "store": str(arguments.folder / "embeddings-{seed}"),
        }
        for name, seeds in WAYS.items()
    }
    encoders = [edge.load(teacher).encoder for teacher in teachers]
    itself = {f"{TEACHER.format(seed)}, itself": teacher for seed, teacher in zip(TEACHER_SEEDS, encoders, strict=True)}
    train_all(arguments, ways, {**itself, "both teachers, themselves": Together(*encoders)}, markdown)


if __name__ == "__main__":
    main()
