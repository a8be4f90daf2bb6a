"""Several processes, here threads that exchange tensors, compute what one does; and what a step does in chunks."""

from __future__ import annotations

import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from support import PATIENCE_S, tiny_clip
from thread_processes import Exchange, Threads, learn_as_one, lose_the_second, start_two
from torch import Tensor, nn

from clip_rd_edge.distillation.checkpoint import list_checkpoints, save_checkpoint
from clip_rd_edge.distillation.config import load_recipe
from clip_rd_edge.distillation.loader import Batch
from clip_rd_edge.distillation.processes import Processes, _store_after_restart, lost_process
from clip_rd_edge.distillation.step import StepSettings, TrainingStep
from clip_rd_edge.distillation.store import QueueBank
from clip_rd_edge.distillation.teacher import BatchTeacher, ChoosingTeacher, LiveTeacher, Teacher
from clip_rd_edge.errors import LostProcessError
from clip_rd_edge.losses.objective import Objective, Weights
from clip_rd_edge.models.clip import ClipModel

CAPTIONS = ["a cat", "two dogs", "red", "a very blue sky", "red", "tea", "a boat at sea", "red"]
COLOURS = ["red", "green", "a very dark blue"]
CPU = torch.device("cpu")


class Case(NamedTuple):
    """What a step learns from: teachers by width and size of images, and which rows of its batch are pairs."""

    teachers: tuple[tuple[int, int], ...] = ((16, 32),)
    paired: tuple[bool, ...] = (True,) * 8
    chooses: bool = False  # the teacher, texts for images without captions


CASES = {
    "pairs": Case(),
    "two teachers": Case(teachers=((12, 32), (8, 48))),
    "mixed": Case(paired=(True, False, True, True, False, False, True, False)),
    "no pair in the second half, texts that are chosen": Case(paired=(True,) * 3 + (False,) * 5, chooses=True),
}


def model(seed: int, trunk: str = "test_vit", *, width: int = 16, image_size: int = 32) -> ClipModel:
    return tiny_clip(trunk, seed=seed, embedding_size=width, image_size=image_size)


def make_step(processes: Processes, settings: StepSettings, case: Case = CASES["pairs"]) -> TrainingStep:
    clips = [model(1 + k, "test_resnet", width=w, image_size=size) for k, (w, size) in enumerate(case.teachers)]
    teacher: BatchTeacher = (plain := LiveTeacher([Teacher(clip, CPU, autocast=None) for clip in clips]))
    if case.chooses:
        teacher = ChoosingTeacher(plain, [(f"{colour} tea", colour) for colour in COLOURS], plain.embed_captions)
    torch.manual_seed(0)  # of the projections
    objective = Objective(load_recipe("clip-rd-bank").objective, widths=(16, *(width for width, _ in case.teachers)))
    return TrainingStep(model(0), teacher, objective, processes, settings, bank=QueueBank(12, CPU))


