"""What a run measures; an evaluation that several processes, here threads, share gives the scores of one."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from losses_in_numpy import LargestTensor
from PIL import Image
from support import tiny_clip
from thread_processes import call_in_threads

from clip_rd_edge.benchmarking import accuracy
from clip_rd_edge.bundle.encoder import Embeddings
from clip_rd_edge.bundle.runs import METRICS_FILE
from clip_rd_edge.data.tasks import RetrievalTask, Task, ZeroShotTask
from clip_rd_edge.distillation.metrics import EncoderOfAllProcesses, last_evaluation, mean_similarities
from clip_rd_edge.distillation.processes import Processes, Stopped, StopRequest
from clip_rd_edge.errors import InputError
from clip_rd_edge.models.clip import ClipModel
from clip_rd_edge.models.encoder import TorchEncoder

COUNT = 3


def run(action: Callable[[Processes, StopRequest], Any]) -> list[Any]:
    """Call a function in each process; return its results, or what it raised."""
    return call_in_threads(COUNT, lambda processes: action(processes, StopRequest()))


@pytest.fixture
def student() -> ClipModel:
    return tiny_clip(context_length=16)


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, ...]:
    """Ten images of noise."""
    paths = tuple(tmp_path / f"{i}.png" for i in range(10))
    for i, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3)).astype(np.uint8)).save(path)
    return paths


@pytest.fixture(params=["zero-shot", "retrieval"])
def task(request: pytest.FixtureRequest, images: tuple[Path, ...]) -> Task:
    words = tuple(f"a photo of {i}" for i in range(len(images)))
    if request.param == "zero-shot":
        return ZeroShotTask(name="t", images=images, targets=tuple(range(10)), labels=words, templates=("{}", "a {}"))
    return RetrievalTask(name="t", images=images, captions=words, caption_images=tuple(range(10)))


class Counting:
    """An encoder with a copy of a model, which counts what it embeds."""

    def __init__(self, clip: ClipModel) -> None:
        self._encoder = TorchEncoder(dataclasses.replace(clip, model=copy.deepcopy(clip.model)))
        self.describe, self.images, self.texts = self._encoder.describe, 0, 0

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        self.images += len(images)
        return self._encoder.encode_images(images)

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        self.texts += len(texts)
        return self._encoder.encode_texts(texts)


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "BATCH_SIZE", 2)
    monkeypatch.setattr("clip_rd_edge.distillation.metrics.TEXT_BATCH", 4)


@pytest.mark.usefixtures("_small_batches")
def test_each_process_embeds_its_part_and_all_get_the_score_of_one(student: ClipModel, task: Task) -> None:
    expected = accuracy.evaluate(TorchEncoder(student), task)
    encoders = [Counting(student) for _ in range(COUNT)]

    def evaluate(processes: Processes, request: StopRequest) -> Any:
        return accuracy.evaluate(EncoderOfAllProcesses(encoders[processes.rank], processes, request), task)

    assert run(evaluate) == [expected] * COUNT
    texts = 20 if isinstance(task, ZeroShotTask) else 10
    assert sum(encoder.images for encoder in encoders) == 10
    assert sum(encoder.texts for encoder in encoders) == texts
    assert all(encoder.images and encoder.texts for encoder in encoders)


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("task", ["zero-shot"], indirect=True)
def test_what_fails_in_one_process_fails_in_all_and_is_named_by_that_one(student: ClipModel, task: Task) -> None:
    Path(str(task.images[7])).write_bytes(b"not an image")  # in the fourth batch, of the first process

    def evaluate(processes: Processes, request: StopRequest) -> Any:
        return accuracy.evaluate(EncoderOfAllProcesses(Counting(student), processes, request), task)

    first, *others = run(evaluate)
    assert isinstance(first, InputError)
    assert "7.png" in str(first)
    assert [str(error) for error in others] == [f"Process 0 of the run cannot go on: {first}"] * 2


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("task", ["zero-shot"], indirect=True)
def test_a_stop_in_one_process_stops_all_after_a_round(student: ClipModel, task: Task) -> None:
    encoders = [Counting(student) for _ in range(COUNT)]

    def evaluate(processes: Processes, request: StopRequest) -> Any:
        if processes.rank == 1:
            request.signal_name = "SIGTERM"
        return accuracy.evaluate(EncoderOfAllProcesses(encoders[processes.rank], processes, request), task)

    assert all(isinstance(result, Stopped) for result in run(evaluate))
    assert sum(encoder.images for encoder in encoders) == 0
    assert encoders[1].texts == 0


@pytest.mark.usefixtures("_small_batches")
def test_a_process_with_fewer_images_ends_all_rather_than_leave_them_waiting(
    student: ClipModel, images: tuple[Path, ...]
) -> None:
    def evaluate(processes: Processes, request: StopRequest) -> Any:
        own = images[:6] if processes.rank == 1 else images
        task = ZeroShotTask(name="t", images=own, targets=(0,) * len(own), labels=("a", "b"), templates=("{}",))
        return accuracy.evaluate(EncoderOfAllProcesses(Counting(student), processes, request), task)

    for error in run(evaluate):
        assert isinstance(error, InputError)
        assert "different evaluation data: [5, 3, 5] batches" in str(error)


def test_a_student_has_no_scores_of_an_earlier_step(tmp_path: Path) -> None:
    lines = {"step": 1, "evaluation/task": 0.5}, {"step": 2, "loss": 1.0}
    (tmp_path / METRICS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert [last_evaluation(tmp_path, step=step) for step in (1, 2)] == [{"task": 0.5}, {}]


def test_the_geometry_is_the_mean_over_matching_and_other_pairs_without_a_matrix_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(300, 8, generator=generator) + 0.3) for _ in range(2))
    cosines, matching = image @ text.T, torch.eye(300, dtype=torch.bool)
    with LargestTensor() as largest:
        positive, negative = mean_similarities(image, text)
    assert positive == pytest.approx(cosines[matching].mean().item(), abs=1e-6)
    assert negative == pytest.approx(cosines[~matching].mean().item(), abs=1e-6)
    assert largest.entries <= 300 * 8
