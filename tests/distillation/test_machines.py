"""Processes on machines that do not share files: what one of them lacks ends all, with a sentence that says so."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import save_tiny_teacher, write_shards
from thread_processes import Threads, call_in_threads

import clip_rd_edge as edge
from clip_rd_edge.bundle.preprocess import Preprocessing
from clip_rd_edge.bundle.runs import read_metrics
from clip_rd_edge.distillation.checkpoint import load_checkpoint, save_checkpoint
from clip_rd_edge.distillation.embed import fill_store
from clip_rd_edge.distillation.pixels import Crops
from clip_rd_edge.distillation.processes import Processes
from clip_rd_edge.distillation.store import CompleteStore, StoreManifest, image_shard, keys_file, text_shard, write_rows
from clip_rd_edge.errors import InputError, UsageError
from clip_rd_edge.utils.structs import to_json

COUNT = 3


@pytest.fixture
def machines(pairs_csv: Path, tmp_path: Path) -> list[Path]:
    """A folder for each of three machines, with the same shards, pairs, teacher and evaluation images."""
    save_tiny_teacher(tmp_path / "teacher")
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        for name in ("pairs.csv", "pictures", "teacher"):
            copy = shutil.copytree if (tmp_path / name).is_dir() else shutil.copy2
            copy(tmp_path / name, folder / name)
        write_shards(folder / "pairs.csv")
        for label in ("cat", "dog"):
            (folder / "images" / label).mkdir(parents=True)
            shutil.copy2(tmp_path / "pictures" / "0.png", folder / "images" / label)
        shutil.copy2(Path(__file__).parents[2] / "clip_rd_edge/distillation/recipes/clip-rd.yaml", folder / "own.yaml")
    return folders


OPTIONS: dict[str, Any] = {
    "data": "{}/pairs.csv",
    "teacher": "{}/teacher",
    "student": "test_vit",
    "image_size": 48,
    "text": "64x1",
    "context_length": 12,
    "batch_size": 6,
    "steps": 2,
    "precision": "fp32",
    "workers": 0,
}
Distil = Callable[..., list[Any]]


@pytest.fixture
def distil(machines: list[Path], monkeypatch: pytest.MonkeyPatch) -> Distil:
    """Return a function that trains with a process on each machine, and returns what each returned or raised."""
    current = threading.local()

    @contextmanager
    def join() -> Iterator[Processes]:
        yield current.processes

    monkeypatch.setattr("clip_rd_edge.distillation.run.join_processes", join)
    monkeypatch.setattr("clip_rd_edge.distillation.processes.join_processes", join)
    monkeypatch.setenv("WORLD_SIZE", str(COUNT))

    def run(of_b: dict[str, Any] | None = None, **options: Any) -> list[Any]:
        def process(processes: Threads) -> Path:
            current.processes = processes
            folder = machines[processes.rank]
            told = {**OPTIONS, **options, **((of_b or {}) if processes.rank == 1 else {})}
            located = {name: value.format(folder) if isinstance(value, str) else value for name, value in told.items()}
            return edge.distill(output=folder / "run", **located)

        return call_in_threads(COUNT, process, hosts="abc")

    return run


def assert_all_say(errors: list[Any], message: str) -> None:
    """Check that the second process raised an error with this message, and the others one that quotes it."""
    assert all(isinstance(error, UsageError) for error in errors), errors
    assert re.search(message, str(errors[1])), errors[1]
    quote = f"Process 1 of the run, on b, cannot go on: {errors[1]}"
    assert [str(errors[0]), str(errors[2])] == [quote] * 2


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({"recipe": "{}/own.yaml"}, "own.yaml", "b/own.yaml"),
        ({"data": "{}/{{0..2}}.tar"}, "1.tar", "b/1.tar"),
        ({}, "teacher/open_clip_model.safetensors", "b/teacher"),
    ],
)
def test_what_one_machine_lacks_ends_all_and_is_named(
    machines: list[Path], distil: Distil, options: dict[str, str], name: str, message: str
) -> None:
    path = machines[1] / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert_all_say(distil(**options), message)
    assert not any((machine / "run").exists() for machine in machines)


def test_the_main_process_evaluates_for_all(machines: list[Path], distil: Distil) -> None:
    assert distil(tasks="{}/images") == [machine / "run" for machine in machines]
    assert "evaluation/images" in read_metrics(machines[0] / "run")[-1]
    assert [(machine / "run").exists() for machine in machines] == [True, False, False]


def change_caption(machine: Path) -> None:
    table = machine / "pairs.csv"
    table.write_text(table.read_text().replace("number 7", "number 8"))


def change_teacher(machine: Path) -> None:
    path = machine / "teacher" / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["logit_scale"] += 0.1
    save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_caption, r"\S*pairs.csv has as many samples, but other names, captions"),
        (change_teacher, "the teacher teacher has other weights"),
    ],
)
def test_other_files_under_the_same_names_are_refused(
    machines: list[Path], distil: Distil, change: Callable[[Path], None], message: str
) -> None:
    change(machines[1])
    for error in distil():
        assert isinstance(error, InputError)
        assert re.match(f"Process 1 of the run, on b, reads other files than process 0: {message}", str(error))


@pytest.mark.parametrize(("of_b", "message"), [({"seed": 3}, "seed: 0 → 3"), ({"tasks": "{}/images"}, "tasks: 0 → 1")])
def test_other_options_are_refused(distil: Distil, of_b: dict[str, Any], message: str) -> None:
    assert_all_say(distil(of_b), f"^The processes of the run have different options: {message}")


def test_a_checkpoint_reaches_machines_that_do_not_see_it(tmp_path: Path) -> None:
    modules = [torch.nn.Linear(3, 2) for _ in range(COUNT)]
    save_checkpoint(tmp_path / "0", 4, {"model": modules[0]})
    save_checkpoint(tmp_path / "2", 4, {"model": modules[2]})  # an older run's

    def load(processes: Threads) -> int:
        return load_checkpoint(tmp_path / str(processes.rank), {"model": modules[processes.rank]}, processes)

    assert call_in_threads(COUNT, load) == [4] * COUNT
    assert all(torch.equal(module.weight, modules[0].weight) for module in modules)


def test_a_store_that_one_machine_does_not_see_is_refused_unless_it_is_complete_on_each(tmp_path: Path) -> None:
    manifest = StoreManifest(
        teacher="t", teacher_sha256="", logit_scale=1, embedding_size=2, seed=0, views=1, data="d", pairs=1,
        preprocessing=Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3), crops=Crops(scale=(0.9, 1.0)),
        pairs_sha256="", precision="fp32",
    )  # fmt: skip

    def build(processes: Threads) -> None:
        folder = tmp_path / ("other" if processes.rank == 1 else "shared")
        unused: Any = SimpleNamespace(manifest=manifest)
        fill_store(folder, unused, processes, max_bad=0)

    assert_all_say(call_in_threads(COUNT, build, hosts="abc"), "other/manifest.json")
    for name in ("shared", "other"):
        write_rows(keys_file(tmp_path / name), np.zeros((1, 1), np.uint64))
        for shard in (text_shard(tmp_path / name, 0), image_shard(tmp_path / name, 0, 0)):
            write_rows(shard, np.zeros((1, 2), np.float16))
        for file, content in (("manifest.json", manifest), ("complete.json", CompleteStore(1))):
            (tmp_path / name / file).write_bytes(to_json(content))
    assert call_in_threads(COUNT, build, hosts="abc") == [None] * COUNT
    (tmp_path / "other" / "manifest.json").write_bytes(to_json(msgspec.structs.replace(manifest, seed=1)))
    assert_all_say(call_in_threads(COUNT, build, hosts="abc"), "other is a teacher's store, but its seed is 1")