def compute(step: TrainingStep, case: Case = CASES["pairs"], *, loss_scale: float = 1.0) -> dict[str, Tensor]:
    """Return the loss, its terms and all gradients of one step on this process's part of a batch."""
    processes, generator = step.processes, torch.Generator().manual_seed(2)
    pixels, *others = (torch.rand(8, 3, size, size, generator=generator) for _, size in ((16, 32), *case.teachers))
    size = len(pixels) // processes.world_size
    part = slice(processes.rank * size, (processes.rank + 1) * size)
    paired = None if all(case.paired) else case.paired[part]
    batch = Batch(pixels[part], tuple(own[part] for own in others), CAPTIONS[part], paired=paired)
    result = step(batch, 0, loss_scale=loss_scale)
    parameters = [*step.student.model.named_parameters(), *step.objective.named_parameters()]
    gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    return {"loss": result.loss.total, **result.loss.terms, **gradients}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = factor if "." in name or name == "logit_scale" else 1.0  # of a gradient
        tolerance = 1e-4 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(actual[name] / scale, value, rtol=1e-4, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("name", "count", "settings"),
    [
        ("pairs", 2, StepSettings(global_logits=True)),
        ("pairs", 1, StepSettings(block=3)),
        ("two teachers", 2, StepSettings(chunks=2, block=3)),
        ("mixed", 1, StepSettings(chunks=4)),
        ("no pair in the second half, texts that are chosen", 2, StepSettings(global_logits=True)),
        ("no pair in the second half, texts that are chosen", 2, StepSettings(chunks=2, block=3)),
    ],
)
def test_processes_chunks_and_blocks_give_the_loss_and_gradients_of_the_whole(
    name: str, count: int, settings: StepSettings
) -> None:
    case = CASES[name]
    expected = compute(make_step(Processes(), StepSettings(), case), case)
    exchange = Exchange(count)
    # Initial weights are drawn from torch's global generator, so before the threads start.
    steps = [
        make_step(Threads(rank, count, exchange=exchange) if count > 1 else Processes(), settings, case)
        for rank in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        for actual in pool.map(lambda step: compute(step, case), steps):
            assert_close(actual, expected)


def test_gradient_checkpointing_changes_neither_gradients_nor_the_statistics_of_batch_norms() -> None:
    def state(checkpointing: bool) -> dict[str, Tensor]:
        student = model(0, "test_resnet")
        student.model.train()
        student.model.set_grad_checkpointing(checkpointing)  # type: ignore[operator]
        settings = StepSettings(chunks=2, recompute=checkpointing)
        gradients = compute(TrainingStep(student, None, Objective(Weights(task=1)), Processes(), settings))
        buffers = dict(student.model.named_buffers())
        counts = [value for name, value in buffers.items() if name.endswith("num_batches_tracked")]
        assert counts == [torch.tensor(2)] * len(counts) != []  # each chunk counts once
        return {**gradients, **buffers}

    torch.testing.assert_close(state(checkpointing=True), state(checkpointing=False), rtol=0, atol=0)


def test_the_loss_scale_multiplies_every_gradient_and_not_the_loss() -> None:
    expected = compute(make_step(Processes(), StepSettings()))
    assert_close(compute(make_step(Processes(), StepSettings()), loss_scale=8.0), expected, factor=8.0)


def run_steps(student: ClipModel, *steps: int, **settings: int) -> None:
    step = TrainingStep(student, None, Objective(Weights(task=1)), Processes(), StepSettings(**settings))
    for number in steps:
        step(Batch(torch.rand(8, 3, 32, 32), (), CAPTIONS), number)


def dropout_masks(student: ClipModel) -> list[Tensor]:
    """Add dropout to a student's image tower; return the list that its masks are added to."""
    masks = list[Tensor]()
    dropout = nn.Dropout(0.5)
    dropout.register_forward_hook(lambda _, __, output: masks.append(output.detach() != 0))
    student.model.get_submodule("visual").register_forward_hook(lambda _, __, output: dropout(output))
    return masks


def test_each_step_seed_and_chunk_draws_its_own_dropout_and_the_same_one_again() -> None:
    student = model(0)
    masks = dropout_masks(student)
    run_steps(student, 3, chunks=2)
    first, second, *again = masks  # of the second pass
    assert all(map(torch.equal, again, (first, second)))
    assert len(again) == 2
    assert not torch.equal(first, second)
    masks.clear()
    run_steps(student, 0, 0, 1)
    run_steps(student, 0, seed=1)
    first, same, *others = masks
    assert torch.equal(same, first)
    assert [torch.equal(other, first) for other in others] == [False] * 2


def test_each_process_seeds_its_dropout_by_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks would say nothing: threads, unlike processes, draw from one generator."""
    exchange, seeds = Exchange(2), list[int]()
    steps = [make_step(Threads(rank=rank, world_size=2, exchange=exchange), StepSettings()) for rank in range(2)]
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compute, steps))
    assert len(seeds) == len(set(seeds)) == 2


def test_a_step_that_overflows_in_float16_leaves_the_batch_norms_as_they_were() -> None:
    student, factor = model(0, "test_resnet"), 1.0
    convolution = next(m for m in student.model.modules() if isinstance(m, nn.Conv2d))
    convolution.register_forward_pre_hook(lambda _, args: (factor * args[0],))
    settings = StepSettings(autocast=torch.float16, chunks=2)
    step = TrainingStep(student, None, Objective(Weights(task=1)), Processes(), settings)

    def buffers() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in student.model.named_buffers()}

    start = buffers()
    assert compute(step)["loss"].isfinite()
    after_one = buffers()
    assert any(not torch.equal(after_one[name], start[name]) for name in start)
    factor = 1e5
    assert not compute(step)["loss"].isfinite()
    torch.testing.assert_close(buffers(), after_one, rtol=0, atol=0)


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {})
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-2", "step-10"]


def of_two(rank: int = 0, *, count: int = 2) -> Processes:
    return Processes(rank, count, CPU, None, tuple("abc"[:count]))


@pytest.mark.parametrize(
    ("message", "processes", "named"),
    [
        ("Rank 2 reached monitoredBarrier, but errors while waiting for send/recv from rank 0.", of_two(2, count=3),
         "^Process 0 "),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer", of_two(1), r"^Process 0 \(on a\) of the run"),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer", of_two(count=3), "^The connection to another"),
    ],
)  # fmt: skip
def test_the_error_names_the_process_that_is_lost(message: str, processes: Processes, named: str) -> None:
    error = lost_process(RuntimeError(message), processes)
    assert isinstance(error, LostProcessError)
    assert re.search(named, str(error))


def test_two_real_processes_learn_in_each_step_what_one_learns_from_the_whole_batch() -> None:
    for _, received in start_two(learn_as_one, __file__):
        assert received.poll(PATIENCE_S)
        assert received.recv() == ""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows has no signal that stops a process")
@pytest.mark.parametrize("how", ["SIGSTOP", "SIGKILL"])
def test_a_process_that_is_stopped_or_killed_ends_the_others(how: str) -> None:
    started = start_two(lose_the_second, how)
    try:
        assert started[0][1].poll(PATIENCE_S)
        expected = f"Process 1 (on {socket.gethostname()}) of the run has ended, or does not answer."
        assert started[0][1].recv() == expected
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def test_processes_that_torchrun_starts_again_do_not_meet_those_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "1", "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _store_after_restart() == {}
    server.set("address", "of a process that ended")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    arguments = _store_after_restart()
    assert (arguments["rank"], arguments["world_size"]) == (1, 2)
    assert not arguments["store"].check(["address"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # machines may count restarts differently
    assert _store_after_restart() == {}
