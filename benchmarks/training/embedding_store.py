"""Compare training steps with a live teacher and with its store, data loading included, in turn in one process.

python -m benchmarks.training.embedding_store ViT-B-16        # random weights of real size; or ViT-L-14
python -m benchmarks.training.embedding_store ViT-B-16 --batch-size 16 --steps 4 --student mobilevit_s
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import open_clip
import torch
from PIL import Image

from clip_rd_edge.data.order import StepSampler
from clip_rd_edge.distillation.config import RunConfig, load_recipe
from clip_rd_edge.distillation.embed import ShardMaker, fill_store
from clip_rd_edge.distillation.loader import Batch, ViewDataset, step_loader
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.setup import load_setup, make_dataset
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.distillation.store import open_stores
from clip_rd_edge.distillation.teacher import LiveTeacher, StoredTeacher, Teacher, ensemble_of
from clip_rd_edge.models.clip import to_device


def make_data(folder: Path, pairs: int) -> Path:
    """Write noise images of 320 × 240 pixels with captions, and return their table."""
    rng = np.random.default_rng(0)
    lines = ["filepath,title"]
    for i in range(pairs):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        coarse.resize((320, 240)).save(folder / f"{i}.jpg")
        lines.append(f"{folder / f'{i}.jpg'},image number {i}")
    table = folder / "pairs.csv"
    table.write_text("\n".join(lines))
    return table


def make_teacher(folder: Path, architecture: str) -> Path:
    """Write an open_clip model of the architecture with random weights, and return its folder."""
    torch.manual_seed(0)
    model = open_clip.create_model(architecture)
    folder.mkdir()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher")
    parser.add_argument("--student", default="mobilevit_s")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = RunConfig(
            recipe_name="clip-rd",
            recipe=msgspec.structs.replace(load_recipe("clip-rd"), batch_size=args.batch_size),
            data=str(make_data(folder, 2 * args.batch_size)),
            teacher=str(make_teacher(folder / "teacher", args.teacher)),
            student=args.student,
            teacher_precision="fp32",
            views=1,
            workers=1,
        )
        setup = load_setup(config, name="student", processes=Processes())
        live = Teacher(setup.teachers[0], device, autocast=None)
        stored = make_dataset(config, setup, with_teacher_pixels=False)
        maker = ShardMaker(config, live, setup.pairs, stored.crops)
        fill_store(folder / "store", maker, Processes(), max_bad=0.0)
        stored.store = open_stores([folder / "store"])
        to_device(setup.student.model, device).train()

        def batches(dataset: ViewDataset) -> Iterator[Batch]:
            sampler = StepSampler(setup.pairs.groups, args.batch_size, seed=0, steps=range(args.steps + 1))
            return iter(step_loader(dataset, sampler, workers=config.workers))

        modes = {
            "online": (LiveTeacher([live]), batches(make_dataset(config, setup))),
            "stored": (StoredTeacher(ensemble_of(setup.teachers), device), batches(stored)),
        }
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        gradients: dict[str, torch.Tensor] = {}
        for step in range(args.steps + 1):
            for mode, (teacher, source) in modes.items():
                start = time.perf_counter()
                run = TrainingStep(setup.student, teacher, setup.objective, Processes(), StepSettings())
                run(next(source), step)
                if step:  # the first step is warm-up
                    seconds[mode].append(time.perf_counter() - start)
                else:
                    gradients[mode] = setup.student.model.get_parameter("text.text_projection").grad.clone()  # type: ignore[union-attr]
                setup.student.model.zero_grad(set_to_none=True)
        online, from_store = (statistics.median(seconds[mode]) for mode in modes)
        difference = (gradients["online"] - gradients["stored"]).norm() / gradients["online"].norm()
        print(
            f"{args.teacher} to {args.student}, batch {args.batch_size}: online {online:.2f} s per step, "
            f"from a store {from_store:.2f} s, {online / from_store:.1f}× as fast; "
            f"relative gradient difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
